"""Folders in diffusers' layout that bring code of their own: read as the class that they name, and never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint
from safetensors.torch import save_file
from support.official_files import same, weights_of

from dit_runtime.core.errors import CheckpointError

CODE = "raise SystemExit('the code of a checkpoint was run')\n"
CONFIG = {
    "_class_name": "SiTTransformer2DModel",
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 10,
    "learn_sigma": True,
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}


def written(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def sit(tmp_path: Path, checkpoint: Path) -> Path:
    """A folder as SiT's repackagers write it, with a ``pipeline.py`` that must not be run."""
    folder = tmp_path / "SiT-tiny"
    written(folder / "transformer" / "config.json", CONFIG)
    written(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    written(
        folder / "model_index.json",
        {
            "_class_name": ["pipeline", "SiTPipeline"],
            "transformer": ["transformer_sit", "SiTTransformer2DModel"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "id2label": {"3": "a fish"},
        },
    )
    for file in (folder / "pipeline.py", folder / "transformer" / "transformer_sit.py"):
        file.write_text(CODE)
    save_file(weights_of(), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    shutil.copytree(checkpoint / "vae", folder / "vae")
    return folder


def loaded(folder: Path, **options: object) -> Checkpoint:
    return load_checkpoint(Source(str(folder), **options))  # type: ignore[arg-type]


def test_a_folder_of_a_sit(sit: Path) -> None:
    """Its class proves the family and the direction, its scheduler the path, its configuration the heads."""
    found = loaded(sit)
    assert (found.family, found.diffusion.path, found.diffusion.time) == ("sit", "linear", "noise-at-0")
    assert (found.model.heads, found.model.classes, found.channels) == (2, 10, 8)
    assert (found.class_names[3], found.class_names[4]) == ("a fish", "4")
    assert found.weights_sha256 is not None
    assert same(found, weights_of())
    assert loaded(sit, family="sit").family == "sit"


BAD = {
    "another class": ("transformer/config.json", {**CONFIG, "_class_name": "JiTTransformer2DModel"}, "is a JiTTransf"),
    "another depth": (
        "transformer/config.json",
        {**CONFIG, "depth": 3},
        "say depth = 3, and the weights' shapes say 2",
    ),
    "another norm": ("transformer/config.json", {**CONFIG, "norm_type": "rms"}, "norm_type is 'rms'; only 'ln' is"),
    "other classes": ("transformer/config.json", {**CONFIG, "num_classes": 4}, "say 4 classes and a label dropout"),
    "a shifted path": ("scheduler/scheduler_config.json", {**SCHEDULER, "shift": 3.0}, "shift is 3.0, which is not"),
    "another scheduler": (
        "scheduler/scheduler_config.json",
        {"_class_name": "DDIMScheduler"},
        "is a DDIMScheduler; exp",
    ),
    "another pipeline": (
        "model_index.json",
        {"_class_name": ["pipeline", "JiTPipeline"]},
        "is a JiTPipeline; expected",
    ),
    "no class": ("model_index.json", {"_class_name": ["a", "b", "c"]}, "is a .'a', 'b', 'c'.; expected"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused(sit: Path, kind: str) -> None:
    """One line with what was found."""
    name, value, message = BAD[kind]
    written(sit / name, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(sit)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "message"), [("repa", "is a SiTPipeline, --family says repa"), ("official", "is a")]
)
def test_another_family_is_refused(sit: Path, family: str, message: str) -> None:
    """The folder's class is not what the caller says."""
    with pytest.raises(CheckpointError, match=message):
        loaded(sit, family=family)


def test_a_folder_of_a_dit_with_code(checkpoint: Path, tmp_path: Path) -> None:
    """``_class_name`` as a pair is the same DiT, its code is not run, and ``null_class_id`` must be the last row."""
    folder = tmp_path / "dit"
    shutil.copytree(checkpoint, folder)
    index = json.loads((folder / "model_index.json").read_text())
    written(folder / "model_index.json", {**index, "_class_name": ["pipeline", "DiTPipeline"], "null_class_id": 10})
    (folder / "pipeline.py").write_text(CODE)
    found, plain = loaded(folder), loaded(checkpoint)
    assert (found.family, found.model, found.diffusion) == (plain.family, plain.model, plain.diffusion)
    written(folder / "model_index.json", {**index, "null_class_id": 0})
    with pytest.raises(CheckpointError, match=r"null_class_id is 0, and the label table's last row, .* is 10; correct"):
        loaded(folder)
