"""Everything a user can do wrong or a file can be: one root, one child per stage.

A message says what is wrong, what was found, what was expected and what to do next, in one line.
"""

from __future__ import annotations


class DiTError(Exception):
    """The root of all errors that a user can act on; commands print it as one line and exit with 1."""


class CheckpointError(DiTError):
    """A checkpoint that cannot be read, or is not a model this tool supports."""


class BundleError(DiTError):
    """A bundle that is missing, incomplete, altered, or of another schema."""


class EngineError(DiTError):
    """An inference engine that is not installed, or cannot run what was asked of it."""


class BuildError(DiTError):
    """An engine that could not be built, or was not what was asked for."""


class SamplingError(DiTError):
    """Sampling arguments that do not fit the model, or a loop that left the finite numbers."""


class ParityError(DiTError):
    """Results that do not match the reference."""


class OutputError(DiTError):
    """A place that cannot be written to."""


class ResultsError(DiTError):
    """A file of results that is damaged, or that ``dit-verify --json`` did not print."""
