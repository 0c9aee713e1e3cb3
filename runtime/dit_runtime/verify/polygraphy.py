"""Golden records as Polygraphy's files, for those who compare engines with it. Polygraphy is the extra ``polygraphy``.

polygraphy run BUNDLE/graphs/step.onnx --onnxrt --load-inputs step-inputs.json --load-outputs step-outputs.json
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.backends.step import state_from_latents, step_inputs
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import OBSERVATIONS, Bundle
from dit_runtime.core.errors import OutputError
from dit_runtime.core.extras import check_extra
from dit_runtime.core.replace import replace_file
from dit_runtime.samplers.guidance import guidance_weights
from dit_runtime.samplers.schedule import (
    B_E,
    COEFFICIENTS,
    LOG_SIGMA_V,
    NOISE,
)

RUNNER = "dit-export reference"  # Polygraphy prints the names of the two sides that it compares

Call = tuple[dict[str, Array], dict[str, Array]]  # a graph's inputs and outputs, by name


def write_run_results(bundle: Bundle, folder: Path) -> list[Path]:
    """Write ``GRAPH-inputs.json`` and ``GRAPH-outputs.json`` for each graph that TensorRT builds.

    The outputs are the reference's. The step has two iterations: the forward without guidance and with guidance.

    Returns:
        The files, in the order in which they were written.

    Raises:
        BundleError: a record is missing or altered.
        OutputError: Polygraphy is not installed, or the folder cannot be written to.
    """
    check_extra("--polygraphy", "polygraphy", "polygraphy")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    written = []
    for graph, calls in _calls(bundle).items():
        paths = [folder / f"{graph}-{kind}.json" for kind in ("inputs", "outputs")]
        _write_calls(calls, *paths)
        written += paths
    return written


def _write_calls(calls: list[Call], inputs: Path, outputs: Path) -> None:
    """Write the calls' inputs and outputs, one iteration for each call."""
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    iterations = [IterationResult(found, runtime=0.0, runner_name=RUNNER) for _, found in calls]
    # Polygraphy prints on stdout what it writes; stdout belongs to the command.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        with replace_file(inputs) as file:
            save_json([asked for asked, _ in calls], str(file))
        with replace_file(outputs) as file:
            RunResults([(RUNNER, iterations)]).save(str(file))


def _calls(bundle: Bundle) -> dict[str, list[Call]]:
    """The recorded calls of each graph."""
    name = bundle.manifest.table.name
    conditions = bundle.records("conditioner")
    asked = {"timesteps": conditions["timesteps"].astype(np.float32)}
    if bundle.manifest.model.observation:
        asked["observations"] = bundle.records(OBSERVATIONS)["observations"][conditions["labels"]]
    else:
        asked["labels"] = conditions["labels"].astype(np.int32)
    table = conditions["table"].astype(bundle.manifest.table.dtype)
    calls = {
        "conditioner": [(asked, {name: table})],
        "step": list(_step_calls(bundle, table)),
    }
    if bundle.manifest.has_decoder:
        images = bundle.records("images")
        shown = {key: images[key] for key in ("images", "decoded")}
        calls["decoder"] = [({"latents": images["latents"]}, shown)]
    if ENCODER in bundle.manifest.graphs:
        record = bundle.records(ENCODER)
        calls[ENCODER] = [({"images": record["images"]}, {key: record[key] for key in record if key != "images"})]
    return calls


def _step_calls(bundle: Bundle, table: Array) -> Iterator[Call]:
    """The forwards as calls of the step: denoised = e, and with unit noise the next state's first slot is exp(v)."""
    model, guided = bundle.manifest.model, bundle.manifest.diffusion.guidance_channels
    for branches in (1, 2):
        record = bundle.records(f"forward_{branches}")
        latents = record["latents"]
        batch = len(latents)
        state = state_from_latents(latents)
        following = np.zeros_like(state)
        coefficients = np.zeros((batch, COEFFICIENTS), np.float32)
        coefficients[:, [B_E, NOISE]] = 1
        coefficients[:, LOG_SIGMA_V] = float(model.learned_variance)
        following[:, 0] = np.exp(record["v"]) if model.learned_variance else 1
        yield (
            step_inputs(
                bundle.manifest,
                state,
                coefficients,
                guidance_weights(float(record["guidance"]), batch, model.latent_channels, guided),
                # The rows of the table are the guided forward's: its images, then its images with the null class.
                np.arange(branches * batch, dtype=np.int32).reshape(branches, batch),
                table,
                np.ones_like(latents),
            ),
            {"next_state": following, "denoised": record["e"]},
        )
