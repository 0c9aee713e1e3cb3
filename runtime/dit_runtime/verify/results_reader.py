"""Read what ``dit-verify --json`` printed, here or on another machine; a damaged or foreign file is one clear line."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.decode import DecodeError, Positive, decode, optional, read_json
from dit_runtime.core.errors import ResultsError
from dit_runtime.core.images import image_from_bytes
from dit_runtime.core.reading import RESULTS_BYTES
from dit_runtime.verify.coverage import Coverage
from dit_runtime.verify.results import KEPT_IMAGES, Images, Results
from dit_runtime.verify.rung import Rung, Verification
from dit_runtime.verify.verdicts import Number, RungRecord

MOST_PIXELS = 89_000_000  # of an image


@dataclass(frozen=True)
class ImageRecord:
    """One image of the engine and the reference's, each a PNG file in base64."""

    engine: str
    reference: str


@dataclass(frozen=True)
class CoverageRecord:
    """``Coverage`` as ``Coverage.as_json`` gives it."""

    shapes: dict[str, tuple[tuple[Positive, Positive], ...]]
    counts: dict[str, tuple[int, int]]
    left: tuple[str, ...]


@dataclass(frozen=True)
class ResultsRecord:
    """The results as ``Results.as_json`` gives them."""

    bundle: str
    model: str
    precision: str
    reference: str
    engine: str
    image_size: tuple[Positive, Positive]
    quick: bool
    passed: bool
    magnitudes: dict[str, float]
    coverage: CoverageRecord
    guidance: float
    rungs: tuple[RungRecord, ...]
    image_sizes: tuple[tuple[Positive, Positive], ...]
    machine: dict[str, str]
    environment: dict[str, Any]
    files: dict[str, str]
    images: tuple[ImageRecord, ...]
    actions: bool = optional(False)


def read_results(path: Path) -> Results:
    """Read a file that ``dit-verify --json`` printed.

    Raises:
        ResultsError: the file cannot be read, is damaged, or holds something else.
    """
    try:
        return results_from_record(decode(ResultsRecord, read_json(path, RESULTS_BYTES)))
    except DecodeError as error:
        raise ResultsError(f"{path}: {error}; make the file with dit-verify BUNDLE --json > FILE") from error


def results_from_record(record: ResultsRecord) -> Results:
    """The results that were printed.

    Raises:
        DecodeError: an image is damaged, or a verdict is not what its numbers come to.
    """
    rungs = tuple(_rung_from_record(rung, f"rungs[{index}]") for index, rung in enumerate(record.rungs))
    if not rungs:
        raise DecodeError("rungs: got an empty list, expected a rung at least")
    _check_verdict(record.passed, all(rung.passed for rung in rungs), "")
    verification = Verification(
        bundle=record.bundle,
        model=record.model,
        precision=record.precision,
        reference=record.reference,
        engine=record.engine,
        image_size=record.image_size,
        quick=record.quick,
        rungs=rungs,
        images=_images_from_records(record.images),
        magnitudes=record.magnitudes,
        guidance=record.guidance,
        actions=record.actions,
        coverage=Coverage(record.coverage.shapes, record.coverage.counts, record.coverage.left),
    )
    return Results(verification, record.image_sizes, record.machine, record.environment, record.files)


def _rung_from_record(record: RungRecord, where: str) -> Rung:
    rung = Rung(
        name=record.name,
        value=float(record.value),
        limit=float(record.limit),
        unit=record.unit,
        detail=record.detail,
        ratio=_optional(record.ratio),
        threshold=_optional(record.threshold),
        first_over=record.first_over,
        metrics={name: float(value) for name, value in record.metrics.items()},
        axis=record.axis,
        series={name: [float(value) for value in values] for name, values in record.series.items()},
    )
    _check_verdict(record.passed, rung.passed, f"{where}.")
    return rung


def _optional(number: Number | None) -> float | None:
    return None if number is None else float(number)


def _check_verdict(printed: bool, computed: bool, where: str) -> None:
    """The page must not say "pass" where the machine that verified said "FAIL"."""
    if printed is not computed:
        raise DecodeError(f"{where}passed: got {printed}, expected {computed}, which the numbers come to")


def _images_from_records(records: tuple[ImageRecord, ...]) -> Images | None:
    """The engine's images and the reference's, uint8 ``[N, H, W, 3]`` each; None where there are none."""
    if len(records) > KEPT_IMAGES:
        raise DecodeError(f"images: got {len(records)}, expected {KEPT_IMAGES} at most")
    pairs = [
        [_pixels_from_png(png, f"images[{index}].{side}") for side, png in asdict(record).items()]
        for index, record in enumerate(records)
    ]
    shapes = {pixels.shape for pair in pairs for pixels in pair}
    if len(shapes) > 1:
        raise DecodeError(f"images: got {len(shapes)} sizes, expected one size")
    if not pairs:
        return None
    found, expected = (np.stack(side) for side in zip(*pairs, strict=True))
    return found, expected


def _pixels_from_png(text: str, where: str) -> NDArray[np.uint8]:
    """The pixels ``[H, W, 3]`` of a PNG file in base64."""
    try:
        with image_from_bytes(base64.b64decode(text, validate=True), ("PNG",), MOST_PIXELS) as image:
            return np.asarray(image.convert("RGB"), np.uint8)
    except Exception as error:  # Pillow raises errors of any kind for damaged files
        raise DecodeError(f"{where}: got a damaged image, expected a PNG file in base64") from error
