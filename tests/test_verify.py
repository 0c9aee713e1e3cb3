"""``dit-verify`` passes what is right and fails what is wrong, at the rung that says where."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run_command

from dit_runtime.bundle import Bundle, open_bundle
from dit_runtime.engines import OnnxRuntimeEngine
from dit_runtime.errors import ParityError
from dit_runtime.verdicts import store_verdict, stored_verdict, trusted_engine
from dit_runtime.verify import Rung, relative_error, verify


def failed(bundle: Bundle) -> list[str]:
    return [rung.name for rung in verify(bundle, OnnxRuntimeEngine(bundle, threads=1)) if not rung.passed]


@pytest.fixture
def tampered(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage; ``signed`` makes its manifest vouch for the damage, as a faulty exporter would."""
    return Path(shutil.copytree(bundles["fp32"], tmp_path / "tampered", ignore=shutil.ignore_patterns("engines")))


def signed(path: Path) -> Bundle:
    manifest = json.loads((path / "manifest.json").read_text())
    for name, spec in manifest["files"].items():
        content = (path / name).read_bytes()
        spec.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (path / "manifest.json").write_text(json.dumps(manifest))
    return open_bundle(path)


def edit_graph(path: Path, name: str, change) -> None:
    file = path / "graphs" / f"{name}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model.graph)
    onnx.save(model, file)


def test_a_good_bundle_passes(bundle_path: Path) -> None:
    """Both precisions match the reference on every rung."""
    assert failed(open_bundle(bundle_path)) == []


def test_a_wrong_layer_norm_epsilon(tampered: Path) -> None:
    """An eps of 1e-3 instead of 1e-6 in the last block's attention norm fails from the blocks upwards."""

    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.name == "blocks.1.norm1/LayerNormalization")
        next(a for a in node.attribute if a.name == "epsilon").f = 1e-3

    for name in ("step", "probe"):
        edit_graph(tampered, name, change)
    assert {"blocks", "forward G=1", "forward G=2"} <= set(failed(signed(tampered)))


def test_swapped_guidance_branches(tampered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Null and conditional branch exchanged: unguided rungs pass, guided ones fail."""
    from dit_runtime import verify as module

    original = module.branch_rows

    def swapped(labels, null, branches):
        conditions, rows = original(labels, null, branches)
        return conditions, rows[::-1]

    monkeypatch.setattr(module, "branch_rows", swapped)
    names = failed(open_bundle(tampered))
    assert "forward G=2" in names
    assert "forward G=1" not in names


def test_noise_of_another_seed(tampered: Path) -> None:
    """Recorded seeds that do not make the recorded noise fail the noise rung alone."""
    file = tampered / "golden" / "ddpm.npz"
    record = dict(np.load(file))
    np.savez(file, **{**record, "seeds": record["seeds"] + 1})
    assert failed(signed(tampered)) == ["ddpm noise"]


def test_an_off_by_one_timestep(tampered: Path) -> None:
    """Timesteps shifted by one in the sampler, with the network untouched, fail in the steps, not in the forward."""
    manifest = json.loads((tampered / "manifest.json").read_text())
    manifest["diffusion"]["steps_offset"] = 1
    (tampered / "manifest.json").write_text(json.dumps(manifest))
    names = failed(open_bundle(tampered))
    assert "ddim teacher-forced" in names
    assert not [name for name in names if name.startswith(("forward", "blocks", "ddpm"))]


def test_a_wrong_vae_scale(tampered: Path) -> None:
    """A wrong scaling factor fails the decoder and the picture, and nothing before them."""

    def change(graph: onnx.GraphProto) -> None:
        scale = next(node for node in graph.node if "latents" in node.input and node.op_type == "Mul")
        name = next(item for item in scale.input if item != "latents")
        tensor = next(item for item in graph.initializer if item.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.02), name))

    edit_graph(tampered, "decoder", change)
    names = failed(signed(tampered))
    assert "decoder" in names
    assert not [name for name in names if name.startswith(("forward", "blocks", "ddim", "ddpm"))]


def test_the_command_says_so_and_exits_with_1(tampered: Path) -> None:
    """The exit code and the table tell a failure; ``--json`` carries the same verdict."""
    edit = json.loads((tampered / "manifest.json").read_text())
    edit["diffusion"]["steps_offset"] = 1
    (tampered / "manifest.json").write_text(json.dumps(edit))
    done = run_command("dit-verify", tampered)
    assert done.returncode == 1
    assert "FAIL: ddim" in done.stdout
    done = run_command("dit-verify", tampered, "--json", "--quick")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert any(rung["name"] == "ddim free-running" and not rung["passed"] for rung in report["rungs"])


def test_auto_trusts_only_what_passed_here(tampered: Path, bundles: dict[str, Path]) -> None:
    """``auto`` verifies an engine without a verdict, keeps the verdict, and refuses an engine that failed."""
    bundle = open_bundle(bundles["fp32"])
    assert stored_verdict(bundle, trusted_engine(bundle)) is True
    manifest = json.loads((tampered / "manifest.json").read_text())
    manifest["diffusion"]["steps_offset"] = 1
    (tampered / "manifest.json").write_text(json.dumps(manifest))
    bad = open_bundle(tampered)
    for _ in range(2):  # the second time from the stored verdict
        with pytest.raises(ParityError, match="does not match the PyTorch reference"):
            trusted_engine(bad)


def test_a_quick_pass_does_not_replace_a_full_failure(tampered: Path) -> None:
    """``auto`` must not trust, after a quick verify, what the full one found wrong."""
    bundle = open_bundle(tampered)
    engine = OnnxRuntimeEngine(bundle)
    good, bad = Rung("blocks", 0.0, 1.0, "relative"), Rung("blocks", 2.0, 1.0, "relative")
    store_verdict(bundle, engine, [bad], quick=False)
    store_verdict(bundle, engine, [good], quick=True)
    assert stored_verdict(bundle, engine) is False
    store_verdict(bundle, engine, [good], quick=False)
    assert stored_verdict(bundle, engine) is True
    store_verdict(bundle, engine, [bad], quick=True)
    assert stored_verdict(bundle, engine) is False


def test_nothing_equals_not_a_number() -> None:
    """NaN, infinity or another shape is an infinite error on either side."""
    good = np.ones((2, 3))
    for bad in (np.full((2, 3), np.nan), np.full((2, 3), np.inf), np.ones((3, 2))):
        assert relative_error(bad, good) == np.inf
        assert relative_error(good, bad) == np.inf
