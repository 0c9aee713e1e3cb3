"""The distribution's version, its only source."""

__version__ = "0.1.0"
