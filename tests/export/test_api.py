"""The Python API is the command: the same arguments, the same bundle, the same verdict, and errors that are raised."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import dit_export
import pytest
import torch
from dit_export import ExportRequest, ExportResult, api, command, export, verify
from dit_export.bundle import _make_manifest
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.graphs.precision import FP32
from dit_export.reference.record_settings import Measurements
from safetensors.torch import load_file, save_file

from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import CheckpointError, DiTError, EngineError, OutputError, SamplingError
from dit_runtime.samplers.by_name import schedule_for


def test_the_package_imports_no_torch() -> None:
    """``import dit_export`` is cheap: no torch, diffusers, ONNX or inference engine."""
    code = "import sys, dit_export; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino"}
    assert not heavy & set(done.stdout.split())


def test_the_public_names_are_documented() -> None:
    """Every public function and class has a docstring, and every argument of the functions is in it."""
    assert set(dit_export.__all__) == {"ExportRequest", "ExportResult", "__version__", "export", "verify"}
    for function in (export, verify):
        text = inspect.getdoc(function)
        assert text is not None
        assert all(f"\n    {name}: " in text for name in inspect.signature(function).parameters)
        assert all(f"\n{part}:\n" in text for part in ("Example", "Args", "Raises"))
    for kind in (ExportRequest, ExportResult):
        text = inspect.getdoc(kind)
        assert text is not None
        assert all(f"\n    {item.name}: " in text for item in fields(kind))


def test_a_request_has_the_arguments_of_export() -> None:
    """Names, order and defaults of ``export`` and ``ExportRequest`` are the same."""
    arguments = inspect.signature(export).parameters.values()
    request = [
        (item.name, inspect.Parameter.empty if item.default is MISSING else item.default)
        for item in fields(ExportRequest)
    ]
    assert [(argument.name, argument.default) for argument in arguments] == request


def test_the_command_makes_the_same_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each option of ``dit-export`` arrives where ``export``'s argument of the same meaning does."""
    requests: list[ExportRequest] = []

    def take(request: ExportRequest) -> ExportResult:
        requests.append(request)
        raise DiTError("taken")

    monkeypatch.setattr(command, "export_request", take)
    monkeypatch.setattr(api, "export_request", take)
    argv = (
        "w.pt --fp16 --keep-fp32 blocks.1 decoder --family sit --heads 2 --vae v --variant fp16 --sha256 ab --path gvp "
        "--time noise-at-0 --second-time r --weights ema --vae-scaling 0.5 0.1 --latent-stats s.pt "
        "--guidance-channels all --random-weights 3 --conditioning adaln --classes 7 --fixed-variance "
        "--size 32x48 64x64 --decode-tile 16 24 --encoder --no-verify -o out"
    )
    with pytest.raises(SystemExit):
        command.main(argv.split())
    with pytest.raises(DiTError, match="taken"):
        export(
            Path("w.pt"),
            "out",
            precision="fp16",
            keep_fp32=["blocks.1", Path("decoder")],
            family="sit",
            heads=2,
            vae=Path("v"),
            variant="fp16",
            sha256="ab",
            path="gvp",
            time="noise-at-0",
            second_time="r",
            weights="ema",
            vae_scaling=(0.5, 0.1),
            latent_stats=Path("s.pt"),
            guidance_channels="all",
            random_weights=3,
            conditioning="adaln",
            classes=7,
            fixed_variance=True,
            sizes=[(32, 48), (64, 64)],
            decode_tiles=[16, 24],
            encoder=True,
            verify=False,
        )
    with pytest.raises(SystemExit):
        command.main(["w.pt"])
    with pytest.raises(DiTError, match="taken"):
        export("w.pt")
    assert requests[0] == requests[1]
    argv = "w.pt --int8 --keep-fp16 blocks.1 mlp --calibration-images 7 --calibration-seed 5"
    with pytest.raises(SystemExit):
        command.main(argv.split())
    with pytest.raises(DiTError, match="taken"):
        export("w.pt", precision="int8", keep_fp16=["blocks.1", "mlp"], calibration_images=7, calibration_seed=5)
    assert requests[2] == requests[3] == ExportRequest("w.pt")
    assert requests[4] == requests[5]
    for item in fields(ExportRequest):  # none is left out
        assert any(getattr(request, item.name) != item.default for request in (requests[0], requests[4])), item.name
    assert capsys.readouterr().err.splitlines() == ["dit-export: taken"] * 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"precision": "fp4"},
            CheckpointError,
            "precision 'fp4' is not implemented; expected fp32 or fp16 or bf16 or int8 or fp8",
        ),
        (
            {"precision": "int8", "keep_fp32": ["decoder"]},
            CheckpointError,
            r"units to keep in FP32 \(decoder\) in INT8 graphs: .* name them with --keep-fp16, or export with --fp16",
        ),
        ({"keep_fp16": ["blocks.0"]}, CheckpointError, r"FP16 \(blocks.0\) in fp32 graphs: .*; add --int8"),
        ({"calibration_images": 3}, CheckpointError, "calibration of fp32 graphs: .* add --int8"),
        ({"precision": "int8", "calibration_images": 0}, CheckpointError, "calibration images 0: expected .* from 1"),
        ({"precision": "int8", "calibration_seed": -1}, CheckpointError, "calibration seed -1: expected .* from 0"),
        ({"keep_fp32": ("blocks.0",)}, CheckpointError, "all units of FP32 graphs are FP32"),
        ({"heads": 0}, CheckpointError, "heads 0: expected a whole number from 1"),
        ({"classes": -1}, CheckpointError, "classes -1: expected a whole number from 1"),
        ({"guidance_channels": 0}, CheckpointError, "guidance channels 0: expected a number from 1"),
        ({"guidance_channels": "some"}, CheckpointError, "guidance channels 'some': expected a number from 1"),
        ({"decode_tiles": (1,)}, SamplingError, "decode tile 1: expected at least"),
    ],
)
def test_a_request_is_checked_when_it_is_made(options: dict[str, object], error: type[DiTError], message: str) -> None:
    """What cannot be exported from any checkpoint is refused before torch is imported."""
    with pytest.raises(error, match=message):
        ExportRequest("w.pt", **options)  # type: ignore[arg-type]


def test_the_default_output_says_source_and_precision(tmp_path: Path) -> None:
    """A hub id, a file and a folder each give a name in the working directory."""
    (tmp_path / "w.safetensors").touch()
    for source, precision, name in (
        ("owner/name@main", "fp32", "owner-name-main-fp32.bundle"),
        (str(tmp_path / "w.safetensors"), "fp16", "w-fp16.bundle"),
        (str(tmp_path), "fp16", f"{tmp_path.name}-fp16.bundle"),
    ):
        assert ExportRequest(source, precision=precision).bundle_path == Path(name)


@pytest.mark.slow  # another export
def test_export_and_verify(
    checkpoint: Path, bundles: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In Python as by the command: the same bundle to the last bit, a passing verdict, and not a word printed."""
    capfd.readouterr()
    result = export(checkpoint, tmp_path / "tiny.bundle", precision="fp16")
    assert result.passed
    assert (result.path, result.digest) == (tmp_path / "tiny.bundle", open_bundle(bundles["fp16"]).digest)
    assert result.manifest.precision.name == "fp16"
    assert result.engine is not None
    assert result.as_json()["rungs"] == [rung.as_json() for rung in result.rungs]
    (again,) = verify(result.path, "onnxruntime", quick=True)
    assert again.passed
    assert again.engine == result.engine
    assert len(again.rungs) < len(result.rungs)
    assert verify(result.bundle, quick=True, sizes=[(32, 32)])[0].passed
    assert capfd.readouterr() == ("", "")


def test_a_fault_of_the_reference_is_raised(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An error in the reference's own process is raised in this one, in its words, and leaves nothing behind."""
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (file,) = (broken / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out_2.bias"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds NaN or infinity; this checkpoint is damaged"):
        export(broken, tmp_path / "out.bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    assert capfd.readouterr() == ("", "")


def test_what_keeps_a_bundle_from_being_verified(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an engine the bundle is made all the same, and the result says why there is no verdict."""

    def fail(*_: object) -> None:
        raise EngineError("onnxruntime is not installed")

    monkeypatch.setattr("dit_export.bundle.bundle_from_checkpoint", lambda *_: open_bundle(bundles["fp32"]))
    monkeypatch.setattr(api, "_verify", fail)
    result = export("tiny")
    assert (result.passed, result.not_verified, result.rungs) == (None, "onnxruntime is not installed", ())
    assert result.as_json()["passed"] is None
    assert export("tiny", verify=False) == ExportResult(open_bundle(bundles["fp32"]))


def test_errors_are_raised(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """What the command prints in one line, the functions raise."""
    (tmp_path / "precious").mkdir()
    with pytest.raises(OutputError, match="is not a bundle, so it is not replaced"):
        export(checkpoint, tmp_path / "precious")
    with pytest.raises(CheckpointError, match="no such unit"):
        export(checkpoint, tmp_path / "out", precision="fp16", keep_fp32=["blocks.9"])
    with pytest.raises(EngineError, match="'turbo' is unknown"):
        verify(bundles["fp32"], "turbo")
    with pytest.raises(EngineError, match="name the engine too"):
        verify(bundles["fp32"], "auto", precision="bf16")


@pytest.mark.parametrize(("offset", "steps"), [(0, 20), (1, 19)])
def test_the_defaults_fit_few_training_timesteps(checkpoint: Path, tmp_path: Path, offset: int, steps: int) -> None:
    """Fails if a model of 20 training timesteps is exported with 50 default steps, which it cannot sample.

    With diffusers' offset of 1, 20 steps of leading spacing would end at timestep 20, which there is not.
    """
    copied = Path(shutil.copytree(checkpoint, tmp_path / "few"))
    file = copied / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_train_timesteps": 20, "steps_offset": offset}))
    found = load_checkpoint(Source(str(copied)))
    defaults = _make_manifest(found, FP32, Measurements()).defaults
    assert (defaults.sampler, defaults.steps) == ("ddim", steps)
    assert schedule_for("ddim", found.model, found.diffusion, defaults.steps).steps == steps
