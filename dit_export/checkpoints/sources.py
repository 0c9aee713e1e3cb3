"""From the name of a checkpoint to one description of its model and weights.

The exporter and the reference both start here, each in its own process. Weights have the official names and are read
one by one (``weights.py``); the conventions of each source stay its own (``Numerics``, guidance, sampler).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dit_export.checkpoints import official_file, policy_folder, random_preset
from dit_export.checkpoints.autoencoders import is_complete_autoencoder
from dit_export.checkpoints.checkpoint import Checkpoint, check_guidance_channels, checkpoint_at_sizes
from dit_export.checkpoints.diffusers_folder import load as diffusers_folder
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.file_kinds import PICKLES, SAFE, check_name, check_regular, kind_of_file
from dit_export.checkpoints.formats import Location
from dit_export.checkpoints.hub import check_hub_id, download_repository, find_local, hub_id_of_snapshot
from dit_export.checkpoints.key_errors import SUPPORTED
from dit_export.checkpoints.presets import preset_from_name
from dit_export.checkpoints.source import OPTION_PURPOSES, Source, refuse_options
from dit_export.checkpoints.weights import files_of_module
from dit_runtime.bundle.manifest import CONDITIONINGS, PATHS, SECOND_TIMES, TIMES
from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.files import named

__all__ = ["FORMATS", "Checkpoint", "Source", "load_checkpoint"]

# The formats of checkpoint, one line each. The first that recognizes a location reads it.
FORMATS = (
    random_preset.FORMAT,
    policy_folder.FORMAT,
    diffusers_folder.FORMAT,
    official_file.FORMAT,
)
# Of a hub repository with a pipeline: the files to download, and the files without which the cache is incomplete,
# beside the weights.
PIPELINE_FILES = ("model_index.json", "transformer/*", "vae/*", "scheduler/*")
PIPELINE_PARTS = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def load_checkpoint(source: Source) -> Checkpoint:
    """The checkpoint that ``source`` names.

    Everything is checked except the weights' values; they are checked when they are read.

    Raises:
        CheckpointError: nothing is there, it is unreadable or not a supported model, or an option does not fit it.
    """
    for what, value, known in (
        ("path", source.path, PATHS),
        ("family", source.family, tuple(FAMILIES)),
        ("time", source.time, TIMES),
        ("second time", source.second_time, SECOND_TIMES),
        ("conditioning", source.conditioning, CONDITIONINGS),
    ):
        if value is not None and value not in known:
            raise CheckpointError(f"{what} {value!r} is unknown; expected one of {', '.join(known)}")
    location = _locate(source)
    for item in FORMATS:
        if item.recognizes(location):
            refuse_options(source, OPTION_PURPOSES.keys() - item.options)
            checkpoint = item.load(source, location)
            break
    else:
        kind = "" if location.path is None else location.path.suffix
        if location.path is not None:
            check_name(location.path, kind_of_file(location.path))
        raise CheckpointError(f"{source.name}: is a {kind or 'plain'} file; {SUPPORTED}")
    if checkpoint.diffusion.options.clip_bound is not None:
        checkpoint = replace(checkpoint, model=replace(checkpoint.model, clips=True))
    channels = checkpoint.model.latent_channels
    if checkpoint.autoencoder is not None and checkpoint.autoencoder.config.latent_channels != channels:
        raise CheckpointError(
            f"{source.name}: {channels} latent channels, the autoencoder has "
            f"{checkpoint.autoencoder.config.latent_channels}; name the one it was trained with (--vae)"
        )
    if checkpoint.model.observation and source.tiles:
        raise CheckpointError(f"{source.name}: is a policy, without a decoder; leave --decode-tile out")
    if source.guidance_channels is not None:
        guided = source.guidance_channels or channels
        check_guidance_channels(guided, channels)
        checkpoint = replace(checkpoint, diffusion=replace(checkpoint.diffusion, guidance_channels=guided))
    return checkpoint_at_sizes(checkpoint, source.image_sizes)


def _locate(source: Source) -> Location:
    """Where the source is; the files of a hub id are downloaded if the cache does not have them.

    Raises:
        CheckpointError: it is neither a folder nor a file nor a hub id that can be reached.
    """
    if source.random_seed is not None:
        return Location(None, source.name)
    path = find_local(source.name)
    if path is not None:
        if not path.is_dir():
            check_regular(path)  # a file that may not be read
            return Location(path, path.stem)
        if path.suffix in (SAFE, *PICKLES) and not (path / "model_index.json").exists():
            raise CheckpointError(f"{path}: is a folder; expected a file with weights, or a DiTPipeline folder")
        return _location_of_folder(path)
    if preset_from_name(source.name) is not None:
        raise CheckpointError(f"{source.name}: a preset has no weights of its own; add --random-weights SEED")
    check_hub_id(source.name, f"{SUPPORTED.removeprefix('expected ')}, a hub id or a preset")
    folder = download_repository(source.name, PIPELINE_FILES, lambda found: _is_complete(found, source))
    return Location(folder, source.name.partition("@")[0], revision=folder.name)


def _location_of_folder(path: Path) -> Location:
    """A folder under the name that the user gave it, or, in a hub cache, under its repository's name."""
    cached = hub_id_of_snapshot(path)
    if cached is not None:
        return Location(path, cached[0], revision=cached[1])
    return Location(path, named(path).name)


def _is_complete(folder: Path, source: Source) -> bool:
    """Whether a folder of the hub cache has a pipeline's configurations and the transformer's and the VAE's weights."""
    try:
        files_of_module(folder / "transformer", source.variant)
    except CheckpointError:
        return False
    return all((folder / part).is_file() for part in PIPELINE_PARTS) and is_complete_autoencoder(folder, source.variant)
