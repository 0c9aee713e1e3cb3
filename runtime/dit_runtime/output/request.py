"""What ``dit-sample`` is asked for: frozen and checked, made from its arguments or by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dit_runtime.sampling.settings import Settings


@dataclass(frozen=True)
class DecodeSettings:
    """How latents are decoded: side of a tile in latent pixels, and images in one decoder call; see ``decode``."""

    tile: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class LabelledImages:
    """Images of labels.

    Attributes:
        labels: class numbers, names or mixtures as text; ``("all",)`` is every class of the model.
        count: images of each label.
        seeds: one for each image, or the first of consecutive ones.
        settings: how all of them are sampled. A sampler table, noise and an image to start from come from files
            (``InputPaths``), and guidance is a field of its own.
        guidance: one scale, or one for each image; None is the bundle's default.
        decoding: how their latents are decoded.
        batch_size: images in one batch.
        size: height and width in pixels; None is the bundle's first.
        shard: ``(i, n)``: the i-th of n parts of the images, or of the shards that they are packed into, from 1. Each
            image is the one that it is without parts.
    """

    labels: tuple[str, ...]
    count: int = 1
    seeds: tuple[int, ...] | int = 0
    settings: Settings = field(default_factory=Settings)
    guidance: tuple[float, ...] | None = None
    decoding: DecodeSettings = DecodeSettings()
    batch_size: int = 16
    size: tuple[int, int] | None = None
    shard: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class RecordedImages:
    """The images of a PNG file that ``dit-sample`` wrote, to be made again from their record."""

    path: Path


@dataclass(frozen=True)
class InputPaths:
    """Files to read: noise (.npy), a sampler table (.json), and what to start from (an image, or latents as .npy)."""

    noise: Path | None = None
    table: Path | None = None
    init: Path | None = None


@dataclass(frozen=True)
class ShardSettings:
    """How images are packed into shards.

    Attributes:
        size: images in a shard; the last one may have fewer.
        folders: whether a shard is a folder of files; else it is a tar file of them.
    """

    size: int
    folders: bool = False


@dataclass(frozen=True)
class OutputRequest:
    """Where images go.

    Attributes:
        path: a PNG file for a grid of all images, else a folder with a file for each image, or for each shard.
        columns: of the grid; None is near-square, or as in the file that is made again.
        overwrite: make images of a folder again that are there already.
        list_all: return the path and the entry of every image; otherwise, of a folder, only the first entry, since
            a long run would hold thousands.
        shards: the folder has a file for each shard of so many images; None has one for each image.
    """

    path: Path
    columns: int | None = None
    overwrite: bool = False
    list_all: bool = False
    shards: ShardSettings | None = None

    @property
    def is_grid(self) -> bool:
        """Whether all images go into one file."""
        return self.path.suffix.lower() == ".png"


@dataclass(frozen=True)
class ClusterRequest:
    """The Ray cluster that shards are made on.

    Attributes:
        address: ``auto`` for the cluster of this machine, ``local`` for one that is started here and ends with the
            work, or the address of one, ``HOST:PORT``.
        workers: processes with an engine each; None is one for each GPU, or one for each node without GPUs.
    """

    address: str
    workers: int | None = None


@dataclass(frozen=True)
class SampleRequest:
    """Images to make, as files.

    Attributes:
        bundle: its folder.
        images: which images.
        output: where they go.
        inputs: the files that they are made from.
        engine: ``auto`` or an engine's name.
        precision: of an engine that has a choice; None is its default.
        threads: of the CPU; 0 leaves the number to the engine, or to the record of images that are made again.
        store: where engines and verdicts are kept; None is the bundle's own folder.
        cluster: where shards are made; None is this process.
    """

    bundle: Path
    images: LabelledImages | RecordedImages
    output: OutputRequest
    inputs: InputPaths = InputPaths()
    engine: str = "auto"
    precision: str | None = None
    threads: int = 0
    store: Path | None = None
    cluster: ClusterRequest | None = None


@dataclass(frozen=True)
class TableRequest:
    """A sampler table to write: the schedule of a named sampler, None for the bundle's default, into ``path``."""

    bundle: Path
    path: Path
    sampler: str | None = None
    steps: int | None = None
    eta: float = 0.0
    spacing: str | None = None
