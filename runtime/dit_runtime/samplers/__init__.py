"""Samplers as schedules of numbers, with spacing, noise and guidance. Pure functions of numpy."""
