"""How long an engine takes."""
