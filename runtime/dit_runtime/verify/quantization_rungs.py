"""The rungs of an INT8 or FP8 bundle: whether its scales are those of its calibration, and what quantization costs.

All other rungs compare an engine with PyTorch's own INT8 or FP8, which has the same scales: they cannot see that a
scale is wrong, only that an engine computes something else. These compare with what does not depend on the engine.
"""

from __future__ import annotations

import math

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import FORMATS, factors_by_layer, linears_of, normed_layers, stores_factors
from dit_runtime.bundle.reader import CALIBRATION, UNQUANTIZED
from dit_runtime.bundle.stored_numbers import numbers_of_graph
from dit_runtime.core.errors import BundleError
from dit_runtime.verify.budget import FP16_MAX
from dit_runtime.verify.image_rungs import worst_psnr
from dit_runtime.verify.metrics import relative_l2
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung

LEAST_SCALE = 2.0**-24  # FP16's least number above 0
FIRST = "blocks.0.attn.qkv"


def ranges(replay: Replay) -> Rung:
    """Each layer's scale, which must map the largest |x| of calibration, at all sizes and timesteps, to 127 or 448.

    A smaller scale clips numbers that the model has, a larger one wastes levels. Nothing may be beyond it at the size
    in use. A layer whose range is the same at all timesteps was calibrated on one of them: a network's numbers differ,
    but for the first layer of an in-context model, which also reads the label's token.
    """
    manifest = replay.bundle.manifest
    calibration, record = manifest.calibration, replay.bundle.records(CALIBRATION)
    assert calibration is not None
    if len(record["timesteps"]) != calibration.steps:
        raise BundleError(
            f"{replay.bundle.path}: the record {CALIBRATION} has ranges of {len(record['timesteps'])} timesteps, "
            f"expected {calibration.steps}; export the bundle again"
        )
    names = linears_of(manifest.model.conditioning, manifest.model.depth)
    kept = [index for index, name in enumerate(names) if manifest.precision.quantizes(name)]
    numbers = manifest.precision.name
    found, largest, scales = record["ranges"][kept], record["largest"][kept], record["scales"][kept].astype(np.float64)
    exact = np.maximum(largest.astype(np.float64) / FORMATS[numbers].largest, LEAST_SCALE)
    beyond = found.max(axis=1) / np.maximum(largest, LEAST_SCALE) - 1
    single = (found == found[:, :1]).all(axis=1) & (found.shape[1] > 1)
    single &= np.array([manifest.model.conditioning != "in-context" or names[index] != FIRST for index in kept])
    rounded = np.minimum(exact, FP16_MAX).astype(np.float16)
    off = np.where(single, math.inf, np.maximum(np.abs(scales / rounded - 1), beyond))
    worst = int(np.argmax(off))
    name = names[kept[worst]]
    reached = f"{name} reaches {max(exact[worst], (1 + beyond[worst]) * exact[worst]) / scales[worst]:.3g} of its end"
    if single[worst]:
        reached = f"{name} has one range for all timesteps: calibrated on one of them; export the bundle again"
    return Rung(
        f"{numbers.upper()} ranges",
        float(off[worst]),
        replay.budget.tolerance_of(f"{numbers}_ranges"),
        "relative",
        f"{reached}; {len(kept)} layers at {calibration.steps} timesteps of "
        f"{calibration.sampler}, {len(set(calibration.labels))} classes",
        axis="layer",
        series={"error": off.tolist()},
    )


def weights(replay: Replay) -> Rung:
    """The quantization that the step stores, against the reference's own, which is computed apart: they are equal.

    Each layer's scale and factors, the weights of the LayerNorm that holds them where no adaLN does, the scale of each
    output channel of its weight, and the sum of that channel's numbers. The other rungs would not see a fault that is
    smaller than what the roundings move by chance.
    """
    manifest, record = replay.bundle.manifest, replay.bundle.records(CALIBRATION)
    found, model = numbers_of_graph(replay.bundle, "step"), manifest.model
    factors = factors_by_layer(record["factors"], model.conditioning, model.width, model.mlp_width)
    first, off, one = 0, dict[str, float](), np.ones(())
    folded = [name for name in factors if _norm_of(model.conditioning, name) is not None]
    norms = dict(zip(folded, record["norms"].reshape(-1, 2, model.width), strict=True))
    for name, scale in zip(linears_of(model.conditioning, model.depth), record["scales"], strict=True):
        if not manifest.precision.quantizes(name):
            continue
        stored = [found.get(f"{name}.{part}") for part in ("scale", "weight_scale", "weight")]
        if any(each is None for each in stored):
            off[name] = math.inf  # not quantized at all
            continue
        at, scales, integers = (np.asarray(each) for each in stored)
        rows = slice(first, first := first + len(scales))
        sums = record["weight_sums"][rows]
        norm = [found.get(f"{_norm_of(model.conditioning, name)}.{part}") for part in ("weight", "bias")]
        off[name] = max(
            # A graph stores equal weights of two LayerNorms once, under the name of one.
            *(_largest_difference(own, norms[name][i]) for i, own in enumerate(norm) if own is not None),
            _largest_difference(found.get(f"{name}.factor", one), factors[name])
            if stores_factors(model.conditioning, name)
            else 0.0,
            _largest_difference(at, scale),
            _largest_difference(scales, record["weight_scales"][rows]),
            _largest_difference(_steps_of(integers).sum(axis=0, dtype=np.int64), sums),
        )
    worst, numbers = max(off, key=lambda name: off[name]), manifest.precision.name
    return Rung(
        f"{numbers.upper()} weights",
        off[worst],
        0.0,
        "relative",
        f"{'equal' if not off[worst] else f'worst: {worst}'}; scales and "
        f"{'integers' if numbers == Precision.INT8 else 'numbers'} of {len(off)} layers",
        axis="layer",
        series={"error": list(off.values())},
    )


def _norm_of(conditioning: str, layer: str) -> str | None:
    """The name of the LayerNorm that makes a layer's input and holds its factors; None if adaLN does, or nothing."""
    block, index, name = layer.split(".", 2)
    number = normed_layers(conditioning).index(name) + 1 if name in normed_layers(conditioning) else None
    return None if number is None else f"{block}.{index}.norm{number}"


def _steps_of(numbers: Array) -> Array:
    """The numbers of a weight, INT8 or the bits of FP8, in their format's least step."""
    return numbers if numbers.dtype == np.int8 else E4M3[numbers]


def _e4m3_in_steps() -> Array:
    """Of each of the 256 bytes, the E4M3FN number that it is, by 2⁻⁹; of the two that are no numbers, 2⁴⁰.

    A byte has a sign, 4 bits e of exponent and 3 bits m of fraction: m·2⁻⁹ where e is 0, else (8 + m)·2^(e−10).
    """
    byte = np.arange(128, dtype=np.int64)
    exponent, fraction = byte >> 3, byte & 7
    positive = np.where(exponent == 0, fraction, (8 + fraction) << np.maximum(exponent - 1, 0))
    positive[127] = 1 << 40
    return np.concatenate([positive, -positive])


E4M3 = _e4m3_in_steps()


def _largest_difference(found: Array, expected: Array) -> float:
    """The largest difference relative to the largest expected number; infinite where the shapes differ."""
    if np.shape(found) != np.shape(expected):
        return math.inf
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max()
    return float(difference / max(float(np.abs(expected).max()), 1e-300))


def cost(replay: Replay, found: Array) -> Rung:
    """The engine's own images ``[N, H, W, 3]`` against those of the FP32 model: what quantization costs."""
    name = replay.bundle.manifest.precision.name
    record, own = replay.bundle.records(UNQUANTIZED), replay.bundle.records("images")
    forward = replay.bundle.records("forward_2")
    level, worst = worst_psnr(found, record["images"])
    reference, _ = worst_psnr(own["images"], record["images"])
    forwards = relative_l2(forward["e"], record["e"])
    latents = relative_l2(own["latents"], record["latents"])
    return Rung(
        "image PSNR against FP32",
        level,
        replay.budget.tolerance_of(f"{name}_cost"),
        "dB",
        f"what {name.upper()} costs; in PyTorch's own {name.upper()} {reference:.1f} dB, latents {latents:.2%}, "
        f"forward {forwards:.2%} at guidance {float(forward['guidance']):g}; worst: image {worst + 1}",
        metrics={"psnr": level if math.isfinite(level) else 0.0},
    )
