"""Samplers as schedules (tables of numbers), with their spacing, noise and guidance. Pure functions of numpy."""
