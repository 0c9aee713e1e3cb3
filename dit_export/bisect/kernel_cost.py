"""What units in FP32 cost in kernels: the step is built ahead of time, without and with them."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from dit_export.bisect.graph_edits import Array
from dit_export.bisect.precision_trials import PrecisionTrials
from dit_runtime.bundle.manifest import FileSpec
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.files import sha256_of
from dit_runtime.core.replace import scratch_folder


@dataclass(frozen=True)
class KernelCost:
    """The step of one image with guidance as the TensorRT-RTX builder makes it, before and after units move to FP32."""

    builder: str
    kernels: tuple[int, int]
    fused_attention: tuple[int, int]
    weights_bytes: tuple[int, int]


def measure_kernel_cost(
    bundle: Bundle, units: Sequence[str], weights: Mapping[str, Mapping[str, Array]] | None = None
) -> KernelCost | None:
    """Build the bundle's step, and the same step with these units in FP32; None if TensorRT-RTX is not installed.

    Raises:
        BuildError: one of the two steps cannot be built.
    """
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return None
    from dit_engines.build_host import build_host_for
    from dit_engines.compile import compile_graphs
    from dit_engines.recipe import recipe_for

    host = build_host_for("rtx")
    recipe = recipe_for("rtx", host.compute_capability, 1, (2,), rows=1024, library=host.library)
    with scratch_folder(Path(tempfile.gettempdir()), "dit-export") as folder:
        step = PrecisionTrials(bundle, weights or {}).make_mixed_graph("step", units)
        ir.save(step, folder / "step.onnx", external_data="step.weights")
        manifest = bundle.manifest
        files = {
            name: FileSpec((folder / name).stat().st_size, sha256_of(folder / name))
            for name in ("step.onnx", "step.weights")
        }
        graph = manifest.graphs["step"]
        dtypes = {value.name: value.dtype.numpy().name for value in step.graph.inputs if value.dtype is not None}
        inputs = tuple(replace(tensor, dtype=dtypes[tensor.name]) for tensor in graph.inputs)  # the table's may be FP32
        graph = replace(graph, file="step.onnx", weights="step.weights", inputs=inputs)
        policy = replace(manifest.precision, keep_fp32=(*manifest.precision.keep_fp32, *units))
        altered = replace(manifest, graphs={**manifest.graphs, "step": graph}, files=files, precision=policy)
        audits = []
        for each in (bundle, replace(bundle, path=folder, manifest=altered)):
            (built,) = compile_graphs(each, recipe, host, ["step"], folder)
            audits.append(built.audit)
    before, after = audits
    return KernelCost(
        builder=host.describe(),
        kernels=(before.profiles[0].kernels, after.profiles[0].kernels),
        fused_attention=(before.profiles[0].fused_attention, after.profiles[0].fused_attention),
        weights_bytes=(before.weights_bytes, after.weights_bytes),
    )
