"""The results of ``dit-verify``: ``--json`` prints them, and the HTML page is made from them on any machine.

The JSON holds all that the page shows, so that the machine that verifies needs no packages for the page, and the
machine that makes the page needs neither the bundle nor a backend.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.machine import describe_machine
from dit_runtime.verify.auto import open_to_verify
from dit_runtime.verify.rung import Verification
from dit_runtime.verify.verdicts import join_rungs, verify_each_size

KEPT_IMAGES = 8  # enough to see a fault; the rungs measure all images

Size = tuple[int, int]
Images = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class Results:
    """All that ``dit-verify --json`` prints.

    Attributes:
        verification: of the bundle's first size, but its rungs are those of all sizes; it has the first
            ``KEPT_IMAGES`` images.
        image_sizes: height and width of each size that was verified.
        machine: what tells this machine from another.
        environment: processor, libraries, power mode and clocks.
        files: the SHA-256 of each of the bundle's files.
    """

    verification: Verification
    image_sizes: tuple[Size, ...]
    machine: Mapping[str, Any]
    environment: Mapping[str, Any]
    files: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The results as JSON values; images are PNG files in base64."""
        pairs = zip(*self.verification.images, strict=True) if self.verification.images is not None else ()
        return {
            **self.verification.as_json(),
            "image_sizes": [list(size) for size in self.image_sizes],
            "machine": dict(self.machine),
            "environment": dict(self.environment),
            "files": dict(self.files),
            "images": [{"engine": png_from_pixels(one), "reference": png_from_pixels(other)} for one, other in pairs],
        }


def verify_bundle(
    bundle: Bundle,
    engine: str = "auto",
    precision: str | None = None,
    size: Size | None = None,
    quick: bool = False,
) -> Results:
    """Verify a bundle at one image size or at each of its sizes, and store the verdicts.

    Args:
        bundle: an opened bundle.
        engine: a backend's name; ``auto`` is the engine that ``auto`` tries first, whatever its verdict.
        precision: the precision that OpenVINO computes in; None leaves the choice to the backend.
        size: height and width of the images; None verifies every size of the bundle.
        quick: leave out the rungs that say where a fault is rather than whether there is one.

    Raises:
        BundleError: a record is missing or altered, or the bundle has no such size.
        EngineError: no such backend is installed, or the engine cannot run a graph.
    """
    sizes = bundle.manifest.image_sizes if size is None else (size,)
    return results_of(bundle, verify_each_size(bundle, sizes, open_to_verify(engine, precision), quick))


def results_of(bundle: Bundle, found: Sequence[Verification]) -> Results:
    """The results of verifications of one bundle on this machine, one verification for each size."""
    images = found[0].images
    if images is not None:
        # An engine that makes images of another size has failed already, and there is no difference to show.
        images = None if images[0].shape != images[1].shape else (images[0][:KEPT_IMAGES], images[1][:KEPT_IMAGES])
    return Results(
        verification=replace(found[0], rungs=tuple(join_rungs(found)), images=images),
        image_sizes=tuple(each.image_size for each in found),
        machine=describe_machine(),
        environment=describe_environment(),
        files={name: spec.sha256 for name, spec in bundle.manifest.files.items()},
    )


def png_from_pixels(pixels: NDArray[np.uint8]) -> str:
    """Pixels ``[H, W, 3]`` as a PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
