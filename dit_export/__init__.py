"""Export trained Diffusion Transformers from PyTorch to verified bundles.

    from dit_export import export, verify

    result = export("facebook/DiT-XL-2-256", "dit-xl.bundle", precision="fp16")
    assert result.passed
    verify(result.bundle, engine="openvino")

Importing this package imports no torch; ``export`` imports it when it is called. The names of ``__all__`` are imported
when they are asked for: a command answers Ctrl-C before it imports numpy.
"""

from dit_runtime.core.version import __version__

TYPE_CHECKING = False  # as typing has it, which is not imported here
if TYPE_CHECKING:
    from dit_export.api import ExportResult, export, verify
    from dit_export.request import ExportRequest
else:
    _HOMES = {"ExportResult": "api", "export": "api", "verify": "api", "ExportRequest": "request"}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = ["ExportRequest", "ExportResult", "__version__", "export", "verify"]
