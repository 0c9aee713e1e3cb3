"""What a file is by its first bytes, whatever its name says: files that are no weights are common in their place."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path

from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.reading import FileError, check_file, leads_outside

SAFE, PICKLES = ".safetensors", (".pt", ".pth", ".ckpt", ".bin")
SAFETENSORS, ZIP, LEGACY, UNKNOWN = "a safetensors file", "a torch.save file", "an old torch.save file", "unknown"
HEAD_BYTES = 1024
ANOTHER = "expected a .safetensors file, or one that torch.save wrote"

# What files of other kinds begin with, what they are, and what helps.
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run git lfs pull where it was cloned"),
    (b"version https://hawser", "a Git LFS pointer, not the weights", "run git lfs pull where it was cloned"),
    (b"# xet version", "a Xet pointer, not the weights", "run git xet checkout where it was cloned"),
    (b"GGUF", "a GGUF file", "give the checkpoint from which it was converted"),
    (b"ggml", "a GGML file", "give the checkpoint from which it was converted"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and give the weights file inside"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it and give the weights file inside"),
    (b"BZh", "a bzip2 archive", "unpack it and give the weights file inside"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it and give the weights file inside"),
    (b"\x04\x22\x4d\x18", "an lz4 archive", "unpack it and give the weights file inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give the weights file inside"),
    (b"Rar!", "a RAR archive", "unpack it and give the weights file inside"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", ANOTHER),
    (b"\x93NUMPY", "a NumPy array", ANOTHER),
    (b"PAR1", "a Parquet table", ANOTHER),
    (b"ARROW1", "an Arrow table", ANOTHER),
    (b"TFL3", "a TensorFlow Lite model", ANOTHER),
    (b"ftrt", "a TensorRT engine", "give the checkpoint"),
    (b"ptrt", "a TensorRT engine", "give the checkpoint"),
    (b"\x89PNG", "an image", ANOTHER),
    (b"\xff\xd8\xff", "an image", ANOTHER),
    (b"GIF8", "an image", ANOTHER),
    (b"%PDF", "a PDF document", ANOTHER),
    (b"\x7fELF", "a program", ANOTHER),
    (b"SQLite format 3", "an SQLite database", ANOTHER),
)


def check_regular(path: Path) -> None:
    """Check that a file can be opened and read without waiting.

    Raises:
        CheckpointError: it is missing, a folder, a pipe or a device, or may not be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: is a folder; expected a file with weights")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: is a pipe or a device; expected a regular file")
        check_file(path, None)
    except OSError as error:
        raise error_for_os(path, error) from error
    except FileError as error:
        if isinstance(error.__cause__, OSError):
            raise error_for_os(path, error.__cause__) from error
        raise CheckpointError(f"{path}: {error}; expected a regular file") from error


def check_links(folder: Path, names: Iterable[str], within: Path) -> None:
    """Check that files of a checkpoint's folder are its own, and no links to what its maker does not have.

    Args:
        folder: holds the names.
        names: of files, and of folders whose files are looked at too.
        within: the folder that no link may lead out of. The blobs of its own repository in a hub cache are inside.

    Raises:
        CheckpointError: a link leads elsewhere.
    """
    for name in names:
        for path in (folder / name, *sorted((folder / name).glob("*"))):
            if path.is_symlink() and leads_outside(within, path):
                raise CheckpointError(f"{path}: is a link out of {within}; put a copy of what it leads to in its place")


def error_for_os(path: Path | str, error: OSError) -> CheckpointError:
    """The error for a file that the system does not give."""
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path}: may not be read ({error.strerror}); allow it with chmod u+r, or copy it")
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path")


def kind_of_file(path: Path) -> str:
    """``SAFETENSORS``, ``ZIP``, ``LEGACY`` or ``UNKNOWN``, by the first bytes.

    Raises:
        CheckpointError: the file cannot be read, is empty, or is known to be something else.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise error_for_os(path, error) from error
    if not head:
        raise CheckpointError(f"{path}: is an empty file; download or copy it again")
    if not any(head):
        raise CheckpointError(f"{path}: begins with {len(head)} zeros: its download was cut off; download it again")
    for signature, kind, cure in SIGNATURES:
        if head.startswith(signature):
            raise CheckpointError(f"{path}: is {kind}; {cure}")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path}: is a tar archive; unpack it and give the weights file inside")
    if _is_safetensors(head, path):
        return SAFETENSORS
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[0] == 0x80 and head[1:2] and head[1] <= 5:
        return LEGACY
    if text := _describe_text(head):
        raise CheckpointError(f"{path}: is {text}; download the file itself again")
    if head[0] == 8 and len(head) > 2 and head[1] < 32 and (head[2] in (0x12, 0x3A) or path.suffix == ".onnx"):
        raise CheckpointError(f"{path}: is an ONNX graph; give the checkpoint from which it was exported")
    return UNKNOWN


def check_name(path: Path, kind: str) -> None:
    """Check that a weights file's name says what it is.

    Raises:
        CheckpointError: its name is of another kind, or its content is of none.
    """
    named_safe = path.suffix == SAFE
    if kind == SAFETENSORS and not named_safe:
        raise CheckpointError(f"{path}: is a safetensors file; rename it to {path.stem}.safetensors")
    if kind in (ZIP, LEGACY) and path.suffix not in (SAFE, *PICKLES):
        raise CheckpointError(f"{path}: is {kind}; rename it to {path.stem}.pt")
    if kind in (ZIP, LEGACY) and named_safe:
        raise CheckpointError(
            f"{path}: is {kind} (a pickle), no safetensors file; rename it to {path.stem}.pt if you trust its source"
        )


def _is_safetensors(head: bytes, path: Path) -> bool:
    """Whether there is a length, of at most the file's, and then a JSON object."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= path.stat().st_size


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as opened:
            names = opened.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ZIP  # cut off: the reader says so
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path}: is a TorchScript model; save its state_dict() with torch.save and give that")
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        what = "a NumPy archive" if any(name.endswith(".npy") for name in names) else "a zip archive"
        shown = ", ".join(names[:3])
        raise CheckpointError(f"{path}: is {what} ({shown[:100]}); unpack it and give the weights file inside")
    return ZIP


def _describe_text(head: bytes) -> str | None:
    """What a text is, and how it begins; None if it is no text."""
    try:
        text = head.decode("utf-8-sig" if head.startswith(b"\xef\xbb\xbf") else "utf-8", errors="strict")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode()
    if any(character < " " and character not in "\t\r\n\f" for character in text):
        return None
    start = " ".join(text.split())
    lower = start.lower()
    begins = repr(start[:60])
    if lower.startswith(("<!doctype html", "<html", "<head", "<body", "<script", "<!--")):
        return f"an HTML page, not the weights ({begins})"
    if lower.startswith("<"):
        return f"an XML page, not the weights ({begins})"
    if "/annex/objects/" in start[:300]:
        return f"a git-annex pointer, not the weights ({begins})"
    return f"a {'JSON' if lower.startswith(('{', '[')) else 'plain'} text, not the weights ({begins})"
