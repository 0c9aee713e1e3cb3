"""Images of many samplers for one batch, and tables that say whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_runtime import Pipeline, Schedule
from dit_runtime.sampling.batch import ImageRequest

ROW = 4 * 14 * 64  # bytes of a row of the tiny model's table: 6·2 + 2 vectors of 64 float32


def mixed(pipe: Pipeline) -> list[ImageRequest]:
    """Nine images of eight samplers' tables, one to twelve rows long, guided and unguided."""
    asked: list[tuple[Any, int, dict[str, Any]]] = [
        (3, 60, {"sampler": "ddim", "steps": 7, "guidance": 1.0}),
        (0, 61, {"sampler": "ddpm", "steps": 5, "guidance": 2.5}),
        (9, 62, {"sampler": "dpmpp-2m", "steps": 9, "guidance": 4.0, "guidance_interval": (0.2, 0.8)}),
        ({3: 0.7, 5: 0.3}, 63, {"sampler": "unipc", "steps": 4, "guidance": 2.0}),
        (7, 64, {"sampler": "euler-ancestral", "steps": 6, "guidance": 3.0, "guidance_schedule": "cosine"}),
        (3, 65, {"sampler": "dpmpp-3m", "steps": 12, "guidance": 1.5, "negative_label": 2}),
        (1, 66, {"sampler": "ddim", "steps": 1, "guidance": 0.0}),
        (3, 67, {"sampler": "ddim", "steps": 7, "guidance": 2.5, "eta": 0.7, "noise_dtype": "float16"}),
        (8, 68, {"sampler": "dpmpp-2m-sde", "steps": 8, "guidance": 2.5, "noise_device": "cuda"}),
    ]
    return [image for label, seed, sampling in asked for image in pipe.prepare([label], seed, **sampling)]


def marked(image: int, times: Sequence[float]) -> Schedule:
    """A table whose coefficients a and b hold the timestep and the image's number."""
    coefficients = np.zeros((len(times), 17), np.float32)
    coefficients[:, 0], coefficients[:, 1], coefficients[:, 2] = times, image, 1
    distinct, rows = np.unique(np.array(times, np.float32), return_inverse=True)
    draws, completes = np.zeros(len(times), bool), np.ones(len(times), bool)
    initial, start = np.zeros((len(times), 2), np.float32), np.ones(1, np.float32)
    return Schedule("marked", "custom", distinct, rows.astype(np.int32), coefficients, initial, start, draws, completes)
