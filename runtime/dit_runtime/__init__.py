"""Run a dit-export bundle: samplers, noise and the sampling loop in numpy around an inference engine. No torch."""

from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import DiTError
from dit_runtime.core.version import __version__
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.by_name import SAMPLERS, schedule_for
from dit_runtime.samplers.schedule import Schedule, read_table, write_table

__all__ = [
    "SAMPLERS",
    "Bundle",
    "DiTError",
    "Pipeline",
    "Schedule",
    "__version__",
    "open_bundle",
    "read_table",
    "schedule_for",
    "write_table",
]
