"""Golden records as Polygraphy's files, for those who compare engines with it.

    polygraphy run BUNDLE/graphs/step.onnx --onnxrt --load-inputs step-inputs.json --load-outputs step-outputs.json

The format is that of ``polygraphy.json`` and ``polygraphy.comparator.RunResults`` (0.53): a list of inputs by name, and
a runner's outputs by name, one of each an iteration; arrays are ``.npy`` files in base64.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import OutputError
from dit_runtime.core.files import replace_file
from dit_runtime.samplers.guidance import guidance_weights
from dit_runtime.samplers.schedule import (
    B_E,
    COEFFICIENTS,
    LOG_SIGMA_V,
    NOISE,
)

RUNNER = "dit-export reference"  # polygraphy names what it compares

Call = tuple[dict[str, Array], dict[str, Array]]  # inputs and outputs of a graph, by name


def write_run_results(bundle: Bundle, folder: Path) -> list[Path]:
    """Write ``GRAPH-inputs.json`` and ``GRAPH-outputs.json`` for each graph that TensorRT builds.

    Outputs are the reference's. Iterations of the step are the forward without and with guidance.

    Raises:
        BundleError: a record is missing or altered.
        OutputError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    written = []
    for graph, calls in _calls(bundle).items():
        results = {"lst": [[RUNNER, [_iteration(outputs) for _, outputs in calls]]], "polygraphy_class": "RunResults"}
        inputs = [{name: _array(value) for name, value in call.items()} for call, _ in calls]
        for kind, content in (("inputs", inputs), ("outputs", results)):
            path = folder / f"{graph}-{kind}.json"
            with replace_file(path) as file:
                file.write_text(json.dumps(content), encoding="ascii")
            written.append(path)
    return written


def _calls(bundle: Bundle) -> dict[str, list[Call]]:
    name = bundle.manifest.table.name
    conditions, images = bundle.records("conditioner"), bundle.records("images")
    asked = {
        "timesteps": conditions["timesteps"].astype(np.float32),
        "labels": conditions["labels"].astype(np.int32),
    }
    table = conditions["table"].astype(bundle.manifest.table.dtype)
    calls = {
        "conditioner": [(asked, {name: table})],
        "step": list(_steps(bundle, table)),
        "decoder": [({"latents": images["latents"]}, {key: images[key] for key in ("images", "decoded")})],
    }
    if ENCODER in bundle.manifest.graphs:
        record = bundle.records(ENCODER)
        calls[ENCODER] = [({"images": record["images"]}, {key: record[key] for key in record if key != "images"})]
    return calls


def _steps(bundle: Bundle, table: Array) -> Iterator[Call]:
    """The forwards: denoised = e, and the next state's first slot exp(v) with unit noise."""
    model, guided = bundle.manifest.model, bundle.manifest.diffusion.guidance_channels
    for branches in (1, 2):
        record = bundle.records(f"forward_{branches}")
        latents = record["latents"]
        batch = len(latents)
        state, following = np.zeros((2, batch, 3, *latents.shape[1:]), np.float32)
        coefficients = np.zeros((batch, COEFFICIENTS), np.float32)
        coefficients[:, [B_E, NOISE]] = 1
        coefficients[:, LOG_SIGMA_V] = float(model.learned_variance)
        state[:, 0] = latents
        following[:, 0] = np.exp(record["v"]) if model.learned_variance else 1
        yield (
            {
                "state": state,
                "noise": np.ones_like(latents),
                "coefficients": coefficients,
                "guidance": guidance_weights(float(record["guidance"]), batch, model.latent_channels, guided),
                # The table's rows are those of the guided forward: its images, then the same with the null class.
                "rows": np.arange(branches * batch, dtype=np.int32).reshape(branches, batch),
                bundle.manifest.table.name: table,
            },
            {"next_state": following, "denoised": record["e"]},
        )


def _iteration(outputs: Mapping[str, Array]) -> dict[str, Any]:
    values = {name: {"values": _array(value), "polygraphy_class": "LazyArray"} for name, value in outputs.items()}
    return {"outputs": values, "runtime": 0.0, "runner_name": RUNNER, "polygraphy_class": "IterationResult"}


def _array(array: Array) -> dict[str, str]:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return {"array": base64.b64encode(file.getvalue()).decode("ascii"), "polygraphy_class": "ndarray"}
