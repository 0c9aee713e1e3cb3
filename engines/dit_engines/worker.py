"""The process that builds one plan: the module ``dit_engines.worker``, run.

When a process of its own ends, the builder's memory is free again, and a crash of the compiler is only an exit code.
The first line of stdin is the request, as JSON. The end of stdin cancels the build, so that a builder never outlives
its parent. The process prints one JSON object per line: ``{"progress": share}`` while it works, and at the end
``{"result": {…}}`` or ``{"error": "…", "full": whether the disk is full, "refused": whether such an engine cannot be
here}``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_engines.audit import Audit, audit_of
from dit_engines.graph_work import work_of_graph
from dit_engines.kernels import Kernel, kernel_from_layer, kernels_from_log
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.core.errors import DiTError, EngineError, explain
from dit_runtime.core.reading import TIMING_CACHE_BYTES, FileError, read_file
from dit_runtime.core.streams import guarded_streams

_MEMORY = re.compile(r"Total (Weights|Activation) Memory: (\d+)")


def main() -> None:
    """Build the plan that stdin asks for."""
    with guarded_streams(keep_stderr=True):  # a library that prints would write into the answer
        _answer()


def _answer() -> None:
    request = json.loads(sys.stdin.readline())
    cancelled = threading.Event()
    threading.Thread(target=_wait_for_end, args=(cancelled,), daemon=True).start()
    try:
        _say({"result": _build_plan(request, cancelled)})
    except EngineError as error:
        _fail(str(error), full=False, refused=True)
    except DiTError as error:
        _fail(str(error), full=False)
    except FileError as error:
        _fail(f"{request['timing_cache']}: {error}", full=False)
    except OSError as error:
        _fail(f"cannot be written ({error.strerror or error})", full=True)
    except Exception as error:  # noqa: BLE001  # the parent says it, whatever it is
        _fail(explain(error), full=False)


def _fail(reason: str, full: bool, refused: bool = False) -> None:
    _say({"error": reason, "full": full, "refused": refused})
    sys.exit(1)


def _wait_for_end(cancelled: threading.Event) -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread must not hold its lock when the interpreter ends
        pass
    cancelled.set()


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


class _Share:
    """The share of the work that is done, from the builder's nested phases; the builder does not say how they nest.

    ``Building engine`` is the outermost phase. Any other phase is a part of the outermost phase's current step.
    """

    OUTERMOST = "building engine"

    def __init__(self) -> None:
        self._done, self._steps, self._told = 0, 6, 0.0  # RTX 1.7 has six

    def update(self, phase: str, done: int, steps: int) -> None:
        inside = 0.0
        if phase.lower() == self.OUTERMOST:
            self._done, self._steps = done, max(steps, 1)
        else:
            inside = min(done / max(steps, 1), 1.0)
        share = min((self._done + inside) / self._steps, 1.0)
        if share >= self._told + 0.01:
            self._told = share
            _say({"progress": round(share, 3)})


def _build_plan(request: dict[str, Any], cancelled: threading.Event) -> dict[str, Any]:
    library = tensorrt_api.import_library(request["library"])
    layers: list[str] = []
    log_lines: list[str] = []
    memory: dict[str, list[int]] = {"Weights": [], "Activation": []}
    share = _Share()

    def log(severity: str, message: str) -> None:
        if severity != "verbose" or message.startswith("Layers:"):
            log_lines.append(f"{severity}: {message}")
        if message.startswith("Layers:"):
            layers.append(message)
        elif found := _MEMORY.search(message):
            memory[found[1]].append(int(found[2]))

    def report(phase: str, done: int, steps: int) -> bool:
        share.update(phase, done, steps)
        return not cancelled.is_set()

    cache = request["timing_cache"]
    try:
        built = tensorrt_api.plan_from_onnx(
            library,
            Path(request["onnx"]),
            request["profiles"],
            log=log,
            report=report,
            workspace_bytes=request["workspace_bytes"],
            optimization_level=request["optimization_level"],
            compute_capability=request["compute_capability"] if library.name == "tensorrt_rtx" else None,
            auxiliary_streams=request["auxiliary_streams"],
            timing_cache=None if cache is None else read_file(cache, TIMING_CACHE_BYTES),
            tactic_bytes=request["tactic_bytes"],
            int8=bool(request["quantized"]),
        )
    finally:
        _write(Path(request["log"]), "\n".join(log_lines).encode(errors="backslashreplace") + b"\n")
    plan = tensorrt_api.bytes_of_plan(built.plan)
    _write(Path(request["plan"]), plan)
    if built.timing_cache is not None:
        _write(Path(request["timing_cache_out"]), built.timing_cache)
    kernels = kernels_from_log("\n".join(layers))
    activations, weights = memory["Activation"], max(memory["Weights"], default=plan.nbytes)
    if library.name == "tensorrt":  # it builds on its GPU, so the plan can be loaded here
        listing, activations = _inspect_plan(library, plan.data)
        _write(Path(request["layers"]), listing.encode(errors="backslashreplace"))
        kernels = [kernel_from_layer(layer.details) for layer in tensorrt_api.layers_from_json(listing)]
    audit = _audit_plan(kernels, activations, weights, request)
    return {"plan_bytes": plan.nbytes, "tf32": built.tf32, "audit": asdict(audit)}


def _inspect_plan(library: tensorrt_api.TensorRT, plan: memoryview) -> tuple[str, list[int]]:
    """The inspector's JSON and the activation memory of a plan that this process built."""
    own_logger = tensorrt_api.make_logger(library, lambda *_: None)
    runtime = tensorrt_api.make_runtime(library, own_logger)
    engine = tensorrt_api.engine_from_plan(runtime, plan)
    profiles = range(len(tensorrt_api.profiles_of(library, engine)))
    return tensorrt_api.listing_of(library, engine), [
        tensorrt_api.activation_bytes_of(engine, index) for index in profiles
    ]


def _audit_plan(kernels: Sequence[Kernel], activations: Sequence[int], weights: int, request: dict[str, Any]) -> Audit:
    usual = [{name: tuple(points[1]) for name, points in profile.items()} for profile in request["profiles"]]
    work = [work_of_graph(Path(request["onnx"]), shapes).macs for shapes in usual]
    sizes = [*activations, *([0] * len(usual))][: len(usual)]
    return audit_of(kernels, work, weights, sizes, request["keep_fp32"], request["quantized"])


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
