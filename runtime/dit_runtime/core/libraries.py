"""Libraries that a command uses: none reports to its maker, and what they log is not shown beside our lines."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from dit_runtime.core.streams import DEBUG, owns_streams

# What each library reads when it is imported. A user who sets one of these has decided otherwise.
_TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime (Privacy.md): no uploader, which looks a host up; no id of the machine
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
}
_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}


def switch_telemetry_off() -> None:
    """Let no library that is imported after this send anything, nor look a name up; children inherit it."""
    for name, value in _TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def without_module(name: str) -> Iterator[None]:
    """While other modules are imported, there seems to be no module ``name``."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While a command works, libraries log and warn nothing, unless Python's ``-W`` or ``DIT_DEBUG`` asks for it.

    In a process that is not the command's own, they do as that process has set them.
    """
    switch_telemetry_off()
    if os.environ.get(DEBUG) or not owns_streams():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["MPLBACKEND"] = "agg"  # plots are files; of another name matplotlib cannot be imported
    # It prints the warnings of libraries without a handler; without any, logging would say so itself.
    last, logging.lastResort = logging.lastResort, logging.NullHandler()
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.lastResort = last
