"""Whether a bundle's weights are still those that were checked: engines map them, and read them while they run."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import BundleError

Facts = tuple[int, int, int, int]


class BundleFiles:
    """The weights of a bundle as they are when this is made. The engine is opened before or after.

    A file that another one has replaced is no fault: what was mapped is still the old one.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        names = {spec.weights for spec in bundle.manifest.graphs.values()}
        paths = [bundle.path.joinpath(*PurePosixPath(name).parts) for name in sorted(names)]
        self._facts = {path: facts for path in paths if (facts := _facts_of(path)) is not None}

    def check(self) -> None:
        """Raises BundleError where a file was written to. It takes 1 µs for each file."""
        for path, facts in self._facts.items():
            found = _facts_of(path)
            if found is not None and found[:2] == facts[:2] and found != facts:
                raise BundleError(
                    f"{path}: was altered while the bundle is served, and images may be wrong; copy the bundle "
                    "again, and start the server again"
                )


def _facts_of(path: Path) -> Facts | None:
    """Device, inode, size, and time of the last change; None where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
