"""One shard: a tar file or a folder of images with their labels, written aside and renamed when it is whole.

Of an image with the file name ``NAME.png`` a shard holds

    NAME.png     the image, with its record
    NAME.json    the same record as JSON, with the image's index
    NAME.cls     the class number in ASCII; a mixture of classes has none

as WebDataset reads them. A tar file is not compressed, and its bytes follow from the images alone: no time, no user, no
machine is in its headers.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dit_runtime.core.errors import OutputError
from dit_runtime.core.replace import replace_file, replace_folder
from dit_runtime.output.images import Images, png_from_image
from dit_runtime.output.provenance import text_from_entries
from dit_runtime.output.series import KeptImage


class Shard:
    """A shard that is being written.

    Attributes:
        count: images in it so far.
    """

    def __init__(self, put: Callable[[str, bytes], None]) -> None:
        self._put = put
        self.count = 0

    def add(self, kept: KeptImage, name: str, image: Images) -> None:
        """Add an image ``[H, W, 3]`` under its file's name. Raises OSError where it cannot be written."""
        stem, label = name.removesuffix(".png"), kept.entry["label"]
        self._put(name, png_from_image(image, text_from_entries([kept.entry], image)))
        self._put(f"{stem}.json", json.dumps({"index": kept.index, **kept.entry}, ensure_ascii=False).encode())
        if len(label) == 1:
            self._put(f"{stem}.cls", next(iter(label)).encode("ascii"))
        self.count += 1


@contextlib.contextmanager
def new_shard(path: Path, folder: bool) -> Iterator[Shard]:
    """A shard that is at ``path`` when the block succeeds; after an error nothing is there.

    Args:
        path: of the tar file or the folder.
        folder: whether it is a folder.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        if folder:
            with replace_folder(path) as temporary:
                yield Shard(lambda name, content: _write(temporary / name, content))
        else:
            with replace_file(path, keep_suffix=False) as temporary, _tar(temporary) as put:
                yield Shard(put)
    except OutputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        reason = error.__cause__.strerror or error.__cause__
        raise OutputError(
            f"{path}: cannot be written ({reason}); free some space, or mend what it is, and the same command goes on "
            "from the shards that are there"
        ) from error


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@contextlib.contextmanager
def _tar(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """What puts members into a tar file."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:

        def put(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)  # of time 0, user 0 and group 0
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))

        yield put
