"""How fast this machine multiplies matrices of a model's shapes: the limit that a step's rate is compared with."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_runtime.backends.openvino.engine import import_openvino, load_core
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.bundle.precision import Precision
from dit_runtime.samplers.noise import Float32

CALLS = 5  # of each shape; the fastest counts, since the rate is a limit
LARGEST_INPUT = 6.0  # what 127 stands for, of an input of INT8 products
PRODUCTS = ("FullyConnected", "MatMul")  # OpenVINO's names of products in a compiled model


@dataclass(frozen=True)
class GemmRate:
    """The rate of two products, ``[M, K]`` by ``[K, N]`` and the result by ``[N, K]``, in one library and precision.

    ``gflops`` is 10⁹ operations a second, where a multiply-accumulate counts as two operations.
    """

    library: str
    precision: str
    m: int
    k: int
    n: int
    gflops: float


def shapes_of(model: ModelSpec, rows: int) -> list[tuple[int, int, int]]:
    """(M, K, N) of a block's products (QKV, projection, MLP) for ``rows`` images, each branch counted."""
    m, d = rows * model.tokens, model.width
    return [(m, d, 3 * d), (m, d, d), (m, d, model.mlp_width)]


def measure_gemm_rates(
    shapes: Sequence[tuple[int, int, int]], precision: Precision = Precision.FP32, threads: int = 0
) -> list[GemmRate]:
    """Measure the rates of numpy's BLAS (FP32) and of OpenVINO where they are installed, in turn.

    Args:
        shapes: (M, K, N) of each product.
        precision: ``fp32``, ``bf16`` or ``int8``; numpy has FP32 alone, so for others the list is empty without
            OpenVINO, and for INT8 where OpenVINO does not multiply it here. INT8 products read numbers that are rounded
            to INT8 before each, as in the step of an INT8 bundle.
        threads: of OpenVINO; 0 lets it choose. The environment sets numpy's.
    """
    random = np.random.default_rng(0)
    work: list[tuple[str, tuple[int, int, int], Callable[[], Any]]] = []
    for m, k, n in shapes:
        left = random.standard_normal((m, k), np.float32)
        forth = random.standard_normal((k, n), np.float32) / np.float32(np.sqrt(k))
        back = random.standard_normal((n, k), np.float32) / np.float32(np.sqrt(n))
        if precision == Precision.FP32:
            work.append(("numpy", (m, k, n), _product_by_numpy(left, forth, back)))
        if importlib.util.find_spec("openvino") is not None:
            product = _product_by_openvino(left, forth, back, precision, threads)
            work += [] if product is None else [("openvino", (m, k, n), product)]
    best = [float("inf")] * len(work)
    for _ in range(1 + CALLS):  # the first call fills caches and pages
        for index, (_, _, call) in enumerate(work):
            start = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - start)
    return [
        GemmRate(name, precision, m, k, n, 4 * m * k * n / seconds / 1e9)
        for (name, (m, k, n), _), seconds in zip(work, best, strict=True)
    ]


def _product_by_numpy(left: Float32, forth: Float32, back: Float32) -> Callable[[], Any]:
    return lambda: (left @ forth) @ back


def _product_by_openvino(
    left: Float32, forth: Float32, back: Float32, precision: Precision, threads: int
) -> Callable[[], Any] | None:
    """Both products in turn; None if OpenVINO does not multiply INT8 where that is asked for."""
    openvino = import_openvino()
    opset13 = openvino.opset13
    parameter = opset13.parameter(list(left.shape), np.float32)
    product, int8 = parameter, precision == Precision.INT8
    for weight in (forth, back):
        if int8:  # values of both inputs have a deviation near 1
            ends = [opset13.constant(np.float32(end)) for end in 2 * (-LARGEST_INPUT * 128 / 127, LARGEST_INPUT)]
            product = opset13.fake_quantize(product, *ends, 256)
        product = opset13.matmul(product, _weight_by_openvino(opset13, weight, int8), False, False)
    model = openvino.Model([opset13.result(product)], [parameter])
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if precision == Precision.BF16 else "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = load_core().compile_model(model, "CPU", settings)
    kinds = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()] if int8 else []
    types = [kind["runtimePrecision"].astype(str) for kind in kinds if kind["layerType"].astype(str) in PRODUCTS]
    if int8 and (not types or not set(types) <= {"i8", "u8"}):
        return None
    request = compiled.create_infer_request()
    return lambda: request.infer([left], share_inputs=True, share_outputs=True)


def _weight_by_openvino(opset13: Any, weight: Float32, int8: bool) -> Any:
    """A weight as a constant; in INT8 with a scale for each output channel."""
    if not int8:
        return opset13.constant(weight)
    scales = (np.abs(weight).max(axis=0, keepdims=True) / 127).astype(np.float32)
    numbers = opset13.constant(np.round(weight / scales).astype(np.int8))
    return opset13.multiply(opset13.convert(numbers, np.float32), opset13.constant(scales))
