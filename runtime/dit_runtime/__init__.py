"""Run a dit-export bundle: samplers, noise and the sampling loop in numpy around an inference engine. No torch.

The names of ``__all__`` are imported when they are asked for: a command answers Ctrl-C before it imports numpy.
"""

from dit_runtime.core.version import __version__

TYPE_CHECKING = False  # as typing has it, which is not imported here
if TYPE_CHECKING:
    from dit_runtime.bundle.reader import Bundle, open_bundle
    from dit_runtime.core.errors import DiTError
    from dit_runtime.pipeline import Pipeline
    from dit_runtime.policy import Policy
    from dit_runtime.samplers.by_name import SAMPLERS, schedule_for
    from dit_runtime.samplers.schedule import Schedule, read_table, write_table
    from dit_runtime.tuning.tune import tune
else:
    _HOMES = {
        "Bundle": "bundle.reader",
        "DiTError": "core.errors",
        "Pipeline": "pipeline",
        "Policy": "policy",
        "SAMPLERS": "samplers.by_name",
        "Schedule": "samplers.schedule",
        "open_bundle": "bundle.reader",
        "read_table": "samplers.schedule",
        "schedule_for": "samplers.by_name",
        "tune": "tuning.tune",
        "write_table": "samplers.schedule",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "SAMPLERS",
    "Bundle",
    "DiTError",
    "Pipeline",
    "Policy",
    "Schedule",
    "__version__",
    "open_bundle",
    "read_table",
    "schedule_for",
    "tune",
    "write_table",
]
