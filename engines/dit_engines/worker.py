"""The process that builds one engine: ``python -m dit_engines.worker < request.json``.

A process of its own: the builder's memory is returned when it ends, Ctrl-C ends it at once, and a crash in the compiler
is an exit code. Prints one JSON object per line: ``{"progress": [done, total]}`` while it works, at the end
``{"result": {...}}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_engines.audit import audit_from_log

WORKSPACE_BYTES = 4 << 30


def main() -> None:
    """Build what stdin asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends this process
    request = json.load(sys.stdin)
    try:
        _say({"result": _built(request)})
    except _BuilderError as error:
        _say({"error": str(error)})
        sys.exit(1)


class _BuilderError(Exception):
    pass


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _built(request: dict[str, Any]) -> dict[str, Any]:
    import tensorrt_rtx as trt

    layers: list[str] = []
    memory: list[str] = []
    errors: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]  # untyped module
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)
            elif message.startswith("Layers:"):
                layers.append(message)
            elif message.startswith("Total ") and "Memory:" in message:
                memory.append(message)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # untyped module
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._phases[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == next(iter(self._phases)):  # the outermost phase
                _say({"progress": [step + 1, self._phases[phase]]})
            return True

        def phase_finish(self, phase: str) -> None:
            return None

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _BuilderError(f"cannot be parsed: {'; '.join(reasons or errors) or 'no reason given'}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: FP32 products would lose 13 bits
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = Monitor()
    config.num_compute_capabilities = 1
    name = "SM" + request["compute_capability"].replace(".", "")
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    _pin(network, request["profiles"])
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for tensor, (low, usual, high) in shapes.items():
            profile.set_shape(tensor, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise _BuilderError(f"optimization profile refused: {'; '.join(errors) or shapes}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _BuilderError(f"cannot be built: {'; '.join(errors) or 'no reason given'}")
    Path(request["plan"]).write_bytes(plan)
    audit = audit_from_log("\n".join(layers), memory, len(request["profiles"]))
    return {
        "builder": f"tensorrt_rtx {trt.__version__}",
        "plan_bytes": plan.nbytes,
        "tf32": config.get_flag(trt.BuilderFlag.TF32),
        "audit": asdict(audit),
    }


def _pin(network: Any, profiles: list[dict[str, Any]]) -> None:
    """Make dimensions static that have one size in all profiles: the builder plans static shapes better."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = [shape for profile in profiles for shape in profile[tensor.name]]
        tensor.shape = tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))


if __name__ == "__main__":
    main()
