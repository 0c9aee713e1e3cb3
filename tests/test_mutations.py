"""Files that others may have changed: real ones with one thing changed end in a DiTError of one line, or are read.

Each test takes a file as the product writes it and changes every value in every way of ``support.mutations``: a few
changes everyday, many with ``make fuzz``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engines import info_of
from support.mutations import Mutation, mutate

from dit_engines.audit import Audit, ProfileAudit
from dit_engines.build import graphs_of
from dit_engines.build_host import BuildHost
from dit_engines.engine_store import (
    BuiltGraph,
    explain_rebuild,
    find_engine,
    find_timing_cache,
    find_twin,
    identity_of,
    sidecar_of,
    write_sidecar,
)
from dit_engines.recipe import profiles_of, recipe_for
from dit_runtime import Pipeline
from dit_runtime.backends.prepared import Facts, _describe_other, find_prepared, prepare_graph
from dit_runtime.backends.tensorrt.memory import check_engine
from dit_runtime.backends.tensorrt.store import SIDECAR, read_engines
from dit_runtime.bundle.reader import MANIFEST, Bundle, open_bundle
from dit_runtime.commands.info import bundle_info, format_info
from dit_runtime.core.errors import DiTError
from dit_runtime.output.provenance import BatchPosition, entries_from_text, entry_from_request, text_from_entries
from dit_runtime.output.request import DecodeSettings
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.fitted import FittedFor, HeldOut
from dit_runtime.samplers.schedule import read_table, skip_steps, write_table
from dit_runtime.verify import speed
from dit_runtime.verify.results import Results
from dit_runtime.verify.results_reader import read_results
from dit_runtime.verify.rung import Rung, Verification
from dit_runtime.verify.verdicts import has_passed, path_of_verdict, read_verdicts, store_verdict

EXAMPLES = int(os.environ.get("DIT_FUZZ_EXAMPLES", "20"))  # of each kind of file
SECONDS = 10  # measured: 0.3 s for the slowest
LONGEST = 1000  # characters of a message, with the name of a file in it

few = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
RUNGS = [
    Rung("blocks", 0.5, 1.0, "relative", "block 1", 1.5, 2.0, None, {"max_abs": 0.25}, "block", {"error": [0.5, 0.25]}),
    Rung("image", math.inf, 30.0, "dB", metrics={"ssim": 1.0}),
]
ENGINE: Any = SimpleNamespace(info=info_of("an engine", identity="this very one"))


def end(signum: int, frame: FrameType | None) -> NoReturn:
    raise BaseException("longer than any file may take")


def ends_well(name: str, read: Callable[[], object]) -> bool:
    """Whether what was changed is still read; anything but that or a DiTError of one line fails, and so does a hang."""
    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        read()
    except DiTError as error:
        message = str(error)
        assert len(message) <= LONGEST, (name, message)
        assert message.isprintable(), (name, message)
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return True


class Document:
    """A real file, what reads it, and all its mutations."""

    def __init__(self, path: Path, read: Callable[[], object]) -> None:
        self.path, self.read, self.text = path, read, path.read_text(encoding="utf-8")
        assert ends_well("as it was written", read)

    @functools.cached_property
    def mutations(self) -> list[Mutation]:
        return list(mutate(json.loads(self.text)))

    def check(self, mutation: Mutation) -> None:
        self.path.write_text(mutation.text, encoding="utf-8")
        ends_well(mutation.name, self.read)

    def check_some(self, data: st.DataObject) -> None:
        self.check(data.draw(st.sampled_from(self.mutations)))

    def check_cuts(self, data: st.DataObject) -> None:
        """The text cut anywhere, or with another byte anywhere."""
        content, at = self.text.encode(), data.draw(st.integers(0, len(self.text) - 1))
        byte = data.draw(st.sampled_from((b"", b"\0", b'"', b"[", b"}", b"9", b"\xff", b"\\")))
        self.path.write_bytes(content[:at] + byte + (content[at + 1 :] if byte else b""))
        ends_well(f"byte {at}: {byte!r}", self.read)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Iterator[Path]:
    """A copy of the bundle, whose files are changed."""
    path = tmp_path_factory.mktemp("mutations") / "copied.bundle"
    shutil.copytree(bundles["fp32"], path, ignore=shutil.ignore_patterns("engines"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Iterator[Document]:
    def read() -> None:
        bundle = open_bundle(folder)
        format_info(folder, bundle_info(bundle))
        json.dumps(bundle_info(bundle), allow_nan=False)
        for size in bundle.manifest.image_sizes:
            speed.make_step_inputs(bundle.at(size).manifest)
        pipe = Pipeline(bundle, "onnxruntime", threads=1)
        pipe.prepare([0], [1])
        pipe.prepare([0], [1], steps=2, negative_label=0)

    document = Document(folder / MANIFEST, read)
    yield document
    document.path.write_text(document.text, encoding="utf-8")


@given(st.data())
@few
def test_manifests(manifest: Document, data: st.DataObject) -> None:
    """A manifest is refused or every command can go on with it as far as the graphs."""
    manifest.check_some(data)


@given(st.data())
@few
def test_cut_manifests(manifest: Document, data: st.DataObject) -> None:
    """Damage that knows nothing of JSON ends as well."""
    manifest.check_cuts(data)


def store_of(bundle: Bundle, store: Path) -> tuple[Path, Callable[[], object]]:
    """An engine in a store as ``dit-build`` writes it, with plans of nothing; and all that reads stores."""
    host, recipe = BuildHost("tensorrt_rtx", "1.7.1", "8.9"), recipe_for("rtx", "8.9", 4, (1, 2), 64)
    graphs = graphs_of(bundle)
    identity = identity_of(bundle, recipe, host, graphs, None)
    folder = store / "rtx-sm89-0123456789ab"
    folder.mkdir(parents=True)
    built = []
    for name in graphs:
        profiles = profiles_of(bundle.manifest.graphs[name], recipe, bundle.manifest)
        audit = Audit(7, [ProfileAudit(5, 1, 2, 3, 1, 9, {"Half": 8}, {"Float": 2}) for _ in profiles])
        (folder / f"{name}.plan").write_bytes(b"plan")
        built.append(BuiltGraph(name, f"{name}.plan", 4, sha256(b"plan").hexdigest(), 1.5, tuple(profiles), audit))
    (folder / "timing.cache").write_bytes(b"cache")
    write_sidecar(folder, sidecar_of(bundle, recipe, host, identity, built, "c" * 64))

    def read() -> None:
        damaged: list[str] = []
        for engine in read_engines(bundle, store, damaged.append):
            engine.profiles(bundle.manifest)
            engine.tile_for(bundle.manifest.model.latent_size)
            with contextlib.suppress(DiTError):
                check_engine(bundle.manifest, engine, 1 << 30)
        assert all(len(line) <= LONGEST and line.isprintable() for line in damaged)
        find_engine(folder, recipe)
        find_twin(store, identity, recipe)
        find_timing_cache(store, host)
        assert all(len(line) <= LONGEST for line in explain_rebuild(store, identity))

    return folder / SIDECAR, read


@pytest.fixture(scope="module")
def sidecar(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Document:
    return Document(*store_of(open_bundle(bundles["fp32"]), tmp_path_factory.mktemp("store")))


@given(st.data())
@few
def test_sidecars(sidecar: Document, data: st.DataObject) -> None:
    """A store with any sidecar is read: its engine is used, refused in one line, or left out."""
    sidecar.check_some(data)


@pytest.fixture(scope="module")
def verdict(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Document:
    bundle = open_bundle(bundles["fp32"], tmp_path_factory.mktemp("verdicts"))
    store_verdict(bundle, ENGINE, RUNGS, quick=False)

    def read() -> None:
        has_passed(bundle, ENGINE)
        read_verdicts(bundle)
        info = bundle_info(bundle)
        json.dumps(info, allow_nan=False)
        format_info(bundle.path, info)

    return Document(path_of_verdict(bundle, ENGINE), read)


@given(st.data())
@few
def test_verdicts(verdict: Document, data: st.DataObject) -> None:
    """A verdict counts or does not, and ``--info`` lists it or does not."""
    verdict.check_some(data)


@pytest.fixture(scope="module")
def speeds(tmp_path_factory: pytest.TempPathFactory) -> Document:
    path = tmp_path_factory.mktemp("speeds") / "speeds.json"
    path.write_text(json.dumps([{"name": "openvino", "precision": "bf16", "engine": "x", "step_ms": 2.5}]))
    return Document(path, lambda: speed.sort_by_speed(speed._read(path, path.parent) or []))


@given(st.data())
@few
def test_speeds(speeds: Document, data: st.DataObject) -> None:
    """The record of speeds is used, or they are measured anew."""
    speeds.check_some(data)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Document:
    folder = tmp_path_factory.mktemp("prepared") / "backend"
    facts = Facts("b", "graphs/step.onnx", {"weights": "packed"}, "1", "p", ("avx2",))
    made = prepare_graph(folder, facts, lambda path: (path / "model").touch())
    assert made is not None

    def read() -> None:
        find_prepared(folder, facts)
        _describe_other(folder, replace(facts, version="2"))

    return Document(made.folder / "prepared.json", read)


@given(st.data())
@few
def test_prepared_graphs(prepared: Document, data: st.DataObject) -> None:
    """A prepared graph is used as it was written, or made again."""
    prepared.check_some(data)


@pytest.fixture(scope="module")
def table(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Document:
    made, pipe = open_bundle(bundles["fp32"]).manifest, Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    path = tmp_path_factory.mktemp("table") / "table.json"
    held_out = HeldOut(6, 36.3, 33.0, 39.9, 0.05, "unipc karras", 23.1)
    fitted = FittedFor(
        *(pipe.bundle.digest, "tiny", (32, 32), "ddim:200", "leading", (1.5, 4.0), (0.0, 1.0), (1, 2), 0, "an engine"),
        *("1.0", held_out),
    )
    write_table(replace(schedule_for("ddim", made.model, made.diffusion, 3), fitted=fitted), path)

    def read() -> None:
        schedule = read_table(path)
        skip_steps(schedule, 1)
        pipe.prepare([0], [1], sampler=schedule)

    return Document(path, read)


@given(st.data())
@few
def test_tables(table: Document, data: st.DataObject) -> None:
    """A sampler table is refused, or every row of it can run."""
    table.check_some(data)


@pytest.fixture(scope="module")
def record(bundles: dict[str, Path]) -> dict[str, str]:
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    images = pipe.prepare([1, 2], [3, 4], sampler="ddim", steps=2)
    position = [BatchPosition(2, index, (2, 2)) for index in range(2)]
    entries = [
        entry_from_request(pipe, image, 0.0, DecodeSettings(), place)
        for image, place in zip(images, position, strict=True)
    ]
    return text_from_entries(entries, np.zeros((8, 8, 3), np.uint8))


@functools.cache
def _mutations_of(record: tuple[tuple[str, str], ...]) -> list[tuple[str, Mutation]]:
    return [(key, mutation) for key, text in record for mutation in mutate(json.loads(text))]


def mutations_of(record: dict[str, str]) -> list[tuple[str, Mutation]]:
    """Of every value of a record: its key, and the mutation."""
    return _mutations_of(tuple(record.items()))


@given(st.data())
@few
def test_records_of_images(record: dict[str, str], data: st.DataObject) -> None:
    """What a PNG file says of itself is refused, or the image's request can be made of it."""
    key, mutation = data.draw(st.sampled_from(mutations_of(record)))
    text = {**record, key: mutation.text}
    ends_well(
        f"{key}: {mutation.name}",
        lambda: [BatchPosition.from_json(entry["batch"]) for entry in entries_from_text(Path("image.png"), text)],
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Document:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    verification = Verification(
        "d" * 64, "DiT", "fp16", "diffusers", "an engine", (8, 8), False, tuple(RUNGS), (pixels, pixels), {"final": 2.0}
    )  # fmt: skip
    made = Results(verification, ((8, 8),), {"system": "Linux"}, {"libraries": {"numpy": "2"}}, {"a": "0" * 64})
    path = tmp_path_factory.mktemp("results") / "results.json"
    path.write_text(json.dumps(made.as_json(), allow_nan=False))
    return Document(path, lambda: json.dumps(read_results(path).as_json(), allow_nan=False))


@given(st.data())
@few
def test_results(results: Document, data: st.DataObject) -> None:
    """Results are refused, or a page can be made of them."""
    results.check_some(data)
