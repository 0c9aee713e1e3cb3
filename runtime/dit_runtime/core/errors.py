"""The errors that a user can act on: one root class, and a child for each stage.

A message is one line. It says what is wrong, what was found, what was expected, and what to do next.
"""

from __future__ import annotations


class DiTError(Exception):
    """The root of all these errors; a command prints it as one line and exits with 1."""


class CheckpointError(DiTError):
    """A checkpoint cannot be read, or is not of a model that is supported."""


class BundleError(DiTError):
    """A bundle is missing, incomplete, altered, or of another schema."""


class EngineError(DiTError):
    """An engine is not installed, or cannot run what was asked."""


class BuildError(DiTError):
    """An engine could not be built, or is not what was asked for."""


class SamplingError(DiTError):
    """Sampling arguments do not fit the model, or latents are no longer finite."""


class ParityError(DiTError):
    """Results do not match the reference."""


class OutputError(DiTError):
    """A file or folder cannot be written, or is not what it should be."""


class ResultsError(DiTError):
    """A file of results that is damaged, or that ``dit-verify --json`` did not print."""
