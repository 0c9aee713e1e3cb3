"""The exporter's Python API: ``export`` and ``verify``. Importing it imports no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_export.request import ExportRequest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.verify.rung import Rung, Verification

CPU_ENGINE = "onnxruntime"  # on which an export is compared: it is wherever a bundle can be exported
REQUIRED = ("torch", "diffusers", "onnxscript")


@dataclass(frozen=True)
class ExportResult:
    """A bundle that was exported, and how its graphs compare with PyTorch.

    Attributes:
        bundle: the bundle, opened.
        verifications: the comparison on ONNX Runtime at each size; empty if there was none.
        not_verified: why there was no comparison although it was asked for, else None.
    """

    bundle: Bundle
    verifications: tuple[Verification, ...] = ()
    not_verified: str | None = None

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self.bundle.path

    @property
    def digest(self) -> str:
        """The bundle's digest, in hexadecimal digits."""
        return self.bundle.digest

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def engine(self) -> str | None:
        """The name of the engine of the comparison; None if there was none."""
        return self.verifications[-1].engine if self.verifications else None

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The comparisons of all sizes, from the bottom up; with several sizes each name begins with its size."""
        from dit_runtime.verify.verdicts import join_rungs

        return tuple(join_rungs(self.verifications)) if self.verifications else ()

    @property
    def passed(self) -> bool | None:
        """Whether the bundle matches PyTorch; None if it was not compared."""
        return all(one.passed for one in self.verifications) if self.verifications else None

    @property
    def weights_bytes(self) -> dict[str, int]:
        """The size of each graph's weights file; graphs may share a file."""
        return {name: self.manifest.files[graph.weights].bytes for name, graph in self.manifest.graphs.items()}

    def as_json(self) -> dict[str, Any]:
        """Plain values, as ``dit-export --json`` prints them."""
        return {
            "bundle": str(self.path),
            "digest": self.digest,
            "source": self.manifest.source.name,
            "precision": self.manifest.precision.name,
            "weights_bytes": self.weights_bytes,
            "engine": self.engine,
            "passed": self.passed,
            "rungs": [rung.as_json() for rung in self.rungs],
        }


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    precision: str = "fp32",
    keep_fp32: Sequence[str | os.PathLike[str]] = (),
    family: str | None = None,
    heads: int | None = None,
    vae: str | os.PathLike[str] | None = None,
    vae_scaling: Sequence[float] | None = None,
    latent_stats: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    sha256: str | None = None,
    path: str | None = None,
    time: str | None = None,
    second_time: str | None = None,
    weights: str | None = None,
    guidance_channels: int | Literal["all"] | None = None,
    random_weights: int | None = None,
    conditioning: str | None = None,
    classes: int | None = None,
    fixed_variance: bool = False,
    sizes: Sequence[tuple[int, int]] = (),
    decode_tiles: Sequence[int] | None = None,
    encoder: bool = False,
    verify: bool = True,
    keep_fp16: Sequence[str | os.PathLike[str]] = (),
    calibration_images: int | None = None,
    calibration_seed: int = 0,
) -> ExportResult:
    """Export a checkpoint to a bundle: ONNX graphs, golden records of the PyTorch reference, and a manifest.

    Nothing is printed except progress bars on stderr, where stderr is a terminal. An error leaves nothing behind.

    Example:
        >>> result = export("facebook/DiT-XL-2-256", "dit-xl.bundle", precision="fp16")
        >>> result.passed, result.manifest.image_size
        (True, (256, 256))

    Args:
        source: a diffusers ``DiTPipeline`` folder or hub id (``owner/name`` or ``owner/name@revision``); a ``.pt`` or
            ``.safetensors`` file with the official names; or with ``random_weights`` a preset, such as
            ``DiT-XL/2-256``.
        output: the bundle's folder; a bundle that is there is replaced. None means ``NAME-PRECISION.bundle`` in the
            working directory.
        precision: ``fp32``, ``fp16`` or ``bf16`` for strongly typed graphs, ``int8`` or ``fp8``: FP16 graphs
            whose blocks' linear layers multiply INT8 or FP8.
        keep_fp32: with ``fp16`` or ``bf16``, units that stay FP32, such as ``blocks.17.attn``, and files that list such
            units.
        family: ``diffusers``, ``official``, ``sit``, ``repa``, ``lightningdit``, ``meanflow`` or ``multi-task-dit``;
            None means as a file's parameters, its training arguments or ``time`` say, else official for files, as the
            name says for presets, and diffusers otherwise.
        heads: the number of attention heads of a file whose shapes are not the paper's.
        vae: the autoencoder's folder, file or hub id; None means the pipeline's own, or for files the official one.
        vae_scaling: of an autoencoder that is a file: its latents' scaling factor, and maybe their shift.
        latent_stats: a file with mean and deviation of each channel by which the latents of a file's model were
            normalized; in place of the autoencoder's own scaling.
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
        sizes: heights and widths of images in pixels; an empty sequence means the trained size.
        decode_tiles: sides in latent pixels of decoder tiles to record, for engines that are built for tiles; None
            means 32 where there is a decoder.
        encoder: whether the autoencoder's encoder is exported too, for image-to-image.
        verify: whether the bundle is compared with PyTorch on ONNX Runtime at the end. A bundle that fails the
            comparison is kept; see ``ExportResult.passed``.
        keep_fp16: with ``int8`` or ``fp8``, units whose linear layers stay FP16, such as ``blocks.17.mlp.fc2`` or
            ``blocks.0``, and files that list such units.
        calibration_images: with ``int8`` or ``fp8``, the number of images on whose trajectories ranges are found; None
            means 32 of a small model and 4 of others, and no more than there are classes.
        calibration_seed: with ``int8`` or ``fp8``, the seed of those images' noise.

    Raises:
        CheckpointError: the checkpoint cannot be read or is not supported, or an argument does not fit it.
        OutputError: ``output`` cannot be written, or holds something that is not a bundle.
        ParityError: the PyTorch reference itself is unusable.
        EngineError: a package that exporting needs is not installed.
    """
    request = ExportRequest(
        source=os.fspath(source),
        output=None if output is None else Path(output),
        precision=precision,
        keep_fp32=tuple(os.fspath(item) for item in keep_fp32),
        family=family,
        heads=heads,
        vae=None if vae is None else os.fspath(vae),
        vae_scaling=None if vae_scaling is None else tuple(vae_scaling),
        latent_stats=None if latent_stats is None else os.fspath(latent_stats),
        variant=variant,
        sha256=sha256,
        path=path,
        time=time,
        second_time=second_time,
        weights=weights,
        guidance_channels=guidance_channels,
        random_weights=random_weights,
        conditioning=conditioning,
        classes=classes,
        fixed_variance=fixed_variance,
        sizes=tuple((height, width) for height, width in sizes),
        decode_tiles=None if decode_tiles is None else tuple(decode_tiles),
        encoder=encoder,
        verify=verify,
        keep_fp16=tuple(os.fspath(item) for item in keep_fp16),
        calibration_images=calibration_images,
        calibration_seed=calibration_seed,
    )
    return export_request(request)


def export_request(request: ExportRequest) -> ExportResult:
    """``export`` with its arguments in one object; it raises the same errors."""
    check_installed()
    from dit_export.bundle import bundle_from_checkpoint

    precision = request.read_precision()
    calibration = request.calibration_of(precision)
    bundle = bundle_from_checkpoint(request.checkpoint, request.bundle_path, precision, request.encoder, calibration)
    if not request.verify:
        return ExportResult(bundle)
    try:
        return ExportResult(bundle, _verify(bundle, CPU_ENGINE))
    except EngineError as error:
        return ExportResult(bundle, not_verified=str(error))


def verify(
    bundle: str | os.PathLike[str] | Bundle,
    engine: str = "auto",
    *,
    sizes: Sequence[tuple[int, int]] = (),
    precision: str | None = None,
    quick: bool = False,
    store: str | os.PathLike[str] | None = None,
) -> tuple[Verification, ...]:
    """Replay a bundle's golden records on an engine and compare with the results of PyTorch. Torch is not needed.

    The verdicts are stored, so that ``auto`` and ``Pipeline`` find them.

    Example:
        >>> all(one.passed for one in verify("dit-xl.bundle", "openvino"))
        True

    Args:
        bundle: a bundle, or its folder.
        engine: ``auto``, the engine that ``auto`` tries first here, or a name as ``dit-verify --engine`` takes it.
        sizes: heights and widths of images in pixels; an empty sequence means each size of the bundle.
        precision: the precision that the engine computes in; None means the bundle's own, or the nearest that the
            engine has.
        quick: find out only whether there is a fault: leave out single steps and the conditioner, which tell where.
        store: where engines, verdicts and prepared graphs are kept; None means the bundle's own folder. It is not used
            for a bundle that is already open.

    Returns:
        One verification for each size; each has its rungs and whether it ``passed``.

    Raises:
        BundleError: the bundle is missing, incomplete or altered, or has no graphs for a size.
        EngineError: the engine is unknown, not installed, or cannot run the bundle here.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(Path(bundle), None if store is None else Path(store))
    bundle.check()
    return _verify(bundle, engine, sizes, precision, quick)


def _verify(
    bundle: Bundle,
    engine: str,
    sizes: Sequence[tuple[int, int]] = (),
    precision: str | None = None,
    quick: bool = False,
) -> tuple[Verification, ...]:
    """``verify`` of a bundle whose files were checked, or were written just now."""
    from dit_runtime.verify.auto import open_to_verify
    from dit_runtime.verify.verdicts import verify_each_size

    sizes = tuple(sizes) or bundle.manifest.image_sizes
    return tuple(verify_each_size(bundle, sizes, open_to_verify(engine, precision), quick))


def check_installed() -> None:
    """Check that the packages that exporting needs are installed.

    Raises:
        EngineError: one of them is not.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(f"{' and '.join(missing)} not installed; pip install 'dit-export[export]'")
