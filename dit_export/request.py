"""The checked arguments of an export. This module imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dit_export.checkpoints.source import Source
from dit_runtime.bundle.manifest import PrecisionSpec
from dit_runtime.bundle.precision import EXPORTED, QUANTIZED, Precision
from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.files import named
from dit_runtime.core.reading import kind_of
from dit_runtime.sampling.tiles import check_tile

if TYPE_CHECKING:
    from dit_export.reference.record_settings import CalibrationRequest

ALL = "all"
MOST_IMAGES = 10_000  # of a calibration


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of an export, as ``dit-export`` takes them.

    Attributes:
        source: a diffusers ``DiTPipeline`` folder or hub id (``owner/name`` or ``owner/name@revision``); a ``.pt`` or
            ``.safetensors`` file with the official names; or with ``random_weights`` a preset, such as
            ``DiT-XL/2-256``.
        output: the bundle's folder; None means ``NAME-PRECISION.bundle`` in the working directory.
        precision: ``fp32``, ``fp16`` or ``bf16`` for strongly typed graphs, ``int8`` or ``fp8``: FP16 graphs
            whose blocks' linear layers multiply INT8 or FP8.
        keep_fp32: with ``fp16`` or ``bf16``, units that stay FP32, such as ``blocks.17.attn``, and files that list such
            units, as ``dit-export --bisect`` writes them.
        family: ``diffusers``, ``official``, ``sit``, ``repa``, ``lightningdit``, ``meanflow`` or ``multi-task-dit``;
            None means as a file's parameters, its training arguments or ``time`` say, else official for files, as the
            name says for presets, and diffusers otherwise.
        heads: the number of attention heads of a file whose shapes are not the paper's.
        vae: the autoencoder's folder, file or hub id; None means the pipeline's own, or for files and SiT the official
            one.
        vae_scaling: of an autoencoder that is a file: its latents' scaling factor, and maybe their shift.
        latent_stats: a file with mean and deviation of each channel by which the latents of a file's model were
            normalized; it takes the place of the autoencoder's own scaling.
        variant: the variant of a diffusers folder's weights files, such as ``fp16``.
        sha256: the SHA-256 that the transformer's weights must have, in hexadecimal digits.
        path: the path of a velocity model: ``linear``, ``gvp`` or ``vp``; None means as the file says, or linear for
            presets.
        time: which way the time of a velocity model runs: ``noise-at-0`` as SiT's, or ``noise-at-1`` as REPA's; None
            means as the family or the file says.
        second_time: what a MeanFlow gets beside its time t: ``t-r``, or ``r`` itself; None means as the file says, or
            ``t-r`` for presets.
        weights: which set of weights of a file is taken, such as ``ema``; None means the averaged one, or the only one.
        guidance_channels: how many latent channels guidance acts on, or ``all``; None means as the reference does.
        random_weights: the seed of a preset's random weights.
        conditioning: a preset's ``adaln-zero``, ``adaln``, ``cross-attention`` or ``in-context``; None means
            adaln-zero.
        classes: the number of classes, without the null class; None means as the checkpoint says, or 1000 for presets.
        fixed_variance: whether a preset has no learned variance.
        sizes: heights and widths of images in pixels; an empty tuple means the trained size.
        decode_tiles: sides in latent pixels of decoder tiles to record, for engines that are built for tiles; None
            means 32 where there is a decoder.
        encoder: whether the autoencoder's encoder is exported too, for image-to-image.
        verify: whether the bundle is compared with PyTorch on ONNX Runtime at the end.
        keep_fp16: with ``int8`` or ``fp8``, units whose linear layers stay FP16, such as ``blocks.17.mlp.fc2`` or
            ``blocks.0``, and files that list such units.
        calibration_images: with ``int8`` or ``fp8``, the number of images on whose trajectories ranges are found; None
            means 32 of a small model and 4 of others, and no more than there are classes.
        calibration_seed: with ``int8`` or ``fp8``, the seed of those images' noise.

    Raises:
        CheckpointError: an argument is out of its range, or does not fit the others.
        SamplingError: a tile is too small.
    """

    source: str
    output: Path | None = None
    precision: str = "fp32"
    keep_fp32: tuple[str, ...] = ()
    family: str | None = None
    heads: int | None = None
    vae: str | None = None
    vae_scaling: tuple[float, ...] | None = None
    latent_stats: str | None = None
    variant: str | None = None
    sha256: str | None = None
    path: str | None = None
    time: str | None = None
    second_time: str | None = None
    weights: str | None = None
    guidance_channels: int | Literal["all"] | None = None
    random_weights: int | None = None
    conditioning: str | None = None
    classes: int | None = None
    fixed_variance: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    decode_tiles: tuple[int, ...] | None = None
    encoder: bool = False
    verify: bool = True
    keep_fp16: tuple[str, ...] = ()
    calibration_images: int | None = None
    calibration_seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in EXPORTED:
            raise CheckpointError(f"precision {self.precision!r} is not implemented; expected {' or '.join(EXPORTED)}")
        self._check_quantized()
        if self.keep_fp32 and self.precision == Precision.FP32:
            raise CheckpointError(
                f"units to keep in FP32 ({self.keep_fp32[0]}): all units of FP32 graphs are FP32; choose fp16 or "
                "bf16, or name no units"
            )
        for name, value in (("heads", self.heads), ("classes", self.classes)):
            if value is not None and value < 1:
                raise CheckpointError(f"{name} {value}: expected a whole number from 1")
        channels = self.guidance_channels
        if (isinstance(channels, str) and channels != ALL) or (isinstance(channels, int) and channels < 1):
            raise CheckpointError(f"guidance channels {channels!r}: expected a number from 1, such as 3, or {ALL!r}")
        scaling = self.vae_scaling
        if scaling is not None and not (len(scaling) in (1, 2) and all(map(math.isfinite, scaling)) and scaling[0] > 0):
            shown = " ".join(f"{value:g}" for value in scaling)
            raise CheckpointError(f"VAE scaling {shown}: expected a factor above 0, such as 0.18215, and maybe a shift")
        for tile in self.decode_tiles or ():
            check_tile(tile)

    def _check_quantized(self) -> None:
        quantized, word = self.precision in QUANTIZED, self.precision.upper()
        if quantized and self.keep_fp32:
            raise CheckpointError(
                f"units to keep in FP32 ({self.keep_fp32[0]}) in {word} graphs: their units are {word} or FP16; name "
                "them with --keep-fp16, or export with --fp16 --keep-fp32"
            )
        if self.keep_fp16 and not quantized:
            raise CheckpointError(
                f"units to keep in FP16 ({self.keep_fp16[0]}) in {self.precision} graphs: only INT8 and FP8 graphs "
                "have others; add --int8 or --fp8, or name no units"
            )
        if not quantized and (self.calibration_images is not None or self.calibration_seed):
            raise CheckpointError(
                f"calibration of {self.precision} graphs: only INT8 and FP8 graphs are calibrated; add --int8 or --fp8"
            )
        if self.calibration_images is not None and not 1 <= self.calibration_images <= MOST_IMAGES:
            raise CheckpointError(
                f"calibration images {self.calibration_images}: expected a whole number from 1 to {MOST_IMAGES}"
            )
        if not 0 <= self.calibration_seed < 1 << 63:
            raise CheckpointError(f"calibration seed {self.calibration_seed}: expected a whole number from 0")

    @property
    def bundle_path(self) -> Path:
        """Where the bundle is written."""
        if self.output is not None:
            return self.output
        path = Path(self.source)
        name = self.source.replace("@", "-").replace("/", "-")
        if kind_of(path) is not None:
            name = named(path).stem if path.is_file() else named(path).name
        return Path(f"{name or 'checkpoint'}-{self.precision}.bundle")

    @property
    def checkpoint(self) -> Source:
        """The part of the request that names and describes the checkpoint."""
        channels = self.guidance_channels
        return Source(
            name=self.source,
            random_seed=self.random_weights,
            family=self.family,
            heads=self.heads,
            autoencoder=self.vae,
            autoencoder_scaling=self.vae_scaling,
            latent_stats=self.latent_stats,
            variant=self.variant,
            sha256=self.sha256,
            path=self.path,
            time=self.time,
            second_time=self.second_time,
            weights=self.weights,
            guidance_channels=0 if isinstance(channels, str) else channels,
            image_sizes=self.sizes,
            conditioning=self.conditioning,
            classes=self.classes,
            learned_variance=False if self.fixed_variance else None,
            tiles=self.decode_tiles,
        )

    def calibration_of(self, precision: PrecisionSpec) -> CalibrationRequest | None:
        """How graphs of the policy of ``read_precision`` are calibrated; None if nothing in them is quantized."""
        from dit_export.reference.record_settings import CalibrationRequest

        if precision.name not in QUANTIZED:
            return None
        return CalibrationRequest(self.calibration_seed, self.calibration_images, precision.keep_fp16)

    def read_precision(self) -> PrecisionSpec:
        """The precision policy of the graphs; it reads the files that ``keep_fp32`` names.

        Raises:
            CheckpointError: such a file is missing or is no list of units.
        """
        from dit_export.graphs.precision import (
            FP32,
            make_bf16_policy,
            make_fp16_policy,
            make_quantized_policy,
            read_keep_list,
        )

        if self.precision in QUANTIZED:
            return make_quantized_policy(Precision(self.precision), read_keep_list(self.keep_fp16, "--keep-fp16"))
        if self.precision == Precision.FP32:
            return FP32
        make_policy = make_bf16_policy if self.precision == Precision.BF16 else make_fp16_policy
        return make_policy(read_keep_list(self.keep_fp32))
