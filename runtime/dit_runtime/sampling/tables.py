"""Whether a sampler table fits the bundle that it is used with, and what it was fitted for."""

from __future__ import annotations

from collections.abc import Sequence

from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.fitted import FittedFor
from dit_runtime.samplers.guidance import Guidance
from dit_runtime.samplers.schedule import Schedule


def check_table(table: Schedule, manifest: Manifest, digest: str) -> None:
    """Check a user's schedule against the bundle with this manifest and digest.

    Raises:
        SamplingError: the schedule is for another kind of model, or was fitted to another bundle: its rows follow that
            network's output.
    """
    fitted, last = table.fitted, 1 if manifest.diffusion.path else len(manifest.diffusion.betas) - 1
    if fitted is not None and fitted.bundle != digest:
        raise SamplingError(
            f"sampler table {table.sampler}: it was fitted to bundle {fitted.bundle[:12]}… ({fitted.model}), this one "
            f"is {digest[:12]}…; fit one for this bundle with dit-tune, or use a named sampler"
        )
    if table.times.shape[1] != manifest.model.times:
        raise SamplingError(
            f"a sampler table with {_count_times(table.times.shape[1])} in a row: this model gets "
            f"{_count_times(manifest.model.times)}; the sampler table is for another kind of model"
        )
    if table.timesteps.min() < 0 or table.timesteps.max() > last:
        raise SamplingError(
            f"a sampler table with timesteps {table.timesteps.min():g} to {table.timesteps.max():g}: this model's "
            f"timesteps are 0 to {last}; the sampler table is for another kind of model"
        )
    if table.clips and not manifest.model.clips:
        raise SamplingError(
            "a sampler table with rows of 19 numbers, which clip: the step of this bundle does not clip, and takes 17; "
            "export it from a checkpoint whose scheduler has clip_sample true, or use a table without a clip"
        )
    if table.uses_variance and not manifest.model.learned_variance:
        raise SamplingError(
            "a sampler table that uses the learned variance (h is not 0): this model has no learned variance"
        )


def _count_times(count: int) -> str:
    return "one time" if count == 1 else f"{count} times"


def describe_difference(
    fitted: FittedFor, manifest: Manifest, guidances: Sequence[Guidance], from_image: bool
) -> str | None:
    """What is asked of a table that it was not fitted for, in one line; None where it was fitted for all of it."""
    size = f"{fitted.size[0]}x{fitted.size[1]}"
    asked = []
    if others := sorted({each.scale for each in guidances} - set(fitted.guidance)):
        asked.append(f"guidance {', '.join(f'{scale:g}' for scale in others)}")
    if any(each.interval != fitted.guidance_interval for each in guidances):
        asked.append("another guidance interval")
    if any(each.shape != "constant" for each in guidances):
        asked.append("a guidance schedule")
    if manifest.image_size != fitted.size:
        asked.append(f"size {manifest.image_size[0]}x{manifest.image_size[1]}")
    if from_image:
        asked.append("an image to start from")
    if not asked:
        return None
    scales = ", ".join(f"{scale:g}" for scale in fitted.guidance)
    return (
        f"the sampler table was fitted for guidance {scales} at {size} from noise, and is used with "
        f"{' and '.join(asked)}: its images may be further from {fitted.teacher}'s than its record says"
    )
