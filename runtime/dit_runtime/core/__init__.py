"""What everything stands on: errors, files, progress, and the machine."""
