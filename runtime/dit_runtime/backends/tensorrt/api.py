"""The only module that touches the libraries TensorRT 10.3 to 11 and TensorRT-RTX.

It hides the differences between the libraries and their versions. A test collects every attribute of the libraries that
this file uses, and looks it up in the real bindings of 10.3, 10.16, 11.4 and RTX.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.errors import BuildError, EngineError

# Each library's name, and how to install it.
LIBRARIES = {
    "tensorrt": "on a Jetson it comes with JetPack (python3 -m venv --system-site-packages), elsewhere "
    "pip install 'dit-export[tensorrt]'",
    "tensorrt_rtx": "pip install 'dit-export[rtx]'",
}

# Builder flags that are set besides the defaults. TensorRT-RTX needs this one for plans that a CUDA graph captures
# (release notes of 1.2); without it, it may allocate memory while it runs.
BUILDER_FLAGS = {"tensorrt": (), "tensorrt_rtx": ("REQUIRE_USER_ALLOCATION",)}

# Objects of the libraries, under their classes' own names: the libraries have no types of their own to import.
Builder: TypeAlias = Any
EngineInspector: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
IHostMemory: TypeAlias = Any
ILogger: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IOptimizationProfile: TypeAlias = Any
IRuntimeCache: TypeAlias = Any
IRuntimeConfig: TypeAlias = Any
ITensor: TypeAlias = Any
ITimingCache: TypeAlias = Any
OnnxParser: TypeAlias = Any
ParserError: TypeAlias = Any
Runtime: TypeAlias = Any

Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[Shape]]  # for each input, its least, usual and largest shape


@dataclass(frozen=True)
class TensorRT:
    """An imported library: its module, its name (a key of ``LIBRARIES``), and its version, such as ``10.3.0``."""

    module: Any
    name: str
    version: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers, to compare with ``(10, 8)``."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:3])


class Tensor(NamedTuple):
    """An input or output of an engine. A dynamic axis is -1 in ``shape``."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    shape: Shape


class Layer(NamedTuple):
    """A kernel as the engine's inspector describes it. ``details`` is the inspector's JSON object."""

    name: str
    kind: str
    details: Mapping[str, Any]


class Built(NamedTuple):
    """The result of a build: the plan, the timing cache after the build, and whether TF32 was on.

    TensorRT-RTX times no kernels, so it has no timing cache.
    """

    plan: IHostMemory  # not bytes, which would be a second copy
    timing_cache: bytes | None
    tf32: bool


Log = Callable[[str, str], None]  # severity (``error``, ``warning``, ``info``, ``verbose``) and message
Report = Callable[[str, int, int], bool]  # phase, steps done, all steps; returns False to cancel the build


def import_library(name: str) -> TensorRT:
    """Import a library, a key of ``LIBRARIES``.

    Raises:
        EngineError: the name is unknown, the library is not installed, or its shared libraries do not load.
    """
    if name not in LIBRARIES:
        raise EngineError(f"library {name!r} is unknown; choose one of {', '.join(LIBRARIES)}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise EngineError(f"{name} is not installed for this Python; {LIBRARIES[name]}") from error
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise EngineError(f"{name} cannot be loaded ({reason}); install {name} again: {LIBRARIES[name]}") from error
    return TensorRT(module, name, str(module.__version__))


def make_logger(library: TensorRT, log: Log) -> ILogger:
    """Make the library's logger, which passes each message to ``log``. It must outlive every object made with it."""
    trt = library.module
    names = {
        trt.ILogger.INTERNAL_ERROR: "error",
        trt.ILogger.ERROR: "error",
        trt.ILogger.WARNING: "warning",
        trt.ILogger.INFO: "info",
        trt.ILogger.VERBOSE: "verbose",
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # untyped module
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log(names[severity], message)

    return Logger()


def plan_from_onnx(
    library: TensorRT,
    onnx: Path,
    profiles: Sequence[Shapes],
    *,
    log: Log,
    report: Report,
    workspace_bytes: int,
    optimization_level: int | None = None,
    compute_capability: str | None = None,
    auxiliary_streams: int | None = None,
    timing_cache: bytes | None = None,
    tactic_bytes: int | None = None,
    int8: bool = False,
) -> Built:
    """Compile a strongly typed ONNX file to a plan. TF32 is off.

    Args:
        library: the library that compiles.
        onnx: the ONNX file, with its weights beside it.
        profiles: the optimization profiles. An axis that has the same size in all of them becomes static.
        log: gets the builder's messages. Its verbose message ``Layers:`` lists the kernels.
        report: gets the builder's progress.
        workspace_bytes: the most memory that a kernel may use besides its tensors.
        optimization_level: 0 to 5; None is the library's default.
        compute_capability: such as ``8.9``, of another GPU to compile for. Only TensorRT-RTX can; None is the GPU here.
        auxiliary_streams: the most auxiliary streams; None lets the library choose.
        timing_cache: from an earlier build by the same library on the same device; None is empty. TensorRT only.
        tactic_bytes: the most device memory that the builder may take to time kernels; None is the library's default.
        int8: whether products of the graph are INT8.

    Raises:
        EngineError: the GPU here has no INT8, and the graph needs it.
        BuildError: the file cannot be parsed or compiled, a profile is refused, or the build was cancelled.
    """
    trt = library.module
    errors: list[str] = []
    cancelled = False

    def note(severity: str, message: str) -> None:
        if severity == "error":
            errors.append(message)
        log(severity, message)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # untyped module
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            nonlocal cancelled
            cancelled = cancelled or not report(phase, step + 1, self._steps[phase])
            return not cancelled

        def phase_finish(self, phase: str) -> None:
            return None

    own_logger = make_logger(library, note)
    builder: Builder = _make_builder(library, own_logger, errors)
    if int8 and not getattr(builder, "platform_has_fast_int8", True):  # TensorRT 11 and RTX do not tell: they have it
        raise EngineError(
            f"{library.name} {library.version}: the GPU here does not multiply INT8; build the checkpoint's export "
            "with --fp16"
        )
    # TensorRT 10 needs this flag. In 11 every network is strongly typed, and the flag is ignored.
    network: INetworkDefinition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: OnnxParser = trt.OnnxParser(network, own_logger)
    if not parser.parse_from_file(str(onnx)):
        problems: list[ParserError] = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [problem.desc() for problem in problems]
        raise BuildError(f"{onnx}: cannot be parsed ({'; '.join(reasons or errors) or 'no reason given'})")
    config: IBuilderConfig = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if tactic_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM, tactic_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and FP32 products would lose 13 bits
    if library.name == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the audit reads datatypes
    monitor = Monitor()
    config.progress_monitor = monitor
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    if auxiliary_streams is not None:
        config.max_aux_streams = auxiliary_streams
    if compute_capability is not None:
        _set_compute_capability(library, config, compute_capability)
    cache: ITimingCache = None
    if library.name == "tensorrt":
        cache = config.create_timing_cache(timing_cache or b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            log("warning", "the timing cache is of another device or version and is not used")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
    _pin(network, profiles)
    for shapes in profiles:
        profile: IOptimizationProfile = builder.create_optimization_profile()
        for name, (least, usual, largest) in shapes.items():
            profile.set_shape(name, least, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{onnx}: optimization profile refused ({'; '.join(errors) or dict(shapes)})")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = "cancelled" if cancelled else "; ".join(errors) or "no reason given"
        raise BuildError(f"{onnx}: cannot be built ({reason})")
    serialized = None if cache is None else bytes(cache.serialize())
    return Built(plan, serialized, bool(config.get_flag(trt.BuilderFlag.TF32)))


def _make_builder(library: TensorRT, own_logger: ILogger, errors: Sequence[str]) -> Builder:
    try:
        return library.module.Builder(own_logger)
    except (TypeError, RuntimeError) as error:  # the bindings raise TypeError where CUDA cannot start
        raise BuildError(_describe_failed_start("builder", library, errors or [str(error)])) from error


def _describe_failed_start(what: str, library: TensorRT, reasons: Sequence[str]) -> str:
    return (
        f"the {what} of {library.name} {library.version} cannot start ({'; '.join(reasons)}); check that the GPU's "
        "driver is there and new enough for this version: nvidia-smi"
    )


def _set_compute_capability(library: TensorRT, config: IBuilderConfig, capability: str) -> None:
    if library.name != "tensorrt_rtx":
        raise BuildError(
            f"{library.name} compiles only for the GPU of this machine, not for {capability}; run dit-build on a "
            f"machine with a GPU of compute capability {capability}"
        )
    config.num_compute_capabilities = 1
    value = getattr(library.module.ComputeCapability, "SM" + capability.replace(".", ""), None)
    if value is None:
        raise BuildError(f"TensorRT-RTX {library.version} does not compile for compute capability {capability}")
    config.set_compute_capability(value, 0)


def _pin(network: INetworkDefinition, profiles: Sequence[Shapes]) -> None:
    """Make every axis static that has the same size in all profiles: static shapes have faster kernels."""
    for index in range(network.num_inputs):
        tensor: ITensor = network.get_input(index)
        shapes = [shape for profile in profiles for shape in profile[tensor.name]]
        tensor.shape = tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))


def make_runtime(library: TensorRT, own_logger: ILogger) -> Runtime:
    """Make the library's runtime. It must outlive its engines. Plans that contain host code are refused.

    Raises:
        EngineError: CUDA or the library cannot start; its logger gets the reason.
    """
    try:
        runtime: Runtime = library.module.Runtime(own_logger)
    except (TypeError, RuntimeError) as error:  # the bindings raise TypeError where CUDA cannot start
        raise EngineError(_describe_failed_start("runtime", library, [str(error)])) from error
    runtime.engine_host_code_allowed = False
    return runtime


def engine_from_plan(runtime: Runtime, plan: bytes | memoryview) -> ICudaEngine:
    """Deserialize a plan. A plan is native code: check it against its sidecar first.

    Raises:
        EngineError: the library refuses the plan; its logger gets the reason.
    """
    engine: ICudaEngine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError("the plan cannot be loaded here")
    return engine


def tensors_of(library: TensorRT, engine: ICudaEngine) -> dict[str, Tensor]:
    """The engine's inputs and outputs by name."""
    trt = library.module
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        found[name] = Tensor(
            name,
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            np.dtype(trt.nptype(engine.get_tensor_dtype(name))),
            tuple(engine.get_tensor_shape(name)),
        )
    return found


def profiles_of(library: TensorRT, engine: ICudaEngine) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """Least, usual and largest shape of each input in each optimization profile."""
    inputs = [tensor.name for tensor in tensors_of(library, engine).values() if tensor.is_input]
    profiles = []
    for index in range(engine.num_optimization_profiles):
        shapes = {}
        for name in inputs:
            least, usual, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            shapes[name] = (least, usual, largest)
        profiles.append(shapes)
    return profiles


def activation_bytes_of(engine: ICudaEngine, profile_index: int) -> int:
    """Bytes of device memory that a context needs at the largest shapes of a profile."""
    return int(engine.get_device_memory_size_for_profile_v2(profile_index))


def make_runtime_cache(library: TensorRT, engine: ICudaEngine) -> IRuntimeCache | None:
    """Make an empty cache for the kernels that TensorRT-RTX compiles on the GPU; None for TensorRT, which has none."""
    if library.name != "tensorrt_rtx":
        return None
    runtime_config: IRuntimeConfig = engine.create_runtime_config()
    cache: IRuntimeCache = runtime_config.create_runtime_cache()
    return cache


def fill_runtime_cache(cache: IRuntimeCache, content: bytes) -> bool:
    """Load what ``bytes_of_runtime_cache`` gave. False where the library refuses it: of another GPU or version."""
    return bool(cache.deserialize(content))


def bytes_of_runtime_cache(cache: IRuntimeCache) -> bytes:
    """A runtime cache's content, to be kept in a file."""
    return bytes(cache.serialize())


def make_context(
    library: TensorRT, engine: ICudaEngine, profile_index: int, stream: int, cache: IRuntimeCache | None = None
) -> IExecutionContext:
    """Make an execution context for a profile, without memory of its own. Synchronize ``stream`` before its first use.

    Args:
        library: the engine's.
        engine: deserialized.
        profile_index: of the optimization profile.
        stream: on which the context switches to the profile.
        cache: from ``make_runtime_cache``; the contexts of an engine share it.

    Raises:
        EngineError: the library refuses; its logger gets the reason.
    """
    try:
        context = _make_context(library, engine, cache)
        if context is None or not context.set_optimization_profile_async(profile_index, stream):
            raise EngineError(f"no execution context for optimization profile {profile_index}")
    except RuntimeError as error:  # the bindings raise it where the library returns false
        raise EngineError(f"no execution context for optimization profile {profile_index}: {error}") from error
    # A plan of detailed verbosity, which the audit needs, would describe each kernel to a profiler at each run.
    context.nvtx_verbosity = library.module.ProfilingVerbosity.NONE
    return context


def _make_context(library: TensorRT, engine: ICudaEngine, cache: IRuntimeCache | None) -> IExecutionContext:
    trt = library.module
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if library.name != "tensorrt_rtx":
        return engine.create_execution_context(strategy)
    # By default TensorRT-RTX starts with kernels for any shape, and compiles kernels for the given shape meanwhile.
    # A CUDA graph that is captured in that time would keep the slower kernels.
    runtime_config: IRuntimeConfig = engine.create_runtime_config()
    runtime_config.set_execution_context_allocation_strategy(strategy)
    runtime_config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if cache is not None:
        runtime_config.set_runtime_cache(cache)
    return engine.create_execution_context(runtime_config)


def is_capturable(library: TensorRT, context: IExecutionContext, stream: int) -> bool:
    """Whether a CUDA graph can capture a context's work. A context of TensorRT that was run once always can be."""
    return library.name != "tensorrt_rtx" or bool(context.is_stream_capturable(stream))


def give_memory(context: IExecutionContext, address: int, size: int) -> None:
    """Give a context device memory for its activations, aligned to 256 bytes. Contexts may share it, one at a time."""
    context.set_device_memory(address, size)


def bind(context: IExecutionContext, name: str, address: int, shape: Shape | None = None) -> None:
    """Bind a tensor to an address on the device, and set the shape of an input.

    Raises:
        EngineError: the shape is outside the optimization profile, or the name is unknown.
    """
    if shape is not None and not context.set_input_shape(name, shape):
        raise EngineError(f"input {name}: {list(shape)} is outside the optimization profile; build one for it")
    if not context.set_tensor_address(name, address):
        raise EngineError(f"tensor {name}: the engine has no tensor of this name")


def output_shape_of(context: IExecutionContext, name: str) -> Shape:
    """The shape of an output, once the shapes of all inputs are set."""
    return tuple(context.get_tensor_shape(name))


def enqueue(context: IExecutionContext, stream: int) -> None:
    """Queue the network's work on a CUDA stream, and return before the work is done.

    Raises:
        EngineError: the library refuses; its logger gets the reason.
    """
    if not context.execute_async_v3(stream):
        raise EngineError("the engine could not be started")


def listing_of(library: TensorRT, engine: ICudaEngine) -> str:
    """The inspector's JSON of an engine's kernels. It needs a loaded engine, and so the engine's GPU."""
    trt = library.module
    inspector: EngineInspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def layers_from_json(text: str) -> list[Layer]:
    """Kernels from an inspector's JSON.

    Raises:
        EngineError: the JSON has no layers, or only their names, as for an engine built without detailed verbosity.
    """
    try:
        layers = json.loads(text)["Layers"]
        return [Layer(str(layer["Name"]), str(layer.get("LayerType", "")), layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError("the inspector does not describe the engine's layers; build it with dit-build") from error


def bytes_of_plan(plan: IHostMemory) -> NDArray[np.uint8]:
    """A plan's bytes ``[size]``, without a copy."""
    return np.frombuffer(plan, np.uint8)
