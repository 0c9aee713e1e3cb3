"""Serving: requests of many callers share one engine's running batch, and join and leave it between two steps."""
