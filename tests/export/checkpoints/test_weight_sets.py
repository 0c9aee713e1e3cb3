"""Which weights of a file are taken: the average, whatever its name, or those that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.official_files import Weights, loaded, same, weights_of

from dit_runtime.core.errors import CheckpointError

AVERAGE = weights_of()
RAW = {name: value + 1 for name, value in AVERAGE.items()}
COUNT = {"n_averaged": torch.tensor(7)}


class Kept:
    """As trainers' own classes keep an average."""

    def __init__(self, weights: Weights) -> None:
        self.shadow = weights


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def undotted(weights: Weights) -> Weights:
    """As latent-diffusion's LitEma keeps them: without dots, and without what is not trained."""
    names = {
        f"diffusion_model.{name}".replace(".", ""): value for name, value in weights.items() if name != "pos_embed"
    }
    return prefixed("model_ema.", {**names, "decay": torch.tensor(0.999), "num_updates": torch.tensor(9)})


# What a file holds, and the path of the set that is the average; None where there is no other.
FILES: dict[str, tuple[Any, str | None]] = {
    "ema": ({"model": RAW, "ema": AVERAGE, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "ema"),
    **{name: ({"model": RAW, name: AVERAGE}, name) for name in ("model_ema", "ema_state_dict", "state_dict_ema")},
    **{
        name: ({"state_dict": RAW, name: AVERAGE}, name) for name in ("ema_params", "net_ema", "ema_model", "swa_model")
    },
    "AveragedModel": ({"model": RAW, "ema_model": {**COUNT, **prefixed("module.", AVERAGE)}}, "ema_model"),
    "AveragedModel alone": ({**COUNT, **prefixed("module.", AVERAGE)}, None),
    "ema-pytorch": (
        {**prefixed("online_model.", RAW), **prefixed("ema_model.module.", AVERAGE), "step": torch.tensor(1)},
        "ema_model",
    ),
    "Lightning": (
        {"state_dict": {**prefixed("model.", RAW), **prefixed("model_ema.", AVERAGE)}},
        "state_dict.model_ema",
    ),
    "LitEma": (
        {"state_dict": {**prefixed("model.diffusion_model.", AVERAGE), **undotted(AVERAGE)}},
        "state_dict.model_ema",
    ),
    "nested": ({"state": {"model": RAW, "ema": {"params": AVERAGE}}}, "state.ema.params"),
    **{
        prefix: (prefixed(prefix, AVERAGE), None)
        for prefix in ("module.", "_orig_mod.", "model.", "net.", "ema_model.module.", "diffusion_model.")
    },
    "stacked": ({"state_dict": prefixed("_orig_mod.module.net.model.", AVERAGE)}, None),
    "each block wrapped": (
        {name.replace("blocks.1.", "blocks.1._orig_mod.module."): AVERAGE[name] for name in AVERAGE},
        None,
    ),
    "numbers beside it": ({**AVERAGE, "epoch": 3}, None),
}


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> str:
    return str(checkpoint / "vae")


@pytest.mark.parametrize("kind", FILES)
def test_the_average_is_taken(tmp_path: Path, vae: str, kind: str) -> None:
    """Under every name, and wherever prefixes stand; the checkpoint's name says which of several it is."""
    content, path = FILES[kind]
    torch.save(content, tmp_path / "w.pt")
    found = loaded(tmp_path / "w.pt", vae)
    assert same(found, AVERAGE)
    assert found.name == ("w" if path is None else f"w (weights {path})")
    if path is not None:
        assert same(loaded(tmp_path / "w.pt", vae, weights=path), AVERAGE)


def test_old_files_are_read(tmp_path: Path, vae: str) -> None:
    """The format of torch before 1.6, as many published files have, in every order of their numbers."""
    turned = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in AVERAGE.items()}
    torch.save({"model": RAW, "ema": turned}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert same(loaded(tmp_path / "w.pt", vae), AVERAGE)


def test_the_choice_is_said(tmp_path: Path, vae: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of several sets, the log names the one that is taken and the others."""
    torch.save({"model": RAW, "ema": AVERAGE}, tmp_path / "w.pt")
    with caplog.at_level("INFO", "dit_runtime"):
        loaded(tmp_path / "w.pt", vae)
        assert same(loaded(tmp_path / "w.pt", vae, weights="model"), RAW)
    first, second = caplog.messages
    assert first.endswith("took the weights ema; beside them: model")
    assert second.endswith("took the weights model; beside them: ema")


@pytest.mark.parametrize(
    ("content", "weights", "message"),
    [
        ({"model": RAW, "ema": AVERAGE}, "emma", r"--weights emma: no weights there; there is model \(32 .*, ema \(32"),
        (
            {"ema_0.99": AVERAGE, "ema_0.999": RAW},
            None,
            r"holds 2 sets of averaged weights \(ema_0.99 .*; choose one with",
        ),
        (
            {"net": RAW, "other": AVERAGE},
            None,
            r"holds 2 sets of weights \(net .*, other .*; choose one with --weights",
        ),
        (
            {"model": RAW, "ema": {"decay": 0.9, "shadow_params": list(AVERAGE.values())}},
            None,
            r"averaged weights \(ema.shadow_params\) are a list without names.*choose others with --weights \(model",
        ),
        (
            {"decay": 0.9, "shadow_params": list(AVERAGE.values())},
            None,
            r"averaged weights \(shadow_params\) are a list",
        ),
        (
            {"model": RAW, "ema": Kept(AVERAGE)},
            None,
            r"averaged weights \(ema\) are inside a pickled test_weight_sets.Kept; choose others with --weights",
        ),
        ({"model": RAW, "ema": (AVERAGE, 0.9)}, None, r"averaged weights \(ema\) are inside a list; choose others"),
        (
            {"model": RAW, "ema": {name.replace(".", "/"): value for name, value in AVERAGE.items()}},
            None,
            r"averaged weights \(ema\) are parameters of other names; choose others with --weights \(model",
        ),
        (
            {"model": RAW, "callbacks": {"EMA": {"params": list(AVERAGE.values())}}},
            None,
            r"averaged weights \(callbacks.EMA.params\) are a list without names",
        ),
        (list(AVERAGE.values()), None, "holds no state dict but a list; expected parameters by name"),
        ({"epoch": 3, "lr": 0.1}, None, r"holds no state dict \(epoch, lr\); expected parameters by name"),
        (
            {**prefixed("model.", AVERAGE), "vae.conv.weight": torch.ones(2)},
            None,
            r"1 tensors beside the weights model \(vae.conv.weight\); .*leave them out with --weights model",
        ),
        (prefixed("model.", {**AVERAGE, "head.weight": torch.ones(2)}), None, r"1 unexpected keys \(head.weight\)"),
        ({**AVERAGE, "module.pos_embed": torch.ones(1, 16, 32)}, None, "pos_embed is there twice, with and without"),
        (
            {"model": {**AVERAGE, "pos_embed": AVERAGE["blocks.0.mlp.fc1.weight"].flatten()[:512].view(1, 16, 32)}},
            None,
            "blocks.0.mlp.fc1.weight and pos_embed are the same numbers of the file|"
            "pos_embed and blocks.0.mlp.fc1.weight are the same numbers of the file",
        ),
    ],
)
def test_what_is_not_told(tmp_path: Path, vae: str, content: object, weights: str | None, message: str) -> None:
    """What could be meant is listed; nothing is guessed, and nothing is left out without a word."""
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path / "w.pt", vae, weights=weights)


@pytest.mark.parametrize("prefixes", [("net.",), ("net.", "ema.")], ids=str)
def test_safetensors_have_prefixes_too(tmp_path: Path, vae: str, prefixes: tuple[str, ...]) -> None:
    """The same rules hold for flat files."""
    content = {name: value.clone() for prefix in prefixes for name, value in prefixed(prefix, AVERAGE).items()}
    save_file(content, tmp_path / "w.safetensors")
    assert same(loaded(tmp_path / "w.safetensors", vae), AVERAGE)
