"""Compile each graph in a process of its own, and check what the process made."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_engines.audit import audit_from_json, find_problems
from dit_engines.build_host import BuildHost
from dit_engines.engine_store import LAYERS, LOG, STORE_OPTION, TIMING_CACHE, BuiltGraph, digest_of_written
from dit_engines.recipe import Recipe, profiles_of
from dit_runtime.bundle.quantization import linears_of
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.children import command_of_module, start_child
from dit_runtime.core.errors import BuildError, OutputError
from dit_runtime.core.progress import Progress

CANCEL_SECONDS = 10
STEPS = 100  # of the progress bar, for each graph


def compile_graphs(
    bundle: Bundle,
    recipe: Recipe,
    host: BuildHost,
    graphs: Sequence[str],
    folder: Path,
    timing_cache: Path | None = None,
) -> tuple[BuiltGraph, ...]:
    """Compile graphs one after the other into ``folder``, each with the timing cache of the graph before it.

    Args:
        bundle: whose graphs.
        recipe: shapes and limits.
        host: library and GPU.
        graphs: names in the manifest.
        folder: where ``GRAPH.plan`` and, by TensorRT, ``timing.cache`` are written.
        timing_cache: of the first graph.

    Beside each plan are ``GRAPH.log``, the builder's messages, and where the plan was inspected ``GRAPH.layers.json``,
    the inspector's JSON. They are written before the audit judges.

    Raises:
        BuildError: a graph cannot be built or its audit refuses it, or the builder kept TF32 on.
        BundleError: a file of the bundle is missing or altered.
        OutputError: the folder cannot be written, or is full.
    """
    built = []
    with Progress("building", STEPS * len(graphs)) as bar:
        for graph in graphs:
            bar.describe(f"building {graph} for {recipe.target} {recipe.compute_capability}")
            made = _compile_graph(bundle, recipe, host, graph, folder, timing_cache, bar)
            built.append(replace(made, doubts=judge_audit(bundle, made, host.library)))
            timing_cache = folder / TIMING_CACHE if host.times_kernels else None
    return tuple(built)


def judge_audit(bundle: Bundle, built: BuiltGraph, library: str) -> tuple[str, ...]:
    """Judge whether a plan is what the bundle's precision asks for.

    The log of TensorRT-RTX, whose builder this audit was proven on, is believed: a problem refuses the engine. What
    TensorRT's inspector lists has changed with its releases, and TensorRT may leave an attention unfused because that
    is faster on its GPU: a problem is a doubt, the engine is stored, and ``dit-verify`` decides.

    Returns:
        A line for each doubt.

    Raises:
        BuildError: a plan of TensorRT-RTX has a problem.
    """
    manifest, precision = bundle.manifest, bundle.manifest.precision
    weights = manifest.files[manifest.graphs[built.graph].weights].bytes
    found = tuple(find_problems(built.audit, built.graph, manifest.model, precision, weights))
    if found and library != "tensorrt":
        raise BuildError(
            f"{bundle.path}: the engine is not the {precision.name} that was asked for: {'; '.join(found)}; nothing "
            "was stored; export the bundle again"
        )
    return found


def _compile_graph(
    bundle: Bundle,
    recipe: Recipe,
    host: BuildHost,
    graph: str,
    folder: Path,
    timing_cache: Path | None,
    bar: Progress,
) -> BuiltGraph:
    onnx = bundle.graph(graph)
    plan = folder / f"{graph}.plan"
    profiles = profiles_of(bundle.manifest.graphs[graph], recipe, bundle.manifest)
    request = {
        "library": host.library,
        "onnx": os.fspath(onnx),
        "plan": os.fspath(plan),
        "profiles": profiles,
        "compute_capability": recipe.compute_capability,
        "workspace_bytes": recipe.workspace_bytes,
        "optimization_level": recipe.optimization_level,
        "auxiliary_streams": recipe.auxiliary_streams,
        "tactic_bytes": host.tactic_bytes,
        "timing_cache": None if timing_cache is None else os.fspath(timing_cache),
        "timing_cache_out": os.fspath(folder / TIMING_CACHE),
        "log": os.fspath(folder / LOG.format(graph)),
        "layers": os.fspath(folder / LAYERS.format(graph)),
        "keep_fp32": bundle.manifest.precision.keep_fp32 if graph == "step" else (),  # other graphs are one unit each
        "quantized": _quantized_layers(bundle) if graph == "step" else (),
    }
    start = time.monotonic()
    result, code, last_words = _run_worker(request, bar)
    if "error" in result:
        if result["full"]:
            raise OutputError(
                f"{folder.parent}: the {graph}'s plan {result['error']}; free some space, or choose another "
                f"{STORE_OPTION}"
            )
        if result["refused"]:
            raise BuildError(f"{bundle.path}: {result['error']}")
        raise BuildError(f"{result['error']}; report it with dit-build --version and the bundle's manifest")
    if "result" not in result and last_words and (code or 0) > 0:
        raise BuildError(f"{onnx}: the builder process failed ({last_words}); report it")
    if "result" not in result:
        raise BuildError(
            f"{onnx}: the builder process ended with {code}, most likely for want of memory; end other programs, or "
            "build with a smaller --batch"
        )
    answer = result["result"]
    if answer["tf32"]:
        raise BuildError(f"{onnx}: the builder left TF32 on, which FP32 parity does not allow; report it")
    return BuiltGraph(
        graph=graph,
        plan=plan.name,
        plan_bytes=answer["plan_bytes"],
        plan_sha256=digest_of_written(plan),
        seconds=round(time.monotonic() - start, 1),
        profiles=tuple(profiles),
        audit=audit_from_json(answer["audit"]),
    )


def _quantized_layers(bundle: Bundle) -> tuple[str, ...]:
    """The layers that should multiply INT8 or FP8."""
    model = bundle.manifest.model
    return tuple(filter(bundle.manifest.precision.quantizes, linears_of(model.conditioning, model.depth)))


def _run_worker(request: dict[str, Any], bar: Progress) -> tuple[dict[str, Any], int | None, str]:
    """Run the worker on a request: its last message, its exit code, and the last line of its stderr.

    Ctrl-C cancels the worker's build, and ends the worker when it does not stop within ``CANCEL_SECONDS``.
    """
    result: dict[str, Any] = {}
    advanced = 0
    words = command_of_module("dit_engines.worker")
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        start_child(words, stderr=errors) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # the worker ended at once; its exit code says why
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    share = int(STEPS * message["progress"])
                    bar.advance(max(0, share - advanced))
                    advanced = max(share, advanced)
                else:
                    result = message
        except BaseException:
            _end_worker(process)
            raise
        with contextlib.suppress(BrokenPipeError):  # the buffer may hold what the worker did not read
            process.stdin.close()
        process.wait()
        errors.seek(0)
        *_, last_words = ["", *errors.read().split("\n")[:-1]]
    bar.advance(STEPS - advanced)
    return result, process.returncode, last_words


def _end_worker(process: subprocess.Popen[str]) -> None:
    """Close stdin, which cancels the build at the builder's next step; end a worker that does not stop."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(CANCEL_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
