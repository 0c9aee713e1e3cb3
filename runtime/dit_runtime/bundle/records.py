"""What each golden record holds: its arrays with their dtypes and shapes, and the numbers that they may have.

``docs/bundle-format.md`` specifies them. An axis with a name is the record's own: N images, S steps, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dit_runtime.bundle.manifest import ENCODER, Manifest
from dit_runtime.bundle.quantization import FACTORS, linears_of, normed_layers, smoothed_channels
from dit_runtime.core.arrays import Array, ArraySpec
from dit_runtime.core.decode import DecodeError

RECORD_BYTES = 1 << 30  # of all arrays of a record: far more than any has, and little enough to be held in memory
TILE = "tile_"  # and the tile's side in latent pixels: names of records of decoded tiles
UNGUIDED = "unguided"  # name of the record of a trajectory without guidance, by a sampler that draws noise
CONDITIONS = "conditions"  # name of the record of every class and timestep
CALIBRATION = "calibration"  # name of the record of the ranges that an INT8 bundle's scales are from
UNQUANTIZED = "unquantized"  # name of the record of what an INT8 bundle's model computes in FP32
OBSERVATIONS = "observations"  # name of the record of the observations that a policy's labels number
STRONG = "strong"  # name of the record of a trajectory at a strong guidance scale, with its images
PROJECTIONS = 8  # of each condition's row
MOST_STEPS = 10_000
MOST_GUIDANCE = 1e6
TRAJECTORIES = ("ddim", "ddpm", "euler", "sde-euler", "meanflow", UNGUIDED, STRONG)


def specs_of_record(name: str, manifest: Manifest) -> dict[str, ArraySpec]:
    """The arrays of a record, at the size in use.

    Raises:
        DecodeError: there is no such record.
    """
    model, factor = manifest.model, manifest.autoencoder.factor
    height, width = model.latent_size
    if name.startswith(TILE):
        side = name.removeprefix(TILE)
        if not (side.isascii() and side.isdecimal() and len(side) < 7 and int(side)):
            raise DecodeError("no golden record has this name")
        height, width = min(height, int(side)), min(width, int(side))
    latents = (model.latent_channels, height, width)
    pixels = (height * factor, width * factor)
    table = manifest.table.shape[1:]
    times = "float32" if manifest.diffusion.path else "int64"
    second = () if model.times == 1 else (model.times,)

    def float32(*shape: int | str) -> ArraySpec:
        return ArraySpec("float32", shape)

    def int64(*shape: int | str) -> ArraySpec:
        return ArraySpec("int64", shape)

    guidance = ArraySpec("float64", ())
    if name == "conditioner":
        return {"timesteps": ArraySpec(times, ("P", *second)), "labels": int64("P"), "table": float32("P", *table)}
    if name == OBSERVATIONS and model.observation:
        return {"observations": float32(model.classes, model.observation)}
    if name == CONDITIONS:
        return {
            **{"timesteps": float32("R", *second), "labels": int64("R"), "norms": float32("R")},
            "projections": float32("R", PROJECTIONS),
        }
    if name == "blocks":
        return {
            **{"latents": float32(1, *latents), "timesteps": ArraySpec(times, (1, *second)), "labels": int64(1)},
            **{"guidance": guidance, "token_stride": int64(), "table": float32(2, *table)},
            "tokens": float32(1, "T", model.width),
            "outputs": float32(model.depth, 2, "T of outputs", model.width),
        }
    if name in ("forward_1", "forward_2"):
        variance = model.latent_channels if model.learned_variance else 0
        return {
            **{"latents": float32("N", *latents), "timesteps": ArraySpec(times, ("N", *second)), "labels": int64("N")},
            **{"guidance": guidance, "e": float32("N", *latents), "v": float32("N", variance, *latents[1:])},
        }
    if name in TRAJECTORIES:
        count = "N"
        shown = {"decoded": float32(count, 3, *pixels), "images": ArraySpec("uint8", (count, *pixels, 3))}
        return {
            **(shown if name == STRONG else {}),
            **{"seeds": int64(count), "labels": int64(count), "guidance": guidance, "steps": int64()},
            "latents": float32("S + 1", count, *latents),
            **dict.fromkeys(("denoised", "noise"), float32("S", count, *latents)),
        }
    if name == "images" or name.startswith(TILE):
        return {
            "latents": float32("N", *latents),
            "decoded": float32("N", 3, *pixels),
            "images": ArraySpec("uint8", ("N", *pixels, 3)),
        }
    if name == CALIBRATION:
        linears = len(linears_of(model.conditioning, model.depth))
        channels = sum(smoothed_channels(model.conditioning, model.width, model.mlp_width).values())
        return {
            **{"timesteps": float32("S"), "ranges": float32(linears, "S")},
            **dict.fromkeys(("largest", "scales"), float32(linears)),
            **{"weight_scales": float32("R"), "weight_sums": int64("R")},
            "factors": float32(model.depth, channels),
            "norms": float32(model.depth, len(normed_layers(model.conditioning)), 2, model.width),
        }
    if name == UNQUANTIZED:
        return {
            **{"latents": float32("N", *latents), "decoded": float32("N", 3, *pixels)},
            **{"images": ArraySpec("uint8", ("N", *pixels, 3)), "e": float32("M", *latents)},
        }
    if name == ENCODER and ENCODER in manifest.graphs:
        outputs = [tensor.name for tensor in manifest.graphs[ENCODER].outputs]
        return {
            "images": ArraySpec("uint8", ("N", *pixels, 3)),
            **dict.fromkeys(outputs, float32("N", *latents)),
        }
    raise DecodeError("no golden record has this name")


def check_record(name: str, record: Mapping[str, Array], manifest: Manifest) -> None:
    """Check the numbers of a record whose arrays are as ``specs_of_record`` says.

    Raises:
        DecodeError: a number that the model does not have, or numbers that do not fit each other.
    """
    model = manifest.model
    last = 1 if manifest.diffusion.path else len(manifest.diffusion.betas) - 1
    _check_range(record, "labels", 0, model.label_rows - 1)
    _check_range(record, "timesteps", 0, last)
    _check_range(record, "guidance", 0, MOST_GUIDANCE)
    _check_range(record, "steps", 1, MOST_STEPS)
    _check_range(record, "token_stride", 1, model.tokens)
    if name in ("forward_1", UNGUIDED):
        _check_range(record, "guidance", 1, 1)
    if name in ("blocks", "forward_2") and record["guidance"] == 1:
        raise DecodeError("guidance 1, expected two branches")
    if name == "conditioner" and len(record["labels"]) % 2:
        raise DecodeError(f"{len(record['labels'])} pairs, expected an even number: half of them have the null class")
    if name == "blocks":
        extra = 2 if model.conditioning == "in-context" else 0
        for key, axis, tokens in (("tokens", 1, model.tokens), ("outputs", 2, model.tokens + extra)):
            if (found := record[key].shape[axis]) != (kept := len(range(0, tokens, int(record["token_stride"])))):
                raise DecodeError(f"{key}: {found} tokens, expected {kept} of {tokens}")
    if name == CALIBRATION:
        _check_scales(record)
    if name in TRAJECTORIES and len(record["latents"]) != len(record["denoised"]) + 1:
        raise DecodeError(f"latents of {len(record['latents'])} steps, expected one more than of denoised")


def _check_scales(record: Mapping[str, Array]) -> None:
    """Check that the scales are numbers above 0 that FP16 holds, as the graphs store them."""
    scales = record["scales"]
    if not (np.isfinite(scales).all() and (scales > 0).all() and (scales == scales.astype(np.float16)).all()):
        raise DecodeError("scales: expected numbers of FP16 above 0")
    factors = record["factors"]
    if not (np.isin(np.frexp(factors)[0], 0.5).all() and FACTORS[0] <= factors.min() <= factors.max() <= FACTORS[1]):
        raise DecodeError("factors: expected powers of 2 from 1/64 to 64")
    for key in ("ranges", "largest"):
        if not (np.isfinite(record[key]).all() and (record[key] >= 0).all() and record[key].size):
            raise DecodeError(f"{key}: expected numbers from 0")


def _check_range(record: Mapping[str, Array], key: str, least: float, most: float) -> None:
    if key in record and not np.all((record[key] >= least) & (record[key] <= most)):
        found = f"{record[key].min():g} to {record[key].max():g}"
        raise DecodeError(f"{key}: numbers from {found}, expected {least:g} to {most:g}")
