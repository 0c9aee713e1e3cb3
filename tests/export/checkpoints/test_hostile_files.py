"""Files that are no weights, or that say more than they hold: one clear line, at once, in little memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dit_export.checkpoints.sources import Source, load_checkpoint
from safetensors.torch import load_file
from support.official_files import loaded, weights_of

from dit_runtime.core.errors import CheckpointError

WEIGHTS = weights_of()
MOST_MEMORY = 200  # MiB that a refusal may take; measured: at most 11
TABLE, CLASSES, FIRST = "pos_embed", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 123\n"


def content_of(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def with_tensor(name: str, make: Callable[[], torch.Tensor]) -> Callable[[], bytes]:
    return lambda: content_of({**WEIGHTS, name: make()})


def expanded(*shape: int) -> Callable[[], torch.Tensor]:
    """One stored number that says it is as many."""
    return lambda: torch.ones(1).expand(*shape)


def safetensors(header: bytes | dict[str, object], data: bytes = b"\0" * 4, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], first: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [first, end]}


def repacked(change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with another pickle."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content_of(WEIGHTS))) as old, zipfile.ZipFile(found, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return found.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("weights.pt"))
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr(name, b"content")
    return buffer.getvalue()


def old(change: Callable[[bytes], bytes] = lambda content: content) -> bytes:
    return change(content_of(WEIGHTS, _use_new_zipfile_serialization=False))


# The file's name, its content, and what the line says.
FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "10^12 tokens": ("w.pt", with_tensor(TABLE, expanded(1, 10**12, 32)), "pos_embed is .* of which the file holds 1;"),
    "10^9 classes": ("w.pt", with_tensor(CLASSES, expanded(10**9, 32)), "of which the file holds 1; expected plain"),
    "10^9 MLP width": ("w.pt", with_tensor(FIRST, expanded(10**9, 32)), "of which the file holds 1; expected plain"),
    "meta": ("w.pt", with_tensor(FIRST, lambda: torch.empty(128, 32, device="meta")), "fc1.weight is a meta tensor"),
    "sparse": ("w.pt", with_tensor(FIRST, lambda: torch.eye(32).to_sparse()), "fc1.weight is a sparse tensor"),
    "nested": (
        "w.pt",
        lambda: repacked(lambda data: data.replace(b"_rebuild_tensor_v2", b"_rebuild_nested_tensor", 1)),
        "is a nested tensor",
    ),
    "quantized": (
        "w.pt",
        lambda: repacked(lambda data: data.replace(b"ctorch\nFloatStorage", b"ctorch\nQInt8Storage", 1)),
        "holds a QInt8Storage.*not quantized ones",
    ),
    "a table of integers": ("w.pt", with_tensor(TABLE, lambda: torch.ones(1, 16, 32).int()), "pos_embed is int32"),
    "a table of NaN": ("w.pt", with_tensor(TABLE, lambda: torch.full((1, 16, 32), torch.nan)), "holds NaN or infinity"),
    "empty dimensions": ("w.pt", with_tensor(FIRST, lambda: torch.ones(0, 32)), r"\[0, 32\]; expected 2 axes, none of"),
    "a huge stride": (
        "w.pt",
        lambda: repacked(lambda data: data.replace(b"K K\x01", b"K\xff\x8a\x08" + b"\xff" * 7 + b"\x7f", 1)),
        "of which the file holds 512",
    ),
    "a negative shape": (
        "w.pt",
        lambda: repacked(lambda data: data.replace(b"K\x10K ", b"K\x10J\xff\xff\xff\xff", 1)),
        "a negative shape, stride or offset",
    ),
    "a block of number 10^12": (
        "w.pt",
        with_tensor(f"blocks.{10**12}.attn.qkv.weight", lambda: torch.ones(1)),
        "3 blocks, and none has the number 2",
    ),
    "a long name": ("w.pt", with_tensor("x" * 10**6, lambda: torch.ones(1)), "1 unexpected keys .x{80}…"),
    "an escape sequence": ("w.pt", with_tensor("\x1b[31m\n", lambda: torch.ones(1)), r"1 unexpected keys \('.x1b\[31m"),
    "a key that takes for ever to hash": (
        "w.pt",
        lambda: repacked(lambda _: b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."),
        "a key that is no text and no number",
    ),
    "deep nesting": (
        "w.pt",
        lambda: repacked(lambda _: b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 10**4 + b"a" * (10**4 - 1) + b"s."),
        r"holds no state dict \(a\)",
    ),
    "bytes of 4 TB": ("w.pt", lambda: repacked(lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 42) + b"."), "MiB"),
    "an array of 4 TB": (
        "w.pt",
        lambda: repacked(lambda _: b"\x80\x05\x96" + struct.pack("<Q", 1 << 42) + b"."),
        "opcode",
    ),
    "a state of a function": (
        "w.pt",
        lambda: repacked(lambda _: b"\x80\x02ccollections\nOrderedDict\n}X\x0c\x00\x00\x00__defaults__]sb."),
        "a state of no object",
    ),
    "a function's call": (
        "w.pt",
        lambda: repacked(lambda _: b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R."),
        "could execute code: builtins.eval; save its tensors by name",
    ),
    "a pickled module": (
        "w.pt",
        lambda: content_of(torch.nn.Linear(2, 2)),
        "whole pickled torch.nn.modules.linear.Linear",
    ),
    "a compressed archive": ("w.pt", lambda: repacked(bytes, zipfile.ZIP_DEFLATED), "its archive is compressed"),
    "a plain pickle": ("w.pt", lambda: pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "an old file, cut off": ("w.pt", lambda: old(lambda content: content[:-5000]), "a storage ends outside the file"),
    "an old file of 2^62 numbers": (
        "w.pt",
        lambda: old(lambda content: content.replace(struct.pack("<q", 512), struct.pack("<q", 1 << 62))),
        "a storage ends outside the file",
    ),
    "a header of 4 TB": ("w.safetensors", lambda: safetensors(b"{}", length=4 << 40), "no safetensors header"),
    "offsets that overlap": (
        "w.safetensors",
        lambda: safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}),
        "cannot be read .*invalid offset",
    ),
    "more than the file has": (
        "w.safetensors",
        lambda: safetensors({"a": entry([10**9], 0, 4 * 10**9)}),
        "cannot be read",
    ),
    "a name twice": (
        "w.safetensors",
        lambda: safetensors(b'{"a": %b, "a": %b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2)),
        "key 'a' is there twice",
    ),
    "a nested header": (
        "w.safetensors",
        lambda: safetensors(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "nested 100001 levels deep",
    ),
    "nothing": ("w.safetensors", lambda: b"", "is an empty file; download or copy it again"),
    "zeros": ("w.safetensors", lambda: bytes(4096), "begins with 1024 zeros"),
    "an LFS pointer": ("w.safetensors", lambda: POINTER, "is a Git LFS pointer, not the weights; run git lfs pull"),
    "a web page": ("w.pt", lambda: b"\n<!DOCTYPE html><html>404</html>", "is an HTML page, not the weights"),
    "an error in JSON": ("w.pt", lambda: b'{"error":"Invalid username"}', 'is a JSON text, not the weights .*"error"'),
    "an error": ("w.bin", lambda: b"Entry not found", "is a plain text, not the weights .'Entry not found'"),
    "gzip": ("w.pt", lambda: gzip.compress(b"weights"), "is a gzip archive; unpack it"),
    "tar": ("w.pt", archive, "is a tar archive; unpack it"),
    "zip": ("w.pt", lambda: zipped("model/weights.pt"), r"is a zip archive \(model/weights.pt\); unpack it"),
    "npz": ("w.ckpt", lambda: zipped("blocks.npy"), "is a NumPy archive"),
    "GGUF": ("w.gguf", lambda: b"GGUF\x03\0\0\0", "is a GGUF file; give the checkpoint from which it was converted"),
    "ONNX": ("w.onnx", lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.0.0", "is an ONNX graph; give the checkpoint"),
    "a pickle named safetensors": (
        "w.safetensors",
        lambda: content_of(WEIGHTS),
        r"is a torch.save file.*rename it to w.pt",
    ),
    "safetensors named pt": (
        "w.pt",
        lambda: safetensors({"a": entry([1], 0, 4)}),
        "is a safetensors file; rename it to w.safetensors",
    ),
    "weights of no name": ("weights", lambda: content_of(WEIGHTS), "is a torch.save file; rename it to weights.pt"),
}


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> str:
    return str(checkpoint / "vae")


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_refused(tmp_path: Path, vae: str, kind: str) -> None:
    """What the file is, or what is wrong in it, and what helps; nothing is computed from what it says."""
    name, make, message = FILES[kind]
    (tmp_path / name).write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(tmp_path / name, vae)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MOST_MEMORY
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_what_is_no_file(tmp_path: Path, vae: str) -> None:
    """A folder, a pipe, a device and a link that leads nowhere, each under a weights file's name, and a long path."""
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    (tmp_path / "link.pt").symlink_to(tmp_path / "nowhere")
    for name, message in {
        "folder.pt": "is a folder; expected a file with weights",
        "pipe.pt": "neither a file nor a folder; expected",
        "device.pt": "is a link to /dev/zero",
        "link.pt": "is a link to .*nowhere, which is not there",
        "x" * 5000: "cannot be opened|no such file or folder",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            loaded(tmp_path / name, vae)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000, and the weights beside it say 2"),
        ({"attention_head_dim": 10**9}, "attention_head_dim is 2000000000, and the weights beside it say 64"),
        ({"num_embeds_ada_norm": 10**9}, "says 1000000000 classes, and the label table has 11 rows"),
        ({"sample_size": 10**9}, "sample_size 1000000000 is .*; expected at most 512x512"),
        ({"patch_size": 10**18}, "patch_size is 10.*, and the weights beside it say 2"),
    ],
)
def test_configurations_that_speak_of_more(
    checkpoint: Path, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    """The numbers are held against the weights before diffusers makes a model of them."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Source(str(folder)))


def test_a_hostile_bin_in_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    """Pickles of diffusers' folders are read by the same rules, before diffusers reads them."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.unlink()
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    torch.save({**weights, table: torch.ones(1).expand(10**9, 64)}, file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"embedding_table.weight is .* of which the file holds 1"):
        load_checkpoint(Source(str(folder)))
    config = folder / "transformer" / "config.json"
    config.write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match="not JSON"):
        load_checkpoint(Source(str(folder)))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_of_a_folder_that_are_none(checkpoint: Path, tmp_path: Path, part: str) -> None:
    """Both modules' files are looked at before any library opens them: some of /proc would be waited for."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        load_checkpoint(Source(str(folder)))
    file.unlink()
    file.symlink_to("/proc/self/status")
    with pytest.raises(CheckpointError, match=r"safetensors: is a link out of .*checkpoint; put a copy"):
        load_checkpoint(Source(str(folder)))


@pytest.mark.parametrize("part", ["model_index.json", "transformer", "transformer/config.json", "scheduler", "vae"])
def test_links_out_of_a_folder(checkpoint: Path, tmp_path: Path, part: str) -> None:
    """What the maker of a folder does not have is not read from the disk of whoever exports; links inside it are."""
    folder, inside = tmp_path / "checkpoint", tmp_path / "checkpoint" / "kept"
    shutil.copytree(checkpoint, folder)
    (folder / part).rename(inside)
    (folder / part).symlink_to(inside)
    assert load_checkpoint(Source(str(folder))).model.classes == 10
    inside.rename(tmp_path / "outside")
    (folder / part).unlink()
    (folder / part).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=f"{part}: is a link out of .*checkpoint; put a copy"):
        load_checkpoint(Source(str(folder)))
