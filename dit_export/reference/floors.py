"""PyTorch's own errors: how far the unpatched reference in FP32, FP16 and BF16 is from a higher precision.

They are the denominators of ``dit_runtime.verify.budget``, which judges an engine by how much worse than PyTorch it is.
The error of FP32 is measured against FP64, the errors of FP16 and BF16 against the FP32 records. The modules compute in
the measured precision. Guidance and sampler around them stay FP32 (around FP64 modules, FP64), as they do in graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit_export.reference.pipeline import Reference
from dit_runtime.bundle.reader import CONDITIONS, ENCODER, STRONG, TILE, UNGUIDED
from dit_runtime.verify.conditions import project, relative_norms, signs_for
from dit_runtime.verify.metrics import relative_l2

PRECISIONS = {
    "fp32": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float16,
    "fp8": torch.float16,
}  # by name, the dtype that is run to measure it; the modules of an INT8 or FP8 export emulate it in each
RUNS = 3  # of a trajectory that draws noise, in FP16 and BF16; of a large model, whose records have one image, one
MOVE = 2.0**-18  # of the further runs' first latents, below every error in FP16
CHUNK = 64  # images in one evaluation

Record = Mapping[str, Any]


def floors_of(
    reference: Reference,
    records: Mapping[str, Record],
    samplers: Sequence[str],
    measured: int,
    steps: int,
    precisions: Sequence[str],
    advance: Callable[[], None],
    fp16_autoencoder: bool = False,
) -> dict[str, dict[str, list[float]]]:
    """Relative L2 errors by precision and record; see ``Manifest.floors``.

    A series that is not finite, because PyTorch in FP16 overflows, is left out: it is no yardstick.

    Args:
        reference: the modules.
        records: their results in FP32.
        samplers: the samplers of the recorded trajectories; the sampler that draws noise is last.
        measured: the number of trajectories whose single steps are measured as well.
        steps: the number of steps that are measured. The first free-running trajectory is measured in whole.
        precisions: the names of ``PRECISIONS`` to measure.
        advance: called after each measurement, ``count_measurements`` times.
        fp16_autoencoder: whether the autoencoder is FP16 where the network is BF16.
    """
    floors = {}
    for name in precisions:
        with reference.at_precision(PRECISIONS[name], torch.float16 if fp16_autoencoder and name == "bf16" else None):
            found = dict(_measure_floors(reference, records, samplers, measured, steps, advance))
        floors[name] = {key: [_round(value) for value in series] for key, series in found.items() if _is_finite(series)}
    return floors


def count_measurements(whole: int, steps: int, measured: int, precisions: Sequence[str], samplers: int = 2) -> int:
    """How many times ``floors_of`` advances for trajectories of ``whole`` steps, for the progress bar.

    The trajectory at a strong guidance scale advances once more for each of its steps.
    """
    return len(precisions) * (4 + whole + samplers * steps + measured)


def _measure_floors(
    reference: Reference,
    records: Mapping[str, Record],
    samplers: Sequence[str],
    measured: int,
    steps: int,
    advance: Callable[[], None],
) -> Iterator[tuple[str, list[float]]]:
    yield from _measure_network(reference, records, advance)
    for name in samplers:
        record = records[name]
        if name in samplers[:measured]:
            latents, denoised = _measure_single_steps(reference, name, record, steps)
            yield f"{name} step", latents
            yield f"{name} denoised", denoised
            advance()
        if name != samplers[0]:
            yield name, _measure_chaotic(reference, name, record, steps, advance)
            continue
        trajectory = list(_run_trajectory(reference, name, record, advance))
        yield name, _measure_trajectory(trajectory, record)
        end = trajectory[-1]
    yield UNGUIDED, _measure_chaotic(reference, samplers[-1], records[UNGUIDED], steps, advance)
    if STRONG not in records:  # a policy's, which has no images either
        advance()
        return
    record = records[STRONG]
    strong = list(_run_trajectory(reference, samplers[0], record, advance))
    yield STRONG, _measure_trajectory(strong, record)
    yield f"{STRONG} image", _measure_each(reference.decode(strong[-1]), record["decoded"])
    yield from _measure_autoencoder(reference, records, end)
    advance()


def _measure_chaotic(
    reference: Reference, name: str, record: Record, steps: int, advance: Callable[[], None]
) -> list[float]:
    """The errors along a trajectory that draws noise, in each of its first ``steps`` steps: the largest of a few runs.

    Where such a trajectory is chaotic, two runs in one precision are as far from each other as from FP32, and the error
    of one run is chance. In the further runs the first latents are moved by less than FP16's errors, so that roundings
    differ. Where nothing is chaotic, the runs have nearly the same errors.
    """
    several = reference.dtype in (torch.float16, torch.bfloat16) and len(record["labels"]) > 1
    errors = []
    for run in range(RUNS if several else 1):
        trajectory = _run_trajectory(reference, name, record, (lambda: None) if run else advance, run * MOVE)
        errors.append(_measure_trajectory(list(islice(trajectory, steps)), record))
    return [max(each) for each in zip(*errors, strict=True)]


def _measure_network(
    reference: Reference, records: Mapping[str, Record], advance: Callable[[], None]
) -> Iterator[tuple[str, list[float]]]:
    record = records["blocks"]
    with reference.observe() as seen:
        _predict_record(reference, record)
    stride, tokens = int(record["token_stride"]), reference.spec.tokens
    yield "embedding", [_measure_error(seen.tokens[0][:1, :tokens:stride], record["tokens"])]
    outputs = [found[:, ::stride] for found in seen.blocks]
    yield "blocks", [_measure_error(found, wanted) for found, wanted in zip(outputs, record["outputs"], strict=True)]
    advance()
    for name in ("forward_1", "forward_2"):
        record = records[name]
        with reference.observe() as seen:
            e, v = _predict_record(reference, record)
        yield name, _measure_each(e, record["e"])
        if reference.spec.learned_variance:
            yield f"{name} variance", _measure_each(v, record["v"])
        advance()
    table = reference.table_from_observation(seen)
    wanted = records["conditioner"]["table"]
    yield "conditioner", [_measure_error(table[:, index], wanted[:, index]) for index in range(wanted.shape[1])]
    record = records[CONDITIONS]
    found, _ = project_conditions(reference, record["timesteps"], record["labels"])
    yield CONDITIONS, [float(relative_norms(found - record["projections"], record["norms"]).max())]


def project_conditions(reference: Reference, timesteps: Any, labels: Any) -> tuple[Any, Any]:
    """Projections ``[R, …]`` and norms ``[R]`` of the conditions' rows, in float64; see ``verify/conditions.py``."""
    projections, norms, signs = [], [], None
    for first in range(0, len(timesteps), CHUNK):
        part = slice(first, first + CHUNK)
        table = reference.compute_table(torch.from_numpy(timesteps[part]), torch.from_numpy(labels[part])).double()
        rows = table.flatten(1).numpy()
        signs = signs_for(rows.shape[1]) if signs is None else signs
        projections.append(project(rows, signs))
        norms.append(np.linalg.norm(rows, axis=1))
    return np.concatenate(projections), np.concatenate(norms)


def _measure_autoencoder(
    reference: Reference, records: Mapping[str, Record], end: Tensor
) -> Iterator[tuple[str, list[float]]]:
    """Errors of images: from the records' latents, and from ``end``, the last latents of the measured trajectory."""

    def measure_decoder(latents: Tensor, record: Record) -> list[float]:
        return _measure_each(reference.decode(latents), record["decoded"])

    record = records["images"]
    yield "decoder", measure_decoder(_tensor_from_array(reference, record["latents"]), record)
    yield "image", measure_decoder(end, record)
    for name in (name for name in records if name.startswith(TILE)):
        record = records[name]
        yield f"{name} decoder", measure_decoder(_tensor_from_array(reference, record["latents"]), record)
        count, _, height, width = record["latents"].shape
        yield f"{name} image", measure_decoder(end[:count, :, :height, :width], record)
    if ENCODER in records:
        record = records[ENCODER]
        found = reference.encode(record["images"])
        yield "encoder", [_measure_error(value, record[key]) for key, value in found.items()]


def _predict_record(reference: Reference, record: Record) -> tuple[Tensor, Tensor]:
    times, labels = torch.from_numpy(record["timesteps"]), torch.from_numpy(record["labels"])
    return reference.predict(_tensor_from_array(reference, record["latents"]), times, labels, float(record["guidance"]))


def _measure_single_steps(
    reference: Reference, name: str, record: Record, steps: int
) -> tuple[list[float], list[float]]:
    """The errors of the next latents and of the denoised ones, in each of the first ``steps`` steps.

    Each step starts from the record's latents, so it shows the error that this step adds.
    """
    generators = _restore_generators(reference, record)
    loop = list(reference.loop(name, int(record["steps"]), generators))[:steps]
    batch = len(record["labels"])
    z = _tensor_from_array(reference, np.concatenate(record["latents"][: len(loop)]))  # (steps·B, C, H, W)
    times = torch.tensor([step.t for step in loop], dtype=torch.float32).repeat_interleave(batch, dim=0)
    labels = torch.from_numpy(record["labels"]).repeat(len(loop))
    parts = zip(z.split(CHUNK), times.split(CHUNK), labels.split(CHUNK), strict=True)
    evaluated = [reference.predict(*part, float(record["guidance"])) for part in parts]
    e, v = (torch.cat(outputs).split(batch) for outputs in zip(*evaluated, strict=True))
    following, denoised = [], []
    for index, step in enumerate(loop):
        after, clean = step.advance(e[index], v[index], z[index * batch : (index + 1) * batch])
        following.append(_measure_error(after, record["latents"][index + 1]))
        denoised.append(_measure_error(clean, record["denoised"][index]))
    return following, denoised


def _run_trajectory(
    reference: Reference, name: str, record: Record, advance: Callable[[], None], move: float = 0.0
) -> Iterator[Tensor]:
    """The latents after each step of a free-running trajectory that starts from the record's first latents.

    ``move``: by which the first latents are moved, relative to their size.
    """
    generators = _restore_generators(reference, record)
    z, labels = _tensor_from_array(reference, record["latents"][0]), torch.from_numpy(record["labels"])
    z = z * (1 + move)
    for step in reference.loop(name, int(record["steps"]), generators):
        e, v = reference.predict(z, step.times_of(len(z)), labels, float(record["guidance"]))
        z, _ = step.advance(e, v, z)
        advance()
        yield z


def _restore_generators(reference: Reference, record: Record) -> list[torch.Generator]:
    """The record's generators, in the state after the first latents were drawn from them."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in record["seeds"]]
    randn_tensor(record["latents"][0].shape, generator=generators)
    return generators


def _tensor_from_array(reference: Reference, array: Any) -> Tensor:
    return torch.from_numpy(array).to(reference.table_dtype)


def _measure_error(found: Tensor, wanted: Any) -> float:
    return relative_l2(found.double().numpy(), wanted)


def _measure_trajectory(trajectory: Sequence[Tensor], record: Record) -> list[float]:
    return [_measure_error(found, wanted) for found, wanted in zip(trajectory, record["latents"][1:], strict=False)]


def _measure_each(found: Tensor, wanted: Any) -> list[float]:
    return [_measure_error(one, other) for one, other in zip(found, wanted, strict=True)]


def _is_finite(series: list[float]) -> bool:
    return all(math.isfinite(value) for value in series)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
