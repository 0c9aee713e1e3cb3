"""The errors that a user can act on: one root class, and a child for each stage.

A message is one line. It says what is wrong, what was found, what was expected, and what to do next.
"""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

from dit_runtime.core.streams import DEBUG
from dit_runtime.core.text import one_line

# What to do next after an error of the system.
_NEXT = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your space on that disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "end other programs",
    errno.EACCES: "change its permissions, or use another path",
    errno.EPERM: "change its permissions, or use another path",
    errno.EROFS: "use a path on another disk",
    errno.ENOENT: "check that it exists",
}


class DiTError(Exception):
    """The root of all these errors; a command prints it as one line and exits with 1.

    Names in a message come from files that may be anybody's: ``str`` gives the message as ``one_line`` makes it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


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


def explain(error: Exception) -> str:
    """What to say of an error that ended the work."""
    if isinstance(error, DiTError):
        return str(error)
    if isinstance(error, OSError):
        return explain_os_error(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # PyTorch has no type for it
        reason = f" ({error})" if str(error) else ""
        return f"there is not enough memory{reason}; end other programs, or ask for less at once"
    if isinstance(error, ImportError):
        return f"a library cannot be imported ({error}); install dit-export and its extras again"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "dit_" in frame.filename][-1:] or frames[-1:]
    where = "".join(f" in {Path(frame.filename).name}:{frame.lineno}" for frame in ours)
    return one_line(
        f"this is a fault of ours: {type(error).__name__}{where}: {error}; report it, with what {DEBUG}=1 before the "
        "command prints"
    )


def explain_os_error(error: OSError) -> str:
    """An error of the system as a message: which file, what is wrong, and what to do next."""
    if not error.filename and error.errno == errno.ENOENT and not _has_current_folder():
        return "the current folder does not exist any more; change to another one"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    reason = error.strerror or str(error) or type(error).__name__
    what = f"{' and '.join(names)}: {reason}" if names else f"a file cannot be used: {reason}"
    advice = _NEXT.get(error.errno or 0)
    return one_line(f"{what}; {advice}" if advice else what)


def _has_current_folder() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True
