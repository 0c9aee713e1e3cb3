"""What a file says of its own training decides where shapes cannot, and is compared with them where they can."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_export.checkpoints.sources import Source, load_checkpoint
from safetensors.torch import load_file, save_file
from support.official_files import loaded, weights_of

from dit_runtime.core.errors import CheckpointError


@dataclasses.dataclass
class Arguments:
    """As some trainers keep their arguments."""

    model: str = "SiT-XL/2"
    path_type: str = "GVP"
    num_classes: int = 10


class Slotted:
    __slots__ = ("model", "num_classes", "path_type")

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


FORMS: dict[str, Callable[..., object]] = {
    "namespace": argparse.Namespace,
    "simple namespace": types.SimpleNamespace,
    "dict": dict,
    "dataclass": Arguments,
    "slots": Slotted,
    "JSON": lambda **values: json.dumps(values),
    "sections": lambda model, path_type, num_classes: {
        "model": {"model": model, "params": {"num_classes": num_classes}},
        "transport": types.SimpleNamespace(path_type=path_type),
    },
}


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> str:
    return str(checkpoint / "vae")


def saved(folder: Path, said: object, **shape: object) -> Path:
    """A training checkpoint with these arguments; 10 classes and one for null unless ``shape`` says otherwise."""
    torch.save({"ema": weights_of(**shape), "args": said}, folder / "w.pt")  # type: ignore[arg-type]
    return folder / "w.pt"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_arguments_is_read(tmp_path: Path, vae: str, form: str) -> None:
    """A SiT of SiT's own training is exported as one, on its path, without an option, and its classes are compared."""
    values = {"model": "SiT-XL/2", "path_type": "GVP"}
    found = loaded(saved(tmp_path, FORMS[form](**values, num_classes=10)), vae)
    assert (found.family, found.diffusion.path, found.model.classes) == ("sit", "gvp", 10)
    with pytest.raises(CheckpointError, match="say 12 classes, and its label table has 11 rows; say --classes 10 if"):
        loaded(saved(tmp_path, FORMS[form](**values, num_classes=12)), vae)


def test_metadata_of_safetensors_are_statements_too(tmp_path: Path, vae: str) -> None:
    """Text as it is; numbers in text are numbers."""
    save_file(weights_of(), tmp_path / "w.safetensors", {"num_classes": "11", "format": "pt"})
    assert not loaded(tmp_path / "w.safetensors", vae).model.has_null
    save_file(weights_of(), tmp_path / "w.safetensors", {"config": json.dumps({"model": {"num_classes": 11}})})
    assert not loaded(tmp_path / "w.safetensors", vae).model.has_null
    save_file(weights_of(), tmp_path / "w.safetensors", {"image_size": "256"})
    with pytest.raises(CheckpointError, match="images of 256x256, and the positional table is of 32x32"):
        loaded(tmp_path / "w.safetensors", vae)


@pytest.mark.parametrize(
    ("said", "options", "classes", "null"),
    [
        ({}, {}, 10, True),
        ({"num_classes": 10}, {}, 10, True),
        ({"num_classes": 11}, {}, 11, False),
        ({"nclass": 10}, {}, 10, True),
        ({"class_num": 11, "image_size": (32, 32), "patch_size": [2, 2]}, {}, 11, False),
        ({"num_classes": "11"}, {}, 11, False),
        ({"class_dropout_prob": 0}, {}, 11, False),
        ({"class_dropout_prob": 0.1}, {}, 10, True),
        ({}, {"classes": 11}, 11, False),
        ({}, {"classes": 10}, 10, True),
        ({"num_classes": 12}, {"classes": 10}, 10, True),  # the option decides
    ],
)
def test_the_null_row_is_told(
    tmp_path: Path, vae: str, said: dict[str, object], options: dict[str, object], classes: int, null: bool
) -> None:
    """Of 11 rows the last is the null class, or a class: the file or ``--classes`` says which."""
    found = loaded(saved(tmp_path, said), vae, **options)
    assert (found.model.classes, found.model.has_null, found.model.label_rows) == (classes, null, 11)
    assert found.defaults.guidance == (4.0 if null else 1.0)
    assert ("no null class" in found.reference) != null


def test_values_beside_the_weights_are_statements_too(tmp_path: Path, vae: str) -> None:
    """A SiT that says so without arguments is no DiT; flowers are no flow."""
    torch.save({"state_dict": weights_of(), "arch": "SiT-XL/2", "path_type": "GVP"}, tmp_path / "w.pt")
    assert loaded(tmp_path / "w.pt", vae).diffusion.path == "gvp"
    torch.save({"state_dict": weights_of(), "num_classes": 11, "loss_type": "mse"}, tmp_path / "flowers.pt")
    assert not loaded(tmp_path / "flowers.pt", vae).model.has_null


SIT = {"model": "SiT-XL/2"}
CONTRADICTIONS: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "no such class count": ({"num_classes": 4}, {}, "say 4 classes, and its label table has 11 rows"),
    "a dropout without a row": (
        {"num_classes": 11, "class_dropout_prob": 0.1},
        {},
        "say 11 classes and a label dropout of 0.1, and its label table has 11 rows; say --classes 10",
    ),
    "--classes and the table": ({}, {"classes": 3}, "--classes 3, and a label table of 11 rows"),
    "a SiT as a DiT": (SIT, {"family": "official"}, r"\(SiT-XL/2\) say sit or repa, --family says official"),
    "a DiT as a SiT": (
        {"model": "DiT-B/4"},
        {"family": "sit"},
        r"\(DiT-B/4\) say official, --family says sit; leave --family",
    ),
    "a path as a DiT": ({"path_type": "GVP"}, {"family": "official"}, r"\(path_type = 'GVP'\) say sit, --family says"),
    "another path": ({"path_type": "GVP"}, {"path": "linear"}, "trained on the gvp path, --path says linear"),
    "a strange path": ({"path_type": "cosine", "prediction": "velocity"}, {}, "the path 'cosine'; expected one of"),
    "another prediction": ({**SIT, "prediction": "score"}, {}, "predicts the score; only velocity models"),
    "no path": ({**SIT, "prediction": "velocity"}, {}, "does not say which path it was trained on; say --path linear"),
    "no direction": (
        {**SIT, "path_type": "linear"},
        {},
        "which way the time .* runs, .*say --family sit --time noise-at-0",
    ),
    "the other direction": (
        {**SIT, "path_type": "Linear"},
        {"time": "noise-at-1"},
        r"--time noise-at-1, while its training arguments \(path_type = 'Linear'\) say sit, whose time is noise-at-0",
    ),
    "REPA": (
        {**SIT, "path_type": "linear", "encoder_depth": 8},
        {"family": "sit", "time": "noise-at-0", "path": "linear"},
        r"its training arguments \(encoder_depth = 8\) say repa, --family says sit; leave --family out",
    ),
    "another size": ({"image_size": 256}, {}, "images of 256x256, and the positional table is of 32x32.*--size 32x32"),
    "another size of two numbers": ({"image_size": (256, 128)}, {}, "say images of 256x128, and the positional table"),
    "another latent size": ({"latent_size": [16, 8]}, {}, "say latents of 16x8, and the positional table is of"),
    "three sides": ({"image_size": [1, 32, 32]}, {}, r"image_size = \[1, 32, 32\]; expected a number, or two"),
    "another patch of two numbers": ({"patch_size": (2, 4)}, {}, "say patch_size = 2x4, and the weights' shapes say 2"),
    "another patch": ({"patch_size": 4}, {}, "say patch_size = 4, and the weights' shapes say 2"),
    "another depth": ({"depth": 28}, {}, "say depth = 28, and the weights' shapes say 2"),
    "another model": ({"model": "DiT-XL/2"}, {"heads": None}, r"28 blocks of width 1152\), and the weights have 2 of"),
    "other heads": ({"num_heads": 4}, {}, "say 4 heads, --heads says 2"),
    "a variance": ({"learn_sigma": False}, {}, "say learn_sigma = False, and there are 8 output channels for 4"),
    "another noise schedule": ({"noise_schedule": "cosine"}, {}, "noise_schedule = 'cosine', which is not supported"),
    "another prediction of a DiT": ({"predict_xstart": True}, {}, "predict_xstart = True, which is not supported"),
    "a prediction in other words": (
        {"model": "DiT-B/4", "objective": "flow_matching"},
        {},
        "objective = 'flow_matching', and a DiT with the official names predicts epsilon; for a velocity model say",
    ),
    "a prediction as a flag": ({"use_rectified_flow": True}, {}, "use_rectified_flow = True, and a DiT with"),
    "other timesteps": ({"timesteps": 100}, {}, "diffusion_steps = 100, which is not supported"),
    "REPA by name": ({"model": "SiT-XL/2-REPA"}, {"family": "sit"}, r"\(SiT-XL/2-REPA\) say repa, --family says sit"),
    "kin by name": (
        {"model": "LightningDiT-XL/1"},
        {},
        "say LightningDiT-XL/1, .* or --family official or --family sit",
    ),
    "a part without weights": ({"qk_norm": True}, {}, "say qk_norm = True, and the weights have no norms of queries"),
    "no number": ({"num_classes": [10]}, {}, "num_classes = a list; expected a number"),
    "a huge number": ({"num_classes": 10**30}, {}, "num_classes = 1000.*; expected a number"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_contradictions(tmp_path: Path, vae: str, kind: str) -> None:
    """One line that names both sides and what decides."""
    said, options, message = CONTRADICTIONS[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(saved(tmp_path, argparse.Namespace(**said)), vae, **options)
    assert "\n" not in str(caught.value)


def test_what_the_file_does_not_prove_is_asked_for(tmp_path: Path, vae: str) -> None:
    """A file of weights alone is no proof of a SiT's direction and path; a SiT's name alone is no DiT's."""
    torch.save(weights_of(), tmp_path / "SiT-XL-2-256.pt")
    with pytest.raises(CheckpointError, match=r"is named like a SiT.*say --family sit --path linear --time noise-at-0"):
        loaded(tmp_path / "SiT-XL-2-256.pt", vae)
    with pytest.raises(
        CheckpointError, match=r"say --family sit --path linear --time noise-at-0 .*--family repa --path"
    ):
        loaded(tmp_path / "SiT-XL-2-256.pt", vae, family="sit")
    with pytest.raises(
        CheckpointError, match="say --family sit --time noise-at-0 for a SiT of willisma/SiT, or --family"
    ):
        loaded(tmp_path / "SiT-XL-2-256.pt", vae, family="sit", path="linear")
    with pytest.raises(CheckpointError, match=r"--family sit with --time noise-at-1, .* say --family repa for"):
        loaded(tmp_path / "SiT-XL-2-256.pt", vae, family="sit", path="linear", time="noise-at-1")
    found = loaded(tmp_path / "SiT-XL-2-256.pt", vae, family="sit", path="vp", time="noise-at-0")
    assert (found.family, found.diffusion.path) == ("sit", "vp")


def test_a_folders_classes_are_compared(checkpoint: Path, tmp_path: Path) -> None:
    """``num_embeds_ada_norm``, the label table, ``--classes`` and the class names speak of the same classes."""
    assert load_checkpoint(Source(str(checkpoint), classes=10)).model.classes == 10
    with pytest.raises(CheckpointError, match="--classes 9, and num_embeds_ada_norm says 10 classes"):
        load_checkpoint(Source(str(checkpoint), classes=9))
    for part in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((checkpoint / part).read_text())
    shutil.copytree(checkpoint / "vae", tmp_path / "vae")
    name = "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(checkpoint / name)
    table = "norm1.emb.class_embedder.embedding_table.weight"
    save_file(
        {key: value[:10].clone() if key.endswith(table) else value for key, value in weights.items()}, tmp_path / name
    )
    with pytest.raises(CheckpointError, match="num_embeds_ada_norm says 10 classes, and the label table has 10 rows"):
        load_checkpoint(Source(str(tmp_path)))
    save_file(weights, tmp_path / name)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "id2label": {"0": "a", "10": "b"}}))
    with pytest.raises(CheckpointError, match="id2label names the class '10', and the model's 10 classes"):
        load_checkpoint(Source(str(tmp_path)))
