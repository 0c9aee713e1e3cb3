"""The commands that write, stopped at each of their file operations: ``python -m support.writers BUNDLES EVERY NAME…``.

They run in a process of their own, which forks: an engine's threads do not come along. A build compiles nothing and an
export traces nothing; both write their files as the commands do.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from dit_runtime.bundle.reader import GOLDEN, Bundle, open_bundle
from dit_runtime.core import replace as replacing
from support.stops import run_forked, stop_everywhere


class Writer(NamedTuple):
    """The arguments of ``stop_everywhere``."""

    work: Callable[[], object]
    reset: Callable[[], object]
    check: Callable[[], object]


def replaced_file(bundles: Path, folder: Path) -> Writer:
    """One file over an older one."""
    path = folder / "out.txt"

    def check() -> None:
        assert path.read_text() in ("old", "new")

    def work(text: str) -> None:
        with replacing.replace_file(path) as file:
            file.write_text(text)

    return Writer(lambda: work("new"), reset_to(folder, lambda: work("old")), check)


def new_file(bundles: Path, folder: Path) -> Writer:
    """One file in a new folder."""
    path = folder / "in" / "out.txt"

    def check() -> None:
        assert not path.exists() or path.read_text() == "new"

    def work() -> None:
        with replacing.replace_file(path) as file:
            file.write_text("new")

    return Writer(work, lambda: clear(folder), check)


def replaced_folder(bundles: Path, folder: Path) -> Writer:
    """A folder over an older one."""
    target = folder / "out"

    def check() -> None:
        found = {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()}
        assert found in ({"in/b": "old"}, {"a": "new", "in/b": "new"})

    def write(files: dict[str, str]) -> None:
        with replacing.replace_folder(target) as temporary:
            (temporary / "in").mkdir()
            for name, text in files.items():
                (temporary / name).write_text(text)

    first = reset_to(folder, lambda: write({"in/b": "old"}))
    return Writer(lambda: write({"a": "new", "in/b": "new"}), first, check)


def replaced_without_exchange(bundles: Path, folder: Path) -> Writer:
    """As on NFS, macOS or an old glibc: who reads the folder next puts it back."""
    replacing.exchange = lambda *_: False
    work, reset, check = replaced_folder(bundles, folder)

    def recover_and_check() -> None:
        replacing.recover_folder(folder / "out")
        check()

    return Writer(work, reset, recover_and_check)


def new_folder(bundles: Path, folder: Path) -> Writer:
    """A folder where nothing was."""

    def check() -> None:
        assert not (folder / "out").exists() or (folder / "out" / "a").read_text() == "new"

    def work() -> None:
        with replacing.replace_folder(folder / "out") as temporary:
            (temporary / "a").write_text("new")

    return Writer(work, lambda: clear(folder), check)


def prepared_graph(bundles: Path, folder: Path) -> Writer:
    """A backend's own form of a graph, in an empty store."""
    from dit_runtime.backends.prepared import SIDECAR, Facts, load_prepared

    facts = Facts("b", "graphs/step.onnx", {}, "1", "p", ())

    def make(target: Path) -> None:
        (target / "weights").write_text("1 2 3")

    def read(target: Path) -> str:
        return (target / "weights").read_text()

    def check() -> None:
        for sidecar in (folder / "store").glob(f"[!.]*/{SIDECAR}"):
            assert read(sidecar.parent) == "1 2 3"

    def work() -> None:
        assert load_prepared(folder / "store", facts, make, read) == "1 2 3"

    return Writer(work, lambda: clear(folder), check)


def shard_record(bundles: Path, folder: Path) -> Writer:
    """What says how a folder's shards are made, in a new folder."""
    from dit_runtime.output import shard_record

    record = {"steps": 1}

    def check() -> None:
        assert shard_record.read_record(folder / "out" / shard_record.RECORD) in (None, record)

    return Writer(lambda: shard_record.claim_folder(folder / "out", record), lambda: clear(folder), check)


def sample(output: str, bundle: Bundle, folder: Path) -> Writer:
    """An image over an older one, or a folder with one image there already."""
    from dit_runtime.commands.sample import main
    from dit_runtime.output.images import read_png

    def run(*labels: str) -> None:
        main(
            [
                *(str(bundle.path), "--labels", *labels, "--steps", "1", "--engine", "onnxruntime", "--threads", "1"),
                *("-o", str(folder / output)),
            ]
        )

    def read() -> dict[str, bytes]:
        files = [folder / output] if output.endswith(".png") else sorted((folder / output).glob("[!.]*"))
        return {file.name: read_png(file)[0].tobytes() for file in files}

    reset = reset_to(folder, lambda: run("0"))
    old = read()
    assert run_forked(lambda: run("0", "1")) == (0, False)
    new = read()

    def check() -> None:
        found = read()
        assert old.keys() <= found.keys() <= new.keys()
        assert all(pixels in (old.get(name), new[name]) for name, pixels in found.items())

    return Writer(lambda: run("0", "1"), reset, check)


def sample_file(bundles: Path, folder: Path) -> Writer:
    return sample("out.png", open_bundle(bundles / "fp32.bundle"), folder)


def sample_folder(bundles: Path, folder: Path) -> Writer:
    return sample("out", open_bundle(bundles / "fp32.bundle"), folder)


def sample_shards(bundles: Path, folder: Path) -> Writer:
    """A folder of shards with one of two there already."""
    from dit_runtime.commands.sample import main

    words = [
        *(str(bundles / "fp32.bundle"), "--labels", "0", "1", "--steps", "1", "--engine", "onnxruntime"),
        *("--threads", "1", "--shard-size", "1", "-o", str(folder / "out")),
    ]

    def read() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((folder / "out").glob("[!.]*"))}

    reset = reset_to(folder, lambda: main([*words, "--shard", "1/2"]))
    old = read()
    assert run_forked(lambda: main(words)) == (0, False)
    new = read()

    def check() -> None:
        assert read() in (old, new)

    return Writer(lambda: main(words), reset, check)


def table(bundles: Path, folder: Path) -> Writer:
    """``dit-sample --write-table``."""
    from dit_runtime.commands.sample import main
    from dit_runtime.samplers.schedule import read_table

    path = folder / "tables" / "ddim.json"

    def check() -> None:
        assert not path.exists() or read_table(path).steps == 4

    words = [str(bundles / "fp32.bundle"), "--write-table", str(path), "--steps", "4"]
    return Writer(lambda: main(words), lambda: clear(folder), check)


def tune(bundles: Path, folder: Path) -> Writer:
    """``dit-tune``: a table over one of another seed, and the teacher's latents in an empty store. Few are compared."""
    from dit_runtime.commands.tune import main
    from dit_runtime.samplers.schedule import read_table
    from dit_runtime.tuning import tune as tuning

    path, named = folder / "few.json", tuning.named_schedules
    tuning.named_schedules = lambda pipe, steps: list(named(pipe, steps))[:1]

    def run(seed: int) -> None:
        main(
            [
                *(str(bundles / "fp32.bundle"), "--steps", "2", "--teacher", "ddim:6", "--pictures", "4", "--seed"),
                *(str(seed), "--engine", "onnxruntime", "--threads", "1", "--store", str(folder / "store")),
                *("-o", str(path)),
            ]
        )

    def first() -> None:
        run(1)
        shutil.rmtree(folder / "store")

    reset = reset_to(folder, first)

    def read() -> bytes:
        return read_table(path).coefficients.tobytes()

    old = read()
    assert run_forked(lambda: run(0)) == (0, False)
    new = read()
    assert old != new

    def check() -> None:
        assert read() in (old, new)

    return Writer(lambda: run(0), reset, check)


def verify(bundles: Path, folder: Path) -> Writer:
    """``dit-verify``: a passing verdict over a failed one. What is measured was measured before."""
    from dit_runtime.commands import verify as command
    from dit_runtime.verify import verdicts
    from dit_runtime.verify.rung import Rung, Verification

    bundle = open_bundle(bundles / "fp32.bundle", folder / "store")
    rungs = [Rung("blocks", 0.5, 1.0, "relative")]

    def measured(at: Bundle, engine: Any, quick: bool = False) -> Verification:
        name, size = engine.info.name, at.manifest.image_size
        return Verification(at.digest, "model", "fp32", "reference", name, size, quick, tuple(rungs), None, {})

    verdicts.verification_of = measured

    def fail() -> None:
        rungs[0] = Rung("blocks", 2.0, 1.0, "relative")
        with pytest.raises(SystemExit):
            command.main(words)

    def check() -> None:
        assert len(verdicts.read_verdicts(bundle)) == 1

    words = [str(bundle.path), "--engine", "onnxruntime", "--store", str(folder / "store")]
    return Writer(lambda: command.main(words), reset_to(folder, fail), check)


def build(bundles: Path, folder: Path) -> Writer:
    """``dit-build``: an engine in the place of one whose plan is damaged."""
    from dit_engines import build as building
    from dit_engines import build_host, command
    from dit_engines.audit import Audit, ProfileAudit
    from dit_engines.build_host import BuildHost
    from dit_engines.engine_store import TIMING_CACHE, BuiltGraph
    from dit_engines.recipe import Recipe, profiles_of
    from dit_runtime.backends.tensorrt.store import read_engines
    from dit_runtime.core.files import sha256_of

    bundle, store = open_bundle(bundles / "fp16.bundle"), folder / "store"

    def compiled(
        bundle: Bundle, recipe: Recipe, host: BuildHost, graphs: tuple[str, ...], target: Path, *_: object
    ) -> tuple[BuiltGraph, ...]:
        built = []
        for graph in graphs:
            path = target / f"{graph}.plan"
            path.write_bytes(b"a plan")
            (target / TIMING_CACHE).write_bytes(b"a cache")
            profiles = tuple(profiles_of(bundle.manifest.graphs[graph], recipe, bundle.manifest))
            audit = Audit(6, [ProfileAudit(activation_bytes=1) for _ in profiles])
            built.append(BuiltGraph(graph, path.name, 6, sha256_of(path), 1.0, profiles, audit))
        return tuple(built)

    building.compile_graphs = compiled
    build_host.build_host_for = lambda *_, **__: BuildHost("tensorrt_rtx", "1.7.1", "8.9")
    words = [str(bundle.path), "--store", str(store), "--target", "rtx", "--batch", "1"]

    def damage() -> None:
        with pytest.raises(SystemExit):
            command.main(words)
        (found,) = read_engines(bundle, store)
        (found.folder / "step.plan").write_bytes(b"damage")

    def check() -> None:
        (found,) = read_engines(bundle, store)
        plans = {graph: (found.folder / f"{graph}.plan").read_bytes() for graph in found.graphs}
        assert set(plans) == {"conditioner", "step", "decoder"}
        assert plans.pop("step") in (b"damage", b"a plan")
        assert set(plans.values()) == {b"a plan"}

    return Writer(lambda: command.main(words), reset_to(folder, damage), check)


def export(bundles: Path, folder: Path) -> Writer:
    """An export over an older bundle, with the graphs and records of another."""
    from dit_export import bundle as exporting
    from dit_export.checkpoints.sources import Source
    from dit_export.reference.record_settings import Measurements

    from dit_runtime.bundle.manifest import GraphSpec

    old, new, output = open_bundle(bundles / "fp16.bundle"), open_bundle(bundles / "fp32.bundle"), folder / "my.bundle"

    def records(source: Source, target: Path, *_: object) -> Measurements:
        (target / GOLDEN).mkdir()
        copy(GOLDEN, target)
        return Measurements()

    def graphs(checkpoint: Any, precision: Any, target: Path, encoder: bool) -> Iterator[tuple[str, GraphSpec]]:
        (target / "graphs").mkdir()
        copy("graphs", target)
        yield from new.manifest.graphs.items()

    def copy(inner: str, target: Path) -> None:
        for name in [name for name in new.manifest.files if name.startswith(inner)]:
            with (target / name).open("wb") as file:
                file.write((new.path / name).read_bytes())

    exporting.load_checkpoint = lambda _: SimpleNamespace(model=None, autoencoder="tiny", sizes=new.manifest.sizes)
    exporting.check_units = lambda *_: None
    exporting.records_in_process, exporting.write_graphs = records, graphs
    exporting._make_manifest = lambda *_: replace(new.manifest, files={}, graphs={})

    def export_old() -> None:
        shutil.copytree(old.path, output, ignore=shutil.ignore_patterns("engines"))

    def check() -> None:
        found = open_bundle(output)
        found.check()
        assert found.digest in (old.digest, new.digest)

    def work() -> None:
        exporting.bundle_from_checkpoint(Source("tiny"), output, new.manifest.precision)

    return Writer(work, reset_to(folder, export_old), check)


PLAIN = (replaced_file, new_file, replaced_folder, replaced_without_exchange, new_folder, prepared_graph, shard_record)
COMMANDS = (sample_file, sample_folder, sample_shards, table, tune, verify, build, export)
WRITERS = {each.__name__: each for each in (*PLAIN, *COMMANDS)}


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def reset_to(folder: Path, first: Callable[[], object]) -> Callable[[], None]:
    """Puts what ``first`` writes into the folder. It writes once, in a process of its own."""
    assert run_forked(first) == (0, False)
    before = folder.parent / "before"
    folder.rename(before)

    def reset() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    reset()
    return reset


def main(bundles: str, every: str, *names: str) -> None:
    """Stop writers at one of so many operations; 1 is all."""
    step = int(every)
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "written"
            folder.mkdir()
            writer = WRITERS[name](Path(bundles), folder)
            total = stop_everywhere(*writer, folder, lambda number: number % step == step // 2)
        print(json.dumps({name: total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
