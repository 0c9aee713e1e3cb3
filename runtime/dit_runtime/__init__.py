"""Run a dit-export bundle: samplers, noise and the sampling loop in numpy around an inference engine. No torch."""

from dit_runtime.bundle import Bundle, open_bundle
from dit_runtime.errors import DiTError
from dit_runtime.pipeline import Pipeline
from dit_runtime.schedule import Schedule, schedule_for

__version__ = "0.1.0"

__all__ = ["Bundle", "DiTError", "Pipeline", "Schedule", "__version__", "open_bundle", "schedule_for"]
