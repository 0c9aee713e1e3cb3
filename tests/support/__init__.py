"""What several tests use: oracles, doubles, small models, and the commands."""
