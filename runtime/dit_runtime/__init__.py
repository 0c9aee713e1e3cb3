"""Run a dit-export bundle: samplers, noise and the sampling loop in numpy around an inference engine. No torch."""

from dit_runtime.bundle import Bundle, open_bundle
from dit_runtime.errors import DiTError
from dit_runtime.pipeline import Pipeline
from dit_runtime.schedule import SAMPLERS, schedule_for
from dit_runtime.table import Schedule, read_table, write_table

__version__ = "0.1.0"

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
