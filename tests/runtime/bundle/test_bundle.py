"""A bundle is untrusted until checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hub_cache import snapshot_from_folder

from dit_runtime.backends.open import open_engine
from dit_runtime.bundle import reader
from dit_runtime.bundle.manifest import manifest_from_json
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core import replace
from dit_runtime.core.errors import BundleError
from dit_runtime.core.replace import replace_folder
from dit_runtime.pipeline import Pipeline
from dit_runtime.verify.speed import make_step_inputs


@pytest.fixture
def copied(bundles: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["fp32"], tmp_path / "copied.bundle", ignore=shutil.ignore_patterns("engines")))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_the_manifest_survives_a_round_trip(bundles: dict[str, Path]) -> None:
    """Reading and writing the manifest loses nothing: betas stay float64 to the last bit."""
    manifest = open_bundle(bundles["fp16"]).manifest
    assert manifest_from_json(json.loads(manifest.to_json())) == manifest
    assert len(manifest.diffusion.betas) == 1000
    assert manifest.diffusion.betas[-1] == 0.02
    assert manifest.precision.keep_fp32 == ("patch_embed", "final")


def test_every_file_is_vouched_for_and_nothing_else_is_there(bundles: dict[str, Path]) -> None:
    """The manifest lists exactly the files of the bundle, engines apart."""
    bundle = open_bundle(bundles["fp32"])
    bundle.check()
    found = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()}
    assert {name for name in found if not name.startswith("engines/")} == {*bundle.manifest.files, "manifest.json"}


@pytest.mark.parametrize("name", ["graphs/step.weights", "graphs/decoder.onnx", "golden/ddim.npz"])
def test_an_altered_missing_or_short_file(copied: Path, name: str) -> None:
    """One flipped bit, a lost byte or a lost file is found before the file is opened."""
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"altered \(SHA-256"):
        open_bundle(copied).file(name)
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"bytes, expected \d+"):
        open_bundle(copied).file(name)
    path.unlink()
    with pytest.raises(BundleError, match="missing, but named in manifest"):
        open_bundle(copied).file(name)


def test_a_link_out_of_the_bundle(copied: Path, tmp_path: Path) -> None:
    """A file that is a link to elsewhere is refused, even with the right content."""
    path = copied / "graphs" / "step.onnx"
    shutil.move(path, tmp_path / "elsewhere.onnx")
    path.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="link out of the bundle"):
        open_bundle(copied).file("graphs/step.onnx")


def test_a_bundle_in_a_hub_cache(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Its files are links to blobs: it opens, its graphs have plain files, and nothing is copied."""
    snapshot = snapshot_from_folder(bundles["fp32"], tmp_path)
    bundle = open_bundle(snapshot)
    bundle.check()
    for _ in range(2):
        for name, spec in bundle.manifest.graphs.items():
            path = bundle.graph(name)
            for file, link in ((path, spec.file), (path.with_name(Path(spec.weights).name), spec.weights)):
                assert not file.is_symlink()
                assert file.samefile(snapshot / link)
    cached, own = (Pipeline(path, "onnxruntime", threads=1) for path in (snapshot, bundles["fp32"]))
    assert np.array_equal(cached(3, steps=2), own(3, steps=2))


def test_a_hub_cache_that_cannot_be_linked(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store on another file system has copies, made anew where they were altered; one that is read-only has none."""

    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    snapshot = snapshot_from_folder(bundles["fp32"], tmp_path / "cache")
    bundle = open_bundle(snapshot, tmp_path / "store")
    for _ in range(2):
        path = bundle.graph("decoder")
        assert path.is_relative_to(tmp_path / "store")
        assert path.read_bytes() == (snapshot / "graphs" / "decoder.onnx").read_bytes()
        path.write_bytes(b"altered")
    (tmp_path / "file").touch()
    assert open_bundle(snapshot, tmp_path / "file" / "store").graph("decoder") == snapshot / "graphs" / "decoder.onnx"


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "link out of"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to(path.name), r"link out of the bundle|not a bundle \("),
    ],
    ids=["pipe", "device", "folder", "loop"],
)
@pytest.mark.parametrize("name", ["manifest.json", "graphs/step.onnx"])
def test_a_file_that_is_no_regular_file(copied: Path, name: str, replace: Callable[[Path], None], message: str) -> None:
    """Fails by waiting for a pipe's other end, or by reading a device without end."""
    (copied / name).unlink()
    replace(copied / name)
    with pytest.raises(BundleError, match=message):
        open_bundle(copied).file(name)


def test_a_store_that_is_a_link_out_of_the_bundle(copied: Path, tmp_path: Path) -> None:
    """Who made a bundle does not choose a folder elsewhere that commands write to."""
    (tmp_path / "elsewhere").mkdir()
    (copied / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"engines: is a link out of the bundle; remove it, or .* with --store"):
        open_bundle(copied)
    assert open_bundle(copied, tmp_path / "elsewhere").engines == tmp_path / "elsewhere"


def test_other_names_of_a_caches_files_lie_in_the_store(copied: Path, tmp_path: Path) -> None:
    """Fails by making them where a link in the store leads."""
    snapshot, store, elsewhere = snapshot_from_folder(copied, tmp_path / "hub"), tmp_path / "store", tmp_path / "out"
    named = open_bundle(snapshot, store).graph("step")
    assert named.is_relative_to(store)
    shutil.move(store / "plain", elsewhere)
    for file in [path for path in elsewhere.rglob("*") if path.is_file()]:
        file.unlink()
    (store / "plain").symlink_to(elsewhere)
    assert open_bundle(snapshot, store).graph("step").is_relative_to(snapshot)
    assert not [path for path in elsewhere.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "none", "../none"])
def test_a_name_that_no_bundle_has(tmp_path: Path, name: str) -> None:
    """Any text on the command line is a name that is not there."""
    with pytest.raises(BundleError, match="no such bundle"):
        open_bundle(tmp_path / name)


CALIBRATED = {"seed": 0, "labels": [0, 9], "sampler": "ddim", "steps": 50, "guidance": 1.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["precision"].update(name="int8"), "precision int8 without calibration"),
        (
            lambda m: m["precision"].update(keep_fp16=["blocks.0"]),
            "units to keep in FP16, which only INT8 and FP8 have",
        ),
        (lambda m: m.update(calibration=CALIBRATED), "with calibration"),
        (lambda m: m["precision"].update(name="fp8"), "precision fp8 without calibration"),
        (lambda m: m["precision"].update(name="fp4"), "precision.name"),
        (lambda m: m.update(schema=99), "schema 99, this version reads 5"),
        (
            lambda m: m.pop("model"),
            "damaged manifest .model: missing, expected an object.; copy or export the bundle again",
        ),
        (lambda m: m["model"].update(depth=0), "model.depth: got 0, expected a whole number from 1"),
        (lambda m: m.pop("schema"), "not a manifest .schema: missing"),
        (lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0"}}), "passwd. leads outside"),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0"}}), "leads outside the bundle"),
        (lambda m: m["graphs"].pop("step"), "no graph 'step'"),
        (lambda m: m["graphs"]["step"].update(file="graphs/other.onnx"), "has no hash"),
        (lambda m: m["diffusion"].update(betas=[0.1, 2.0]), "betas must lie between 0 and 1"),
        (lambda m: m["model"].update(heads=3), "3 heads do not divide width 64"),
        (lambda m: m["model"].update(patch_size=3), "patch size 3 does not divide size 8x8"),
        (lambda m: m["model"].update(latent_channels=8), "graphs.step.inputs: state is 'float32' .*expected float32"),
        (lambda m: m["model"].update(depth=3), "graphs.conditioner.outputs: modulation is .*, expected .*20, 64"),
        (lambda m: m["model"].update(width=128), r"modulation is .*expected float32 \['rows', 14, 128\]"),
        (lambda m: m["model"].update(mlp_width=1 << 20), "the step's files have .* bytes, expected 134217728 at least"),
        (
            lambda m: (m["model"].update(classes=1 << 20), m.update(class_names=[])),
            "the conditioner's files have .* bytes, expected 134217728",
        ),
        (lambda m: m["model"].update(conditioning="in-context"), "conditioner.outputs: got .*expected .'tokens'"),
        (lambda m: m["model"].update(latent_size=[16, 16]), "sizes .* do not begin with"),
        (lambda m: m["sizes"].append([8, 8]), "name a size twice"),
        (lambda m: m["sizes"].append([8, 16]), "no graph 'step-8x16'"),
        (lambda m: m["sizes"].append([65536, 65536]), "size 65536x65536 with 4 channels is more than one image's"),
        (lambda m: m["autoencoder"].update(factor=8), "graphs.decoder.outputs: images is"),
        (lambda m: m["diffusion"].update(guidance_channels=5), "guidance on 5 channels of 4 latent channels"),
        (lambda m: m["diffusion"].update(steps_offset=-1001), "steps_offset -1001 for 1000 training timesteps"),
        (lambda m: m["diffusion"].update(timestep_spacing="\ufeff"), "timestep spacing .*, expected one of default"),
        (lambda m: m["diffusion"].update(prediction_type="x"), "prediction type 'x', expected one of epsilon"),
        (lambda m: m["diffusion"].update(betas=[0.1] * 10_001), "10001 betas"),
        (lambda m: m["graphs"].update(other=m["graphs"]["step"]), "unknown graph 'other'"),
        (lambda m: m["graphs"]["decoder"]["inputs"][0]["shape"].append(4 * 10**12), "decoder.inputs: latents is"),
        (lambda m: m["graphs"]["conditioner"]["outputs"][0].update(dtype="O"), "expected one table of float32"),
        (lambda m: m["graphs"]["probe"]["outputs"].pop(), "graphs.probe.outputs: got .*, expected"),
        (lambda m: m["files"]["graphs/step.onnx"].update(sha256="A" * 64), "expected 64 hexadecimal digits"),
        (lambda m: m["files"].update({"a\0b": {"bytes": 1, "sha256": "0" * 64}}), "text without control characters"),
        (lambda m: m["diffusion"]["betas"].__setitem__(0, 5e-324), "damaged manifest .betas must lie"),
        (lambda m: m["defaults"].update(sampler="a" * 501), "of 501 characters, expected 500 at most"),
        (lambda m: m["model"].update(extra=1), "model.extra: unknown, expected only conditioning"),
    ],
)
def test_a_manifest_that_does_not_hold_together(
    copied: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """Unknown schema, missing parts and paths that lead outside are one clear error."""
    edit(copied, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(copied)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    """Whatever the manifest's bytes, reading ends in a BundleError and nothing else."""
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        open_bundle(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    """A missing folder and a folder without a manifest say how to make a bundle."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BundleError, match="make one with dit-export"):
            open_bundle(path)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_replaced_while_an_engine_opens_it(
    name: str, copied: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export after the check of the hashes: the library would read the graph of one bundle, weights of another."""
    bundle = open_bundle(copied)
    engine = open_engine(bundle, name, threads=1)
    check = Bundle._check_file

    def check_and_replace(self: Bundle, file: str) -> Path:
        found = check(self, file)
        if file == self.manifest.graphs["step"].file:
            with replace_folder(copied) as folder:
                shutil.copytree(bundles["fp16"], folder, dirs_exist_ok=True)
        return found

    monkeypatch.setattr(Bundle, "_check_file", check_and_replace)
    with pytest.raises(BundleError, match=r"copied.bundle: was replaced by another export while it was in use; run"):
        engine.session("step").run(make_step_inputs(bundle.manifest), ["denoised"])


def test_replaced_after_it_was_opened(copied: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is not damaged, so it is not called altered; a record of the other bundle is not taken for its own."""
    bundle, load = open_bundle(copied), reader.arrays_from_npz

    def replace_and_load(*arguments: Any) -> Any:
        with replace_folder(copied) as folder:
            shutil.copytree(bundles["fp16"], folder, dirs_exist_ok=True)
        return load(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "arrays_from_npz", replace_and_load)
        with pytest.raises(BundleError, match="was replaced by another export"):
            bundle.records("ddim")
    with pytest.raises(BundleError, match="was replaced by another export"):
        bundle.file("graphs/step.weights")
    assert open_bundle(copied).digest == open_bundle(bundles["fp16"]).digest


def test_a_bundle_that_was_set_aside(copied: Path) -> None:
    """Whoever opens a bundle next puts it back after an export was killed between two renames."""
    digest = open_bundle(copied).digest
    copied.rename(replace._name_beside(copied, replace.OLD))
    assert open_bundle(copied).digest == digest
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]
