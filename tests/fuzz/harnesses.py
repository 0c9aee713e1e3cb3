"""One reader under a coverage-guided fuzzer: ``python tests/fuzz/harnesses.py NAME SECONDS FOLDER BUNDLES``.

atheris changes the bytes of real files so that new lines of the readers run. A reader may give a value or one of its
own errors, of one bounded line; anything else, a hang or 2 GB of memory ends the run, and the bytes stay in
``FOLDER/found``.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' support

CHECKPOINTS = [f"dit_export.checkpoints.{name}" for name in ("weights", "torch_files", "allowlist_unpickler")]
with atheris.instrument_imports(include=["dit_runtime", "dit_engines", *CHECKPOINTS]):
    from dit_export.checkpoints.weights import weights_from_file

    from dit_runtime.bundle.consistency import check_consistency
    from dit_runtime.bundle.manifest import FileSpec, manifest_from_json
    from dit_runtime.bundle.reader import Bundle, open_bundle
    from dit_runtime.core.decode import DecodeError, json_from_bytes
    from dit_runtime.core.errors import DiTError
    from dit_runtime.output.inputs import read_input_files, read_recorded_file
    from dit_runtime.output.request import InputPaths
    from dit_runtime.samplers.schedule import read_table

LONGEST = 1000  # characters of a message
LARGEST = 1 << 16  # bytes of an input


class Harness(NamedTuple):
    """What reads the bytes, real files to begin with, and its errors besides DiTError."""

    read: Callable[[bytes], object]
    seeds: list[bytes]
    errors: tuple[type[Exception], ...] = ()


def make_harness(name: str, bundles: Path, folder: Path) -> Harness:
    """The harness of a name of ``fuzz.run.NAMES``; ``folder`` is for the files that it reads."""
    bundle = open_bundle(bundles / "fp32.bundle")
    seeds = list(_seeds_of(name, bundle, bundles, folder))
    file = folder / f"it{SUFFIXES.get(name, '.json')}"

    def from_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        return lambda content: (file.write_bytes(content), read(file))

    if name == "decode":
        return Harness(json_from_bytes, seeds, (DecodeError,))
    if name == "manifest":
        return Harness(
            lambda content: check_consistency(manifest_from_json(json_from_bytes(content))), seeds, (ValueError,)
        )
    if name in ("graph", "golden"):
        return Harness(_reader_in_bundle(name, bundle, folder), seeds)
    reads: dict[str, Callable[[Path], object]] = {
        "table": read_table,
        "record": read_recorded_file,
        "noise": lambda path: read_input_files(InputPaths(noise=path)),
        "safetensors": weights_from_file,
    }
    return Harness(from_file(reads[name]), seeds)


SUFFIXES = {"record": ".png", "noise": ".npy", "safetensors": ".safetensors"}


def _seeds_of(name: str, bundle: Bundle, bundles: Path, folder: Path) -> Iterator[bytes]:
    path = folder / f"seed{SUFFIXES.get(name, '.json')}"
    if name in ("decode", "manifest"):
        manifest = bundle.manifest
        few = replace(manifest, diffusion=replace(manifest.diffusion, betas=manifest.diffusion.betas[:4]))
        yield few.to_json().encode()
        yield b'{"a": [1, -2.5e3, "\\u00e9\\\\\\"[", null, true, {"b": {}}]}'
    if name == "table":
        from dit_runtime.samplers.by_name import schedule_for
        from dit_runtime.samplers.schedule import write_table

        write_table(schedule_for("ddim", bundle.manifest.model, bundle.manifest.diffusion, 3), path)
        yield path.read_bytes()
    if name == "record":
        from support.commands import run_command

        done = run_command(
            *("dit-sample", bundle.path, "--engine", "onnxruntime", "--threads", "1"),
            *("--labels", "1", "--steps", "2", "-o", path),
        )
        assert done.returncode == 0, done.stderr
        yield path.read_bytes()
    if name == "noise":
        import numpy as np

        np.save(path, np.zeros((1, 4, 8, 8), np.float32))
        yield path.read_bytes()
    if name == "graph":
        yield bundle.graph("conditioner").read_bytes()
        yield bundle.graph("step").read_bytes()
    if name == "golden":
        yield bundle.file("golden/forward_1.npz").read_bytes()
    if name == "safetensors":
        found = sorted((bundles / "checkpoint").rglob("*.safetensors"), key=lambda item: item.stat().st_size)
        yield found[0].read_bytes()[:LARGEST]


def _reader_in_bundle(name: str, bundle: Bundle, folder: Path) -> Callable[[bytes], object]:
    """Reads a file in a bundle whose manifest has the hash of whatever the file holds."""
    graph = bundle.manifest.graphs["conditioner"]
    file = graph.file if name == "graph" else "golden/forward_1.npz"
    for part in (file, graph.weights):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
    weights = bundle.file(graph.weights).read_bytes()
    (folder / graph.weights).write_bytes(weights)

    def read(content: bytes) -> object:
        (folder / file).write_bytes(content)
        spec = FileSpec(len(content), hashlib.sha256(content).hexdigest())
        made = replace(bundle.manifest, files={**bundle.manifest.files, file: spec})
        copied = Bundle(folder, made, "0" * 64)
        return copied.graph("conditioner") if name == "graph" else copied.records("forward_1")

    return read


def run(name: str, seconds: int, folder: Path, bundles: Path) -> None:
    """Fuzz one reader; it ends the process."""
    corpus, found = folder / "corpus" / name, folder / "found"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        harness = make_harness(name, bundles, Path(temporary))
        for index, seed in enumerate(harness.seeds):
            (corpus / f"seed-{index}").write_bytes(seed)

        def check(content: bytes) -> None:
            try:
                harness.read(content)
            except (DiTError, *harness.errors) as error:
                if len(str(error)) > LONGEST:
                    raise AssertionError(f"a message of {len(str(error))} characters") from error

        options = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", f"-max_len={LARGEST}"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={found}/{name}-", str(corpus)], check)
        atheris.Fuzz()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
