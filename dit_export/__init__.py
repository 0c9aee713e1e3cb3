"""Export trained Diffusion Transformers from PyTorch to verified bundles. Importing this package imports no torch."""

from dit_runtime.core.version import __version__

__all__ = ["__version__"]
