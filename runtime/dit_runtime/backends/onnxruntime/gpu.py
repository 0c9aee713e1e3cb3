"""ONNX Runtime's providers for NVIDIA GPUs. A graph runs on the GPU, or an error says why it does not."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.bundle.precision import Precision
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.errors import EngineError
from dit_runtime.core.machine import has_nvidia_driver

PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
GPU_WHEEL = "pip uninstall -y onnxruntime, pip install 'onnxruntime-gpu[cuda,cudnn]'"
INSTALL = {
    "cuda": GPU_WHEEL,
    "tensorrt": f"{GPU_WHEEL} and TensorRT 10",
    "rtx": "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx",
}
RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
# Operators that do the work of a step. A provider may leave arithmetic on shapes to the CPU, but none of these.
HEAVY = frozenset({"MatMul", "Gemm", "Conv", "FusedMatMul", "FusedConv", "FusedGemm", "Attention"})


@dataclass(frozen=True)
class Provider:
    """A provider that ONNX Runtime can be asked for.

    Attributes:
        name: a key of ``PROVIDERS``.
        device: provider and GPU, for messages and records.
        devices: ONNX Runtime's own objects for the GPUs, of a provider that comes as a plugin; else empty.
    """

    name: str
    device: str
    devices: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def memory(self) -> str:
        """ONNX Runtime's name of the provider's memory. It has none for a plugin's: outputs go to the host."""
        return "cpu" if self.devices else "cuda"


def open_provider(runtime: Any, name: str) -> Provider:
    """Load a provider's libraries, and find the devices of a plugin, before a session is opened.

    Args:
        runtime: the imported module ``onnxruntime``.
        name: a key of ``PROVIDERS``.

    Raises:
        EngineError: the provider is unknown, not installed, or there is no NVIDIA driver.
    """
    if name not in PROVIDERS:
        raise EngineError(f"provider {name!r} of ONNX Runtime is unknown; choose cpu or one of {', '.join(PROVIDERS)}")
    library = _find_rtx_library(runtime) if name == "rtx" else None
    if library is None and PROVIDERS[name] not in runtime.get_available_providers():
        raise _error_for(runtime, name, "this ONNX Runtime was built without it")
    if not has_nvidia_driver():
        raise _error_for(runtime, name, "there is no NVIDIA driver")
    gpus = describe_environment().get("gpus") or [{"name": "GPU"}]
    device = f"{PROVIDERS[name].removesuffix('ExecutionProvider')} {gpus[0]['name']}"
    if library is not None:
        return Provider(name, device, _find_rtx_devices(runtime, library))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what is missing; so does the error of a session
        runtime.preload_dlls()
    return Provider(name, device)


def _find_rtx_library(runtime: Any) -> str:
    try:
        library: str = importlib.import_module(RTX_PACKAGE).get_library_path()
    except (ImportError, OSError) as error:
        raise _error_for(runtime, "rtx", "its package is not installed") from error
    return library


def _find_rtx_devices(runtime: Any, library: str) -> tuple[Any, ...]:
    """Find the plugin's GPUs (onnxruntime.ai, Using a Plugin Execution Provider Library)."""
    name = PROVIDERS["rtx"]
    for cudart in sorted(Path(library).parent.glob("libcudart.so.*")):
        with contextlib.suppress(OSError):
            # The wheel for CUDA 12 ships libcudart without the file name that the plugin asks for. Once the library is
            # loaded, the plugin finds it.
            ctypes.CDLL(os.fspath(cudart), mode=ctypes.RTLD_GLOBAL)
    try:
        if not any(device.ep_name == name for device in runtime.get_ep_devices()):
            runtime.register_execution_provider_library(name, library)
    except Exception as error:  # ONNX Runtime's exception types are not public
        raise _error_for(runtime, "rtx", reason_of(error)) from error
    devices = tuple(device for device in runtime.get_ep_devices() if device.ep_name == name)
    if not devices:
        raise _error_for(runtime, "rtx", "it finds no GPU that it supports")
    return devices


def open_gpu_session(
    runtime: Any, provider: Provider, path: Path, options: Any, precision: Precision, captured: bool = False
) -> Any:
    """Open a session whose work is on the GPU.

    The entry ``session.disable_cpu_fallback`` does not help: where the provider's libraries are missing, ONNX Runtime
    1.31 opens the session on the CPU despite it. And beside a GPU, shapes are computed on the CPU by design.

    Args:
        runtime: the imported module ``onnxruntime``.
        provider: from ``open_provider``.
        path: the graph's file.
        options: the session's options; this function adds to them.
        precision: the bundle's precision.
        captured: whether calls may be captured as CUDA graphs.

    Raises:
        EngineError: the provider cannot be used, or leaves work to another provider.
    """
    wanted = PROVIDERS[provider.name]
    runtime.set_default_logger_severity(4)  # the error below says why a provider cannot be used; the log need not
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    arguments: dict[str, Any] = {"enable_fallback": 0}
    if provider.devices:
        options.add_provider_for_devices(list(provider.devices[:1]), {})
    else:
        arguments["providers"] = _providers_for(provider.name, precision, captured)
    try:
        session = runtime.InferenceSession(os.fspath(path), options, **arguments)
    except (RuntimeError, ValueError) as error:
        raise _error_for(runtime, provider.name, reason_of(error)) from error
    session.disable_fallback()
    first = session.get_providers()[0]
    if first != wanted:
        raise _error_for(runtime, provider.name, f"fell back to {first}: its libraries do not load")
    if elsewhere := _find_work_elsewhere(session, wanted):
        raise EngineError(
            f"{path}: {wanted} leaves work to another provider ({', '.join(elsewhere)}); use --engine "
            "onnxruntime-cuda or onnxruntime"
        )
    return session


def run_bound(
    session: Any,
    provider: Provider,
    table: str | None,
    options: Any,
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
) -> list[Array]:
    """Run a session once: the inputs are copied to the GPU, and the outputs stay there until all are computed.

    Only the rows of the conditioning table that the call reads are copied: ``[G·B, …]`` in place of ``[R, …]``. So the
    input's shape depends on the batch alone, and TensorRT does not compile again for every length of the conditioning
    table.

    Args:
        session: from ``open_gpu_session``.
        provider: the session's provider.
        table: name of the input that is the conditioning table; None for a graph that does not read it.
        options: ONNX Runtime's options of the call, or None.
        inputs: every input of the graph by name.
        outputs: names of the outputs to return.
    """
    if table is not None:
        rows = inputs["rows"]
        numbers = np.arange(rows.size, dtype=rows.dtype).reshape(rows.shape)
        inputs = {**inputs, table: inputs[table][rows.ravel()], "rows": numbers}
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    for name in outputs:
        binding.bind_output(name, provider.memory, 0)
    binding.synchronize_inputs()
    session.run_with_iobinding(binding, options)
    binding.synchronize_outputs()
    return [np.asarray(result) for result in binding.copy_outputs_to_cpu()]


def _providers_for(name: str, precision: Precision, captured: bool) -> list[Any]:
    # Other programs use the device's memory too, so take no more than is needed. TF32 is off, because it is not FP32.
    settings = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    cuda = (PROVIDERS["cuda"], settings)
    if name == "cuda":
        return [(PROVIDERS["cuda"], {**settings, "enable_cuda_graph": "1"})] if captured else [cuda]
    half = {"trt_fp16_enable": str(precision in (Precision.FP16, Precision.INT8))}
    int8 = {"trt_int8_enable": "True"} if precision == Precision.INT8 else {}
    return [(PROVIDERS["tensorrt"], half | int8), cuda]


def _find_work_elsewhere(session: Any, provider: str) -> list[str]:
    """The kinds of operators in ``HEAVY`` that another provider runs. ONNX Runtime before 1.24 does not tell: empty."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)  # ONNX Runtime has it since 1.24
    if tell is None:
        return []
    kinds = {node.op_type for part in tell() if part.ep_name != provider for node in part.get_nodes()}
    return sorted(kinds & HEAVY)


def _error_for(runtime: Any, name: str, why: str) -> EngineError:
    present = [provider for provider in runtime.get_available_providers() if provider != "AzureExecutionProvider"]
    if all(map(_is_installed, ("onnxruntime", "onnxruntime-gpu"))):
        why += "; onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
    return EngineError(
        f"onnxruntime-{name}: {PROVIDERS[name]} cannot be used ({why}); ONNX Runtime {runtime.__version__} here has "
        f"{', '.join(present)}; {PROVIDERS[name]} needs an NVIDIA GPU and its driver; {INSTALL[name]}, or use "
        "--engine onnxruntime"
    )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def reason_of(error: Exception) -> str:
    """The first line of an error that ONNX Runtime raised."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
