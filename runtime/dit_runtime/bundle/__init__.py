"""The bundle: its manifest, its reader, its precisions, and its model's multiply-accumulates."""
