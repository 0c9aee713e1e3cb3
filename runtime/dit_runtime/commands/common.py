"""What the commands share: errors in one line, exit codes, ``--json``, ``--version``, and types of arguments."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from dit_runtime.backends.base import most_threads
from dit_runtime.backends.open import BACKENDS
from dit_runtime.core.entry import INTERRUPTED, answer_stops, forget_stops, interrupt, was_stopped
from dit_runtime.core.errors import SamplingError, explain
from dit_runtime.core.libraries import quiet_libraries
from dit_runtime.core.progress import show_progress
from dit_runtime.core.streams import DEBUG, guarded_streams, write_safely
from dit_runtime.core.text import LONGEST, one_line
from dit_runtime.core.version import __version__

LONGEST_NUMBER = 100  # characters
ENGINE_HELP = (
    f"auto, {', '.join(BACKENDS)}; auto takes TensorRT if dit-build made an engine for this GPU, "
    "else the fastest of the others here"
)
PRECISIONS = ("fp32", "bf16", "f32")  # f32 is another name of fp32
PRECISION_HELP = "of OpenVINO (default: the bundle's or nearest)"
STORE_HELP = "the folder of engines, verdicts and prepared graphs (default: BUNDLE/engines)"


class Parser(argparse.ArgumentParser):
    """A parser whose help has defaults and examples, and whose errors are one line with exit code 1."""

    def __init__(self, name: str, description: str, examples: Sequence[str]) -> None:
        text = "examples:\n" + "\n".join(f"  {example}" for example in examples)
        super().__init__(prog=name, description=description, epilog=text, formatter_class=_Formatter)
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        say(self.prog, f"{one_line(message, LONGEST - 40)}; see {self.prog} --help")
        sys.exit(1)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.required:
            return action.help
        return super()._get_help_string(action)


def run(name: str, work: Callable[[], int]) -> NoReturn:
    """Run a command's work and exit with the code that it returns.

    What a user or a file can cause is one line on stderr and exit code 1. Ctrl-C, SIGTERM and SIGHUP are exit code 130,
    and silence. Any other error is a fault of ours: one line that says so, and exit code 1; the environment variable
    ``DIT_DEBUG`` shows its traceback. Results that cannot be printed are an error too, unless nobody reads them.
    """
    forget_stops()
    answer_stops(interrupt)
    signal.signal(signal.SIGALRM, interrupt)
    sys.unraisablehook = _interrupt_again
    with quiet_libraries(), guarded_streams() as finish:
        code = _code_of(name, work)
        if (error := finish()) is not None and code != INTERRUPTED:
            say(name, f"stdout: the results could not be printed ({error.strerror}); files that it wrote are complete")
            code = code or 1
    sys.exit(code)


def _code_of(name: str, work: Callable[[], int]) -> int:
    """What ``work`` returns; after an error, which is said, 1."""
    try:
        with _shown_log():
            return work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # of argparse
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:  # noqa: BLE001  # whatever it is, a user sees no traceback
        if was_stopped():  # in the midst of an import, for one, KeyboardInterrupt becomes an ImportError
            return INTERRUPTED
        if os.environ.get(DEBUG):
            traceback.print_exc()
        say(name, explain(error))
        return 1


def say(name: str, text: object) -> None:
    """Print one line on stderr, as the command ``name`` says it."""
    write_safely(sys.stderr, f"{name}: {one_line(text)}\n")


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, in ASCII."""
    print(json.dumps(value, indent=1, allow_nan=False))


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: height and width of images in pixels, as ``256x384``."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HEIGHTxWIDTH in pixels, such as 256x384")
    return int(height), int(width)


def natural(text: str) -> int:
    """An argparse type: a whole number from 0 to 2⁶⁴-1."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) < 2**64):
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected a whole number from 0 to 2^64-1")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1")
    return number


def thread_count(least: int) -> Callable[[str], int]:
    """An argparse type: threads of the CPU, from ``least`` to ``most_threads()``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = -1
        if not least <= number <= most_threads():
            raise argparse.ArgumentTypeError(
                f"got {text!r:.80}, expected a whole number from {least} to {most_threads()}"
            )
        return number

    return parse


def seed_number(text: str) -> int:
    """An argparse type: a seed that PyTorch takes."""
    from dit_runtime.samplers.noise import check_seed

    try:
        return check_seed(int(text) if len(text) <= LONGEST_NUMBER else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected a whole number from -2^63 to 2^64-1") from None
    except SamplingError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops an exception in a weak reference's callback or a ``__del__``: an interrupt there comes again."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # SIGALRM, when that callback is over
    else:
        sys.__unraisablehook__(unraisable)


class _Lines(logging.Handler):
    """What the library found out, a line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        write_safely(sys.stderr, f"{one_line(record.getMessage())}\n")


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """While a command works, show progress bars and print what the library logs."""
    show_progress()
    logger, lines = logging.getLogger("dit_runtime"), _Lines()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        show_progress(False)
