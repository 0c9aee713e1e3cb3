"""Reads a SiT that was repackaged as a diffusers folder: ``SiTTransformer2DModel`` with SiT's own parameter names.

Such a folder brings its own ``pipeline.py`` and ``transformer_sit.py``; neither is read or run. Its class says what
SiT's code says: velocity, and time from noise at 0. Its flow-matching scheduler says that the path is linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_export.checkpoints.autoencoders import autoencoder_for, load_autoencoder, spec_of_autoencoder
from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.descendants import refuse_descendants
from dit_export.checkpoints.diffusers_folder.transformer import read_transformer_weights
from dit_export.checkpoints.diffusers_modules import read_json_object
from dit_export.checkpoints.formats import Location
from dit_export.checkpoints.layouts import official_spec
from dit_export.checkpoints.official_file import official_checkpoint
from dit_export.checkpoints.positions import grid_of_table
from dit_export.checkpoints.source import Source
from dit_export.checkpoints.stated_model import check_model, check_parts, has_null_row, heads_of
from dit_export.checkpoints.statements import Statements
from dit_export.checkpoints.weights import Weights, check_sha256, files_of_module
from dit_runtime.core.errors import CheckpointError

PIPELINE, TRANSFORMER, SCHEDULER = "SiTPipeline", "SiTTransformer2DModel", "FlowMatchEulerDiscreteScheduler"
# Options of the scheduler that would change the path or its steps, and what they must be.
STRAIGHT = {
    "shift": 1.0,
    "stochastic_sampling": False,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


def load_sit(source: Source, location: Location) -> Checkpoint:
    """The SiT in a folder, with all conventions of the family ``sit``.

    Raises:
        CheckpointError: a part is missing or another class's, or the configuration and the weights disagree.
    """
    folder = location.path
    assert folder is not None
    if source.family not in (None, "sit"):
        raise CheckpointError(f"{folder}: is a {PIPELINE}, --family says {source.family}; leave --family out")
    config = _read_config(folder / "transformer" / "config.json")
    _check_scheduler(folder / "scheduler" / "scheduler_config.json")
    tensors = read_transformer_weights(folder / "transformer", source.variant)
    refuse_descendants(str(folder), tensors)
    sha256 = check_sha256(files_of_module(folder / "transformer", source.variant), source.sha256)
    said = Statements(str(folder / "transformer" / "config.json"), config)
    weights = Weights(str(folder / "transformer"), tensors)
    autoencoder = (
        load_autoencoder(folder / "vae", source.variant, source.autoencoder_scaling)
        if source.autoencoder is None
        else autoencoder_for(source)
    )
    factor = spec_of_autoencoder(autoencoder).factor
    spec, channels = official_spec(
        str(folder / "transformer"),
        weights.shapes,
        heads=heads_of(source, said),
        learned_variance=False,
        has_null=lambda rows: has_null_row(source, said, rows),
        grid=lambda patch: grid_of_table(source, weights, patch, factor),
    )
    check_model(source, said, spec, channels, factor)
    check_parts(str(folder / "transformer"), "sit", spec)
    found = official_checkpoint(
        replace(source, path="linear"), "sit", spec, channels, weights, autoencoder, location.name, sha256
    )
    return replace(found, revision=location.revision)


def _read_config(path: Path) -> Mapping[str, Any]:
    config = read_json_object(path)
    if (kind := config.get("_class_name")) not in (TRANSFORMER, ["transformer_sit", TRANSFORMER]):
        raise CheckpointError(f"{path}: is a {kind}; expected a {TRANSFORMER} in a folder of a {PIPELINE}")
    if (norm := config.get("norm_type", "ln")) != "ln":
        raise CheckpointError(f"{path}: norm_type is {norm!r:.60}; only 'ln' is supported")
    return config


def _check_scheduler(path: Path) -> None:
    config = read_json_object(path, constants=True)
    if (kind := config.get("_class_name")) != SCHEDULER:
        raise CheckpointError(f"{path}: is a {kind!s:.60}; expected a {SCHEDULER}, whose path is linear")
    for name, value in STRAIGHT.items():
        if (found := config.get(name, value)) not in (value, None):
            raise CheckpointError(
                f"{path}: {name} is {found!r:.60}, which is not supported; a SiT's steps are uniform: set it to "
                f"{value!r}"
            )
