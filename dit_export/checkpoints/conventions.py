"""What no shape tells of a model: its family, a velocity model's path and the direction of its time, and of a MeanFlow
what its second time is and whether guidance is in its weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.mean_flow import ARGUMENTS, check_arguments, check_parameters, find_second_time, is_unguided
from dit_export.checkpoints.source import Source
from dit_export.checkpoints.statements import ALONE, MODEL_NAME, Statements, quote
from dit_export.checkpoints.training_parts import ModelPart
from dit_export.checkpoints.velocity_words import KIN_NAME, argument_of_velocity
from dit_runtime.bundle.manifest import NOISE_AT_0, NOISE_AT_1, PATHS, TURNED
from dit_runtime.core.errors import CheckpointError

STEP_COUNTS = (
    *("diffusion_steps", "num_train_timesteps", "num_timesteps", "num_diffusion_timesteps", "num_diffusion_steps"),
    "timesteps",
)
# What says that a file is of the published SiTs, and of REPA's.
AS_SIT = f"--family sit --path linear --time {NOISE_AT_0}"
AS_REPA = "--family repa --path linear"
# Arguments that only REPA's training and its kin have, and those that only SiT's own has.
REPA_ARGUMENTS = ("encoder_depth", "proj_coeff", "enc_type", "projector_dim", "z_dims", "repa_loss", "proj_loss")
SIT_ARGUMENTS = ("train_eps", "sample_eps", "loss_weight")
SIT_PATHS = ("Linear", "GVP", "VP")  # as SiT's own arguments write them
# Of diffusion: what the official code trains with.
NOISE_PREDICTIONS = ("epsilon", "eps", "noise")
VELOCITIES = ("velocity", "v")
_BY_TIME = {NOISE_AT_0: "sit", NOISE_AT_1: "repa"}
_PATH_NAMES = {"cosine": "gvp"}  # REPA's name of the same path


@dataclass(frozen=True)
class Conventions:
    """What no shape tells.

    Attributes:
        family: one of ``FAMILIES``.
        path: a velocity model's; None for a DiT.
        second_time: a MeanFlow's; None for every other model.
        guidance_inside: whether guidance was trained into the weights.
    """

    family: str
    path: str | None
    second_time: str | None = None
    guidance_inside: bool = False


@dataclass(frozen=True)
class _Evidence:
    """The families that a file's arguments or parameters allow, and what in the file says so.

    ``is_lasting``: whether weights that are stored alone still say it.
    """

    families: tuple[str, ...]
    words: str
    is_lasting: bool = False


def find_conventions(
    source: Source, said: Statements, stem: str, part: ModelPart, learns_variance: bool
) -> Conventions:
    """The family of a file, and a velocity model's path: what the options say, else what the file says of itself.

    A DiT's file that says nothing is taken as such. A velocity model's path and the direction of its time are asked
    for.

    Args:
        source: the options.
        said: the training arguments.
        stem: the file's name without its ending.
        part: the model's tensors, with the name of one that proves its family, if there is one.
        learns_variance: whether the network has more output channels than latents have, as every DiT of the official
            training has.

    Raises:
        CheckpointError: the options contradict the file, or neither tells, or what they tell is not supported.
    """
    check_arguments(said)
    file = _evidence_of_arguments(said)
    by_arguments = file
    if part.family == "lightningdit":
        _check_lightning(source, said, file)
    if part.family == "meanflow":
        check_parameters(source, said, *_told_by(file), part.sign)
    if part.family is not None:
        file = _Evidence((part.family,), f"its parameters ({part.sign})", is_lasting=True)
    family = _find_family(source, said, file)
    if family == "official":
        if source.family is None and file is None:
            _check_names(said, stem)
            _check_output(said, stem, learns_variance)
        _check_diffusion(said)
        return Conventions(family, None)
    _check_prediction(said)
    if family == "meanflow" and part.family != "meanflow":
        raise CheckpointError(
            f"{said.source}: has no second timestep embedder (r_embedder.mlp.0.weight), which every MeanFlow has; say "
            f"{AS_SIT} for a SiT of willisma/SiT, or {AS_REPA} for one of REPA"
        )
    path = _find_path(source, said, family)
    if family != "meanflow":
        return Conventions(family, path)
    second = find_second_time(source, said, *_told_by(by_arguments))
    return Conventions(family, path, second, not is_unguided(said))


def _check_lightning(source: Source, said: Statements, file: _Evidence | None) -> None:
    """Check that LightningDiT's conventions are those of a model with its parameters: its kin have them too."""
    name = said.text("model", "model_name", "arch", "model_type") or ""
    proven = file is not None and file.families == ("sit",)  # its transport is SiT's, and has SiT's arguments
    if file is not None and file.families == ("repa",):
        raise CheckpointError(
            f"{said.source}: has a LightningDiT's parameters, and {file.words} say repa; not supported"
        )
    if source.family is None and not proven and not re.search("lightning", name, re.IGNORECASE):
        raise CheckpointError(
            f"{said.source}: has a LightningDiT's parameters, which its kin have too, and no name or shape tells which "
            "way time runs; say --family lightningdit --path linear for a model of hustvl/LightningDiT, whose time is "
            f"{NOISE_AT_0}"
        )


def _told_by(file: _Evidence | None) -> tuple[tuple[str, ...], str]:
    return ((), "") if file is None else (file.families, file.words)


def _find_family(source: Source, said: Statements, file: _Evidence | None) -> str:
    """The family by ``--family``, else by ``--time``, else by the file; a DiT where none of them says one."""
    asked, time = source.family, source.time
    if asked is not None and file is not None and asked not in file.families:
        other = "" if file.is_lasting else f" to go by the file, or {ALONE.replace('their shapes', '--family')}"
        raise CheckpointError(
            f"{said.source}: {file.words} say {_name_families(file)}, --family says {asked}; leave --family out{other}"
        )
    if asked is None and time is not None and (file is None or file.families != ("official",)):
        asked = next((each for each in file.families if FAMILIES[each].time == time), None) if file else None
        asked = asked or _BY_TIME[time]
        if file is not None and asked not in file.families:
            raise CheckpointError(
                f"{said.source}: --time {time}, while {file.words} say {_name_families(file)}, whose time is "
                f"{FAMILIES[file.families[0]].time}; leave --time out"
            )
    if asked is not None and time is not None and FAMILIES[asked].time not in (None, time):
        raise CheckpointError(
            f"{said.source}: --family {asked} with --time {time}, and the time of that family is "
            f"{FAMILIES[asked].time}; say --family {_BY_TIME[time]} for a velocity model with {time}"
        )
    told = file.families if file is not None else ("official",)
    # A model of REPA has all that a SiT has: that somebody calls it a SiT proves no direction.
    is_open = len(told) > 1 if asked is None else asked == "sit" and told != ("sit",) and time is None
    if is_open:
        _check_prediction(said)
        raise _error_for_direction(source, said)
    return asked or told[0]


def _name_families(file: _Evidence) -> str:
    return " or ".join(file.families)


def _error_for_direction(source: Source, said: Statements) -> CheckpointError:
    known = said.text("path_type", "path") or source.path
    sit, repa = (text if known is None else text.replace(" --path linear", "") for text in (AS_SIT, AS_REPA))
    return CheckpointError(
        f"{said.source}: no name or shape tells which way the time of a velocity model runs, and the file does not say "
        f"it; say {sit} for a SiT of willisma/SiT, or {repa} for one of REPA, whose time is {NOISE_AT_1}"
    )


def _check_names(said: Statements, stem: str) -> None:
    """Check that neither the file nor its model is named like another than a DiT, where only names tell."""
    model = said.text("model", "model_name", "arch", "model_type") or ""
    if match := KIN_NAME.search(model) or KIN_NAME.search(stem):
        where = "is named" if match.string == stem else "its training arguments say"
        raise CheckpointError(
            f"{said.source}: {where} {match.string[:60]}, whose parameters may have a DiT's names, while its "
            f"conventions are its own; say {AS_REPA} for a SiT of REPA, or --family official or {AS_SIT} if it was "
            "trained as those are"
        )
    if (match := MODEL_NAME.search(stem)) and match[1].lower() == "sit":
        raise CheckpointError(
            f"{said.source}: is named like a SiT, and its parameters have a DiT's names too; say {AS_SIT} for a SiT of "
            f"willisma/SiT, {AS_REPA} for one of REPA, or --family official for a DiT"
        )


def _check_output(said: Statements, stem: str, learns_variance: bool) -> None:
    """Check that a file that says nothing of itself, not even by its name, has a DiT's output.

    What it is taken for otherwise may well be a SiT of REPA, whose parameters are those of a DiT without variance.
    """
    name = MODEL_NAME.search(stem)
    if not learns_variance and said.flag("learn_sigma") is None and (name is None or name[1].lower() != "dit"):
        raise CheckpointError(
            f"{said.source}: has as many output channels as latents have, and says nothing of itself: it may be a DiT "
            "without learned variance, or a velocity model whose time runs either way; say --family official, "
            f"{AS_REPA}, or {AS_SIT}"
        )


def _evidence_of_arguments(said: Statements) -> _Evidence | None:
    """The families that the training arguments allow, and which argument says so."""
    name = said.text("model", "model_name", "arch", "model_type") or ""
    if argument := said.sign_of(ARGUMENTS):
        return _Evidence(("meanflow",), f"its training arguments ({argument} = {quote(said.arguments[argument])})")
    if re.search(r"repa(?![a-z])", name, re.IGNORECASE):
        return _Evidence(("repa",), f"its training arguments ({name[:60]})")
    if argument := said.sign_of(REPA_ARGUMENTS):
        return _Evidence(("repa",), f"its training arguments ({argument} = {quote(said.arguments[argument])})")
    prediction, path = (said.text("prediction") or "").lower(), said.text("path_type") or ""
    proof = said.sign_of(SIT_ARGUMENTS)
    if proof is None and (prediction == "velocity" or path in SIT_PATHS):
        proof = "prediction" if prediction == "velocity" else "path_type"
    if proof is not None:
        return _Evidence(("sit",), f"its training arguments ({proof} = {quote(said.arguments[proof])})")
    if (model := said.model) and not KIN_NAME.search(model.string):
        families = ("sit", "repa") if model[1].lower() == "sit" else ("official",)
        return _Evidence(families, f"its training arguments ({model.string[:60]})")
    if path:
        return _Evidence(("sit", "repa"), f"its training arguments (path_type = {quote(path)})")
    if argument := said.sign_of(("noise_schedule", "diffusion_steps")):
        return _Evidence(("official",), f"its training arguments ({argument} = {quote(said.arguments[argument])})")
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
            f"with the official names predicts epsilon; for a velocity model say {AS_SIT} or {AS_REPA}, or {ALONE}"
        )


def _check_prediction(said: Statements) -> None:
    prediction = (said.text("prediction") or "").lower()
    if prediction and prediction not in VELOCITIES:
        raise CheckpointError(f"{said.source}: predicts the {prediction[:60]}; only velocity models are supported")


def _find_path(source: Source, said: Statements, family: str) -> str:
    stated = said.text("path_type", "path")
    path = None if stated is None else stated.lower()
    is_turned = FAMILIES[family].time == NOISE_AT_1
    known = TURNED if is_turned else PATHS
    if is_turned and path is not None:
        path = _PATH_NAMES.get(path, path)
    if path is not None and path not in known:
        raise CheckpointError(
            f"{said.source}: was trained on the path {quote(stated)}; expected one of {', '.join(known)}"
        )
    if source.path is not None and path not in (None, source.path):
        raise CheckpointError(
            f"{said.source}: was trained on the {path} path, --path says {source.path}; leave --path out, or {ALONE}"
        )
    found = source.path or path
    if found is None:
        published = {"sit": "SiTs", "repa": "REPA", "lightningdit": "LightningDiT", "meanflow": "MeanFlow"}[family]
        raise CheckpointError(
            f"{said.source}: the file does not say which path it was trained on; say --path {', '.join(known[:-1])} or "
            f"{known[-1]} (the published {published}: linear)"
        )
    check_path(said.source, family, found)
    return found


def check_path(source: str, family: str, path: str) -> None:
    """Check that a family has models on a path. Raises CheckpointError if it has none."""
    if FAMILIES[family].time == NOISE_AT_1 and path not in TURNED:
        raise CheckpointError(f"{source}: --path {path}; models of the family {family} have {' or '.join(TURNED)}")
