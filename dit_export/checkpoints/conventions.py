"""What no shape tells of a model: its family, a SiT's path and the direction of its time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dit_export.checkpoints.source import Source
from dit_export.checkpoints.statements import ALONE, MODEL_NAME, Statements, quote
from dit_export.checkpoints.velocity_words import KIN_NAME, argument_of_velocity
from dit_runtime.bundle.manifest import PATHS, TIMES
from dit_runtime.core.errors import CheckpointError

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
        return "sit", f"{name} = {quote(said.arguments[name])}"
    if (prediction := said.text("prediction")) and prediction.lower() == "velocity":
        return "sit", f"prediction = {prediction}"
    if name := said.sign_of(("noise_schedule", "diffusion_steps")):
        return "official", f"{name} = {quote(said.arguments[name])}"
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
                f"{said.source}: its training arguments say {name} = {quote(value)}, which is not supported; a file "
                f"with the official names is sampled with {name} = {allowed[0]}"
            )
    if argument := argument_of_velocity(said.arguments):
        raise CheckpointError(
            f"{said.source}: its training arguments say {argument} = {quote(said.arguments[argument])}, and a DiT "
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
            f"{said.source}: was trained on the path {quote(stated)}; expected one of {', '.join(PATHS)}"
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
