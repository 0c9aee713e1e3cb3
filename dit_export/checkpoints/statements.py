"""What a file says of its own training, compared with its weights and with the caller's options.

The weights' shapes tell most of a model; names and shapes tell neither a DiT from a SiT, nor a SiT's path and the
direction of its time, nor whether the label table has a row for the null class. The training arguments may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_export.checkpoints.families import TIMES
from dit_export.checkpoints.presets import PRESETS
from dit_export.checkpoints.source import Source
from dit_export.checkpoints.velocity_words import KIN_NAME, argument_of_velocity
from dit_runtime.bundle.manifest import PATHS, ModelSpec
from dit_runtime.core.errors import CheckpointError

MODEL_NAME = re.compile(r"(?<![a-z])(DiT|SiT)(?![a-z])(?:[-_](S|B|L|XL)[/_-](\d+))?", re.IGNORECASE)
# What a DiT with the official names has not, though no parameter's name or shape may show it.
NO_PARTS = ("qk_norm", "use_qknorm", "use_swiglu", "swiglu", "use_rope", "rope", "use_rmsnorm", "rmsnorm", "wo_shift")
STEP_COUNTS = (
    *("diffusion_steps", "num_train_timesteps", "num_timesteps", "num_diffusion_timesteps", "num_diffusion_steps"),
    "timesteps",
)
PUBLISHED = f"--path linear --time {TIMES[0]}"  # of the published SiTs
# Arguments that only REPA's training and its kin have, and those that only SiT's own has.
REPA_ARGUMENTS = ("encoder_depth", "proj_coeff", "enc_type", "projector_dim", "z_dims", "repa_loss", "proj_loss")
SIT_ARGUMENTS = ("train_eps", "sample_eps", "loss_weight")
# Of diffusion: what the official code trains with.
NOISE_PREDICTIONS = ("epsilon", "eps", "noise")
VELOCITIES = ("velocity", "v")
ALONE = "store the weights alone (a state dict) to go by their shapes"


@dataclass(frozen=True)
class Statements:
    """The training arguments of a file.

    Attributes:
        source: the file's name, for errors.
        arguments: by name; those that mean nothing here are ignored.
    """

    source: str
    arguments: Mapping[str, Any]

    def number(self, *names: str) -> int | float | None:
        """The number that the first of these arguments says; None if none is there.

        Raises:
            CheckpointError: it is no number.
        """
        for name in names:
            value = self.arguments.get(name)
            if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
                value = int(value)
            if value is None or isinstance(value, bool):
                continue
            if not isinstance(value, int | float) or not abs(value) < 1e12:
                raise CheckpointError(
                    f"{self.source}: its training arguments say {name} = {_short(value)}; expected a number; {ALONE}"
                )
            return value
        return None

    def flag(self, *names: str) -> bool | None:
        """Whether the first of these arguments is true; None if none is there."""
        for name in names:
            value = self.arguments.get(name)
            value = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
            if isinstance(value, bool):
                return value
        return None

    def text(self, *names: str) -> str | None:
        """The text of the first of these arguments; None if none is there."""
        found = (self.arguments.get(name) for name in names)
        return next((value for value in found if isinstance(value, str) and value), None)

    @property
    def model(self) -> re.Match[str] | None:
        """The family and, if it says so, the size and patch of the model's name."""
        name = self.text("model", "model_name", "arch", "model_type")
        return None if name is None else MODEL_NAME.search(name)

    def sign_of(self, names: tuple[str, ...]) -> str | None:
        """The first of these arguments that is there."""
        return next((name for name in names if name in self.arguments), None)


@dataclass(frozen=True)
class Conventions:
    """What no shape tells. ``path`` is a SiT's, and None for a DiT."""

    family: str
    path: str | None


def find_conventions(source: Source, said: Statements, stem: str) -> Conventions:
    """The family of a file, and a SiT's path: what the options say, else what the file says of itself.

    A DiT's file that says nothing is taken as such. A SiT's path and the direction of its time are asked for.

    Args:
        source: the options.
        said: the training arguments.
        stem: the file's name without its ending.

    Raises:
        CheckpointError: the options contradict the file, or neither tells, or what they tell is not supported.
    """
    file = _family_of_arguments(said)
    if file is not None and source.family not in (None, file[0]):
        raise CheckpointError(
            f"{said.source}: its training arguments say {file[1]}, --family says {source.family}; leave --family out "
            f"to go by the file, or {ALONE.replace('their shapes', '--family')}"
        )
    family = source.family or (file[0] if file else "official")
    if family == "official":
        if source.family is None and file is None:
            _check_names(said, stem)
        _check_diffusion(said)
        return Conventions(family, None)
    _check_time(source, said)
    return Conventions(family, _find_path(source, said))


def _check_names(said: Statements, stem: str) -> None:
    """Check that neither the file nor its model is named like another than a DiT, where only names tell."""
    model = said.text("model", "model_name", "arch", "model_type") or ""
    if match := KIN_NAME.search(model) or KIN_NAME.search(stem):
        where = "is named" if match.string == stem else "its training arguments say"
        raise CheckpointError(
            f"{said.source}: {where} {match.string[:60]}, whose parameters may have a DiT's names, while its "
            "conventions are its own; say --family official or --family sit if it was trained as those are"
        )
    if (match := MODEL_NAME.search(stem)) and match[1].lower() == "sit":
        raise CheckpointError(
            f"{said.source}: is named like a SiT, and its parameters have a DiT's names too; say --family sit "
            f"{PUBLISHED} for a SiT of willisma/SiT, or --family official for a DiT"
        )


def _family_of_arguments(said: Statements) -> tuple[str, str] | None:
    """The family that the training arguments tell, and which argument does so."""
    if (model := said.model) and not KIN_NAME.search(model.string):
        return ("sit" if model[1].lower() == "sit" else "official"), model.string[:60]
    if name := said.sign_of((*REPA_ARGUMENTS, *SIT_ARGUMENTS, "path_type")):
        return "sit", f"{name} = {_short(said.arguments[name])}"
    if (prediction := said.text("prediction")) and prediction.lower() == "velocity":
        return "sit", f"prediction = {prediction}"
    if name := said.sign_of(("noise_schedule", "diffusion_steps")):
        return "official", f"{name} = {_short(said.arguments[name])}"
    return None


def _check_diffusion(said: Statements) -> None:
    """Check that a DiT was trained as the official code trains: linear betas of 1000 steps, and ε is predicted."""
    expected = {
        "noise_schedule": (said.text("noise_schedule", "beta_schedule"), ("linear",)),
        "diffusion_steps": (said.number(*STEP_COUNTS), (1000,)),
        "prediction": (said.text("prediction", "prediction_type", "parameterization"), NOISE_PREDICTIONS),
        "predict_xstart": (said.flag("predict_xstart"), (False,)),
    }
    for name, (value, allowed) in expected.items():
        if value is not None and (value.lower() if isinstance(value, str) else value) not in allowed:
            raise CheckpointError(
                f"{said.source}: its training arguments say {name} = {_short(value)}, which is not supported; a file "
                f"with the official names is sampled with {name} = {allowed[0]}"
            )
    if argument := argument_of_velocity(said.arguments):
        raise CheckpointError(
            f"{said.source}: its training arguments say {argument} = {_short(said.arguments[argument])}, and a DiT "
            f"with the official names predicts epsilon; for a velocity model say --family sit, or {ALONE}"
        )


def _check_time(source: Source, said: Statements) -> None:
    """Check that a velocity model's time runs from noise at 0, which the file proves or the caller says."""
    model = said.text("model", "model_name", "arch", "model_type") or ""
    repa = said.sign_of(REPA_ARGUMENTS) or (model[:60] if re.search(r"repa(?![a-z])", model, re.IGNORECASE) else None)
    prediction = (said.text("prediction") or "").lower()
    if repa is not None:
        raise CheckpointError(
            f"{said.source}: its training arguments ({repa}) are REPA's or its kin's, whose time runs from the data at "
            "0 to noise at 1; such models are not supported yet"
        )
    if prediction and prediction not in VELOCITIES:
        raise CheckpointError(f"{said.source}: predicts the {prediction[:60]}; only velocity models are supported")
    path = said.text("path_type") or ""
    proof = said.sign_of(SIT_ARGUMENTS)
    if proof is None and (prediction == "velocity" or path in ("Linear", "GVP", "VP")):
        proof = "prediction" if prediction == "velocity" else "path_type"
    if source.time == TIMES[1]:
        against = f", while its training arguments ({proof}) are SiT's own, with {TIMES[0]}" if proof else ""
        raise CheckpointError(
            f"{said.source}: a velocity model with {TIMES[1]}, as REPA trains them, is not supported yet{against}"
        )
    if source.time is None and proof is None:
        options = f"--time {TIMES[0]}" if path or source.path else PUBLISHED
        raise CheckpointError(
            f"{said.source}: no name or shape tells which way the time of a velocity model runs, and the file does not "
            f"say it; say {options} for a SiT of willisma/SiT (REPA's are {TIMES[1]}, not supported yet)"
        )


def _find_path(source: Source, said: Statements) -> str:
    stated = said.text("path_type", "path")
    path = None if stated is None else stated.lower()
    if path is not None and path not in PATHS:
        raise CheckpointError(
            f"{said.source}: was trained on the path {_short(stated)}; expected one of {', '.join(PATHS)}"
        )
    if source.path is not None and path not in (None, source.path):
        raise CheckpointError(
            f"{said.source}: was trained on the {path} path, --path says {source.path}; leave --path out, or {ALONE}"
        )
    found = source.path or path
    if found is None:
        raise CheckpointError(
            f"{said.source}: the file does not say which path it was trained on; say --path {', '.join(PATHS[:-1])} or "
            f"{PATHS[-1]} (the published SiTs: linear)"
        )
    return found


def has_null_row(source: Source, said: Statements, rows: int) -> bool:
    """Whether the last of the label table's ``rows`` is the null class.

    ``--classes`` decides; then the training arguments; a file that says nothing has one, as the official code makes it.

    Raises:
        CheckpointError: the rows are neither as many as the classes nor one more.
    """
    dropout = said.number("class_dropout_prob", "cfg_prob", "label_dropout", "label_dropout_prob", "label_drop_prob")
    stated = said.number("num_classes", "n_classes", "nb_classes", "num_labels")
    if source.classes is not None:
        if rows not in (source.classes, source.classes + 1):
            raise CheckpointError(
                f"{said.source}: --classes {source.classes}, and a label table of {rows} rows; expected one row per "
                f"class, and one more for the null class if there is one: --classes {rows - 1} or --classes {rows}"
            )
        return rows == source.classes + 1
    if stated is None:
        if dropout == 0:
            return False
        if rows < 2:
            raise CheckpointError(
                f"{said.source}: a label table of {rows} row; expected a row per class and one for null, or --classes "
                f"{rows} if there is none"
            )
        return True
    expected = (stated, stated + 1) if dropout is None else (stated + (dropout > 0),)
    if rows not in expected:
        more = "" if dropout is None else f" and a label dropout of {dropout:g}"
        raise CheckpointError(
            f"{said.source}: its training arguments say {stated} classes{more}, and its label table has {rows} rows; "
            f"say --classes {rows - 1} if the last row is the null class, or --classes {rows} if there is none"
        )
    return rows == stated + 1


def heads_of(source: Source, said: Statements) -> int | None:
    """The number of attention heads that ``--heads`` or the file says, by number or by model; None if neither does.

    Raises:
        CheckpointError: they contradict each other.
    """
    stated = said.number("num_heads", "n_heads", "num_attention_heads")
    if stated is None and source.heads is None and (model := said.model) and model[2]:
        return PRESETS[f"DiT-{model[2].upper()}"][2]
    if stated is not None and source.heads not in (None, stated):
        raise CheckpointError(
            f"{said.source}: its training arguments say {stated} heads, --heads says {source.heads}; leave --heads out "
            f"to go by the file, or {ALONE.replace('their shapes', '--heads')}"
        )
    if source.heads is not None or stated is None:
        return source.heads
    return int(stated)


def check_model(source: Source, said: Statements, spec: ModelSpec, channels: int, factor: int) -> None:
    """Check that the training arguments speak of the model that the weights' shapes describe.

    Args:
        source: the options; ``--heads`` says that the model is none of the paper's, whatever name it was given.
        said: the training arguments.
        spec: the model, by its shapes.
        channels: the network's output channels.
        factor: image pixels per latent pixel.

    Raises:
        CheckpointError: they say something else; it names both.
    """
    found = {
        "in_channels": (spec.latent_channels, said.number("in_channels")),
        "patch_size": (spec.patch_size, said.number("patch_size")),
        "hidden_size": (spec.width, said.number("hidden_size", "embed_dim", "hidden_dim")),
        "depth": (spec.depth, said.number("depth", "num_layers", "n_layers")),
        "mlp_ratio": (spec.mlp_width / spec.width, said.number("mlp_ratio")),
    }
    for name, (shape, value) in found.items():
        if value is not None and value != shape:
            raise _error_for_contradiction(said, f"{name} = {value:g}", f"the weights' shapes say {shape:g}")
    learned = said.flag("learn_sigma")
    if learned is not None and learned != (channels == 2 * spec.latent_channels):
        raise _error_for_contradiction(
            said, f"learn_sigma = {learned}", f"there are {channels} output channels for {spec.latent_channels}"
        )
    if part := next((name for name in NO_PARTS if said.flag(name)), None):
        raise _error_for_contradiction(said, f"{part} = True", "a DiT or SiT with the official names has no such part")
    _check_model_name(source, said, spec)
    _check_image_size(source, said, spec, factor)


def _check_model_name(source: Source, said: Statements, spec: ModelSpec) -> None:
    model = said.model
    if model is None or model[2] is None:
        return
    depth, width, _ = PRESETS[f"DiT-{model[2].upper()}"]
    if source.heads is None and (depth, width) != (spec.depth, spec.width):
        raise _error_for_contradiction(
            said,
            f"{model.string[:60]} ({depth} blocks of width {width})",
            f"the weights have {spec.depth} of width {spec.width}",
            "say --heads N to go by the weights",
        )
    if (depth, width) == (spec.depth, spec.width) and int(model[3]) != spec.patch_size:
        raise _error_for_contradiction(said, model.string[:60], f"the weights have patches of {spec.patch_size}")


def _check_image_size(source: Source, said: Statements, spec: ModelSpec, factor: int) -> None:
    height, width = (side * factor for side in spec.latent_size)
    side = said.number("image_size", "resolution", "img_size")
    if side is not None and (side, side) != (height, width) and (height, width) not in source.image_sizes:
        raise _error_for_contradiction(
            said,
            f"images of {side:g}x{side:g}",
            f"the positional table is of {height}x{width} with this autoencoder",
            f"say --vae for the one it was trained with, or --size {height}x{width} to go by the table",
        )
    side = said.number("input_size", "latent_size")
    if side is not None and (side, side) != spec.latent_size:
        raise _error_for_contradiction(
            said,
            f"latents of {side:g}x{side:g}",
            f"the positional table is of {height // factor}x{width // factor}",
        )


def _error_for_contradiction(said: Statements, statement: str, weights: str, cure: str = ALONE) -> CheckpointError:
    return CheckpointError(f"{said.source}: its training arguments say {statement}, and {weights}; {cure}")


def _short(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
