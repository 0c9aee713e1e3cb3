"""What to export: the name of a checkpoint, and the facts that the checkpoint does not tell about itself."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass

from dit_runtime.core.errors import CheckpointError

# Options that only some formats of checkpoint take, and what they are for.
OPTION_PURPOSES = {
    "heads": "describe a file with the official names",
    "path": "describe a velocity model",
    "time": "describe a velocity model",
    "second_time": "describe a MeanFlow, which gets two times",
    "weights": "choose among the sets of weights in a file",
    "variant": "choose among a diffusers folder's files",
    "sha256": "pin a file that holds weights",
    "conditioning": "describe a preset",
    "classes": "say how many classes a file, folder or preset has",
    "learned_variance": "describe a preset",
    "autoencoder_scaling": "describe a VAE that is a file",
    "latent_stats": "say how a file's model had its latents normalized",
}
USUAL_TILES = (32,)
OPTION_NAMES = {
    "learned_variance": "fixed-variance",
    "autoencoder_scaling": "vae-scaling",
    "latent_stats": "latent-stats",
    "second_time": "second-time",
}


@dataclass(frozen=True)
class Source:
    """The name of a checkpoint and the options that describe it.

    Attributes:
        name: a diffusers folder, a ``.pt`` or ``.safetensors`` file, a hub id (``owner/name[@revision]``) or a preset.
        random_seed: the seed of a preset's random weights; None for checkpoints that have weights.
        family: one of ``families.FAMILIES``; None means as a file's parameters, its training arguments or ``time`` say,
            else official for files, sit for presets of SiT, and diffusers otherwise.
        heads: the number of attention heads, for shapes that the paper does not list.
        autoencoder: a folder, file or hub id with the VAE; None means the pipeline's own VAE or the official default.
        autoencoder_scaling: the scaling factor of the latents of a VAE that is a file, and maybe their shift; empty
            where statistics in the model's file tell it.
        latent_stats: a file with mean and deviation of each channel of the VAE's latents, by which a model's latents
            were normalized.
        variant: the variant of a diffusers folder's weights files, such as ``fp16``.
        sha256: the hash that the transformer's weights file must have.
        path: the path of a velocity model: ``linear``, ``gvp`` or ``vp``; None means as the file says, or linear for
            presets.
        time: which way the time of a velocity model runs, one of ``TIMES``; None means as the family or the file says.
        second_time: what a MeanFlow gets beside t, one of ``SECOND_TIMES``; None means as the file says, or ``t-r`` for
            presets.
        weights: the path of the set of weights to take from a file that holds several, such as ``ema``.
        guidance_channels: how many latent channels guidance acts on, 0 for all; None means as the reference does.
        image_sizes: heights and widths of images in pixels; an empty tuple means the trained size.
        conditioning: the conditioning of a preset; None means ``adaln-zero``.
        classes: the number of classes; None means as the file says, or 1000 for presets.
        learned_variance: whether a preset learns its variance; None means that it does.
        tiles: sides of decoder tiles in latent pixels. The export records how each tile is decoded, so that engines
            built for tiles can be verified. None means ``USUAL_TILES``, and nothing without a decoder.
    """

    name: str
    random_seed: int | None = None
    family: str | None = None
    heads: int | None = None
    autoencoder: str | None = None
    autoencoder_scaling: tuple[float, ...] | None = None
    latent_stats: str | None = None
    variant: str | None = None
    sha256: str | None = None
    path: str | None = None
    time: str | None = None
    second_time: str | None = None
    weights: str | None = None
    guidance_channels: int | None = None
    image_sizes: tuple[tuple[int, int], ...] = ()
    conditioning: str | None = None
    classes: int | None = None
    learned_variance: bool | None = None
    tiles: tuple[int, ...] | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Source:
        values = json.loads(text)
        sizes = tuple((int(h), int(w)) for h, w in values["image_sizes"])
        scaling = values["autoencoder_scaling"]
        tiles = values["tiles"]
        tuples = {
            "autoencoder_scaling": None if scaling is None else tuple(scaling),
            "tiles": None if tiles is None else tuple(tiles),
        }
        return Source(**{**values, "image_sizes": sizes, **tuples})


def refuse_options(source: Source, options: Collection[str]) -> None:
    """Check that none of these options is given: an option that has no effect would mislead.

    Raises:
        CheckpointError: one of them is given.
    """
    values = asdict(source)
    for option in OPTION_PURPOSES:
        if option in options and values[option] is not None:
            name = OPTION_NAMES.get(option, option)
            raise CheckpointError(f"{source.name}: --{name} is there to {OPTION_PURPOSES[option]}; leave it out")
