"""Build and audit inference engines from a bundle. No torch."""

from dit_runtime.core.version import __version__

__all__ = ["__version__"]
