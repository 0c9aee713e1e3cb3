"""The commands: arguments in, results out."""
