"""A bundle on disk: its manifest, its reader, and its multiply-accumulates."""
