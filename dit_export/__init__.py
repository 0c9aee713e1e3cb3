"""Export trained Diffusion Transformers from PyTorch to verified bundles.

    from dit_export import export, verify

    result = export("facebook/DiT-XL-2-256", "dit-xl.bundle", precision="fp16")
    assert result.passed
    verify(result.bundle, engine="openvino")

Importing this package imports no torch; ``export`` imports it when it is called.
"""

from dit_export.api import ExportResult, export, verify
from dit_export.request import ExportRequest
from dit_runtime.core.version import __version__

__all__ = ["ExportRequest", "ExportResult", "__version__", "export", "verify"]
