"""A worker of a Ray cluster: one process with one engine, which makes the shards that it is told to make."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from dit_runtime.core.errors import DiTError, EngineError, explain
from dit_runtime.core.version import __version__
from dit_runtime.output.provenance import Entry
from dit_runtime.output.request import SampleRequest
from dit_runtime.output.shards import ShardMaker


@dataclass(frozen=True)
class Failure:
    """Work that a user can mend, and the machine that it failed on."""

    host: str
    error: DiTError


class ShardWorker:
    """Its methods are called from afar. What fails is returned, not raised: Ray would make a traceback of it."""

    def __init__(self) -> None:
        self._maker: ShardMaker | None = None
        self._before = self._done = self._work = self._images = 0

    def open(self, request: SampleRequest, digest: str, version: str) -> Entry | Failure:
        """Open the bundle and an engine; returns how the images are made.

        Args:
            request: whose paths are absolute.
            digest: of the bundle where the work was begun.
            version: of this package there.
        """
        try:
            if version != __version__:
                raise EngineError(
                    f"has dit-export {__version__}, and {version} begins the work; install the same on every machine"
                )
            self._maker = ShardMaker(request, digest)
        except Exception as error:  # noqa: BLE001  # whatever it is, the driver says it in one line
            return _failure(error)
        return self._maker.entry

    def make(self, number: int) -> int | Failure:
        """Make a shard; returns the images that were made."""
        assert self._maker is not None
        self._images, self._work, self._done = len(self._maker.plan.images_of(number)), 0, 0
        self._work = self._maker.count_work([number])
        try:
            made = self._maker.make(number, self._advance)
        except Exception as error:  # noqa: BLE001  # as above
            return _failure(error)
        finally:
            self._before, self._work = self._before + self._images, 0
        return made

    def progress(self) -> int:
        """Images that were made so far, with the share of the running shard that is done."""
        done, work = self._done, self._work
        return self._before + (self._images * done // work if work else 0)

    def _advance(self, count: int) -> None:
        self._done += count


def _failure(error: Exception) -> Failure:
    host = socket.gethostname()
    return Failure(host, error if isinstance(error, DiTError) else EngineError(explain(error)))
