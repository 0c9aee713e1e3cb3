"""Where an engine is built: the library, its version, and the GPU that the engine is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dit_engines.targets import GIB, RTX_COMPUTE_CAPABILITIES, TARGETS, Target, check_kernels, target_named
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.cuda import DeviceFacts, read_device
from dit_runtime.backends.tensorrt.store import describe_platform
from dit_runtime.core.errors import BuildError, EngineError

DEFAULT_RTX = "8.9"


@dataclass(frozen=True)
class BuildHost:
    """The library that builds, and the GPU that it builds for.

    Attributes:
        library, version: as in ``api.TensorRT``.
        compute_capability: of the GPU that engines are for.
        gpu, driver: of the GPU here; None when engines are built ahead of time, for another machine.
        memory_bytes: the GPU's; None when nobody says which GPU it is.
        shared_memory: whether GPU and system share one memory.
        workspace_bytes: the most that a kernel may use besides its tensors.
    """

    library: str
    version: str
    compute_capability: str
    gpu: str | None = None
    driver: str | None = None
    memory_bytes: int | None = None
    shared_memory: bool = False
    workspace_bytes: int = 4 * GIB

    @property
    def times_kernels(self) -> bool:
        """Whether the library times kernels when it builds, and so has a timing cache. TensorRT-RTX does not."""
        return self.library == "tensorrt"

    @property
    def tactic_bytes(self) -> int | None:
        """The most device memory that the builder may take to time kernels; None where GPU and system are apart.

        By default TensorRT may take all of the memory, and on a Jetson the system's own is in it.
        """
        return self.memory_bytes // 2 if self.shared_memory and self.memory_bytes is not None else None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers."""
        return tensorrt_api.TensorRT(None, self.library, self.version).numbers

    def describe(self) -> str:
        return describe_platform(self.library, self.version, self.compute_capability, self.gpu)


def build_host_for(
    target: str,
    compute_capability: str | None = None,
    *,
    command: str = "",
    find_gpu: Callable[[], DeviceFacts] = read_device,
    import_library: Callable[[str], tensorrt_api.TensorRT] = tensorrt_api.import_library,
) -> BuildHost:
    """Where a target is built. The device of a target that is built on its device must be the one here.

    Args:
        target: a name of ``TARGETS``.
        compute_capability: of the GPU that ``rtx`` is built for.
        command: for the message that says to run it on the device.
        find_gpu: gives the facts of the GPU here.
        import_library: imports a library by its name.

    Raises:
        BuildError: the target's device is not the one here, or the library has no kernels for it.
        EngineError: the library is missing; for target ``this``, the GPU or its driver is missing.
    """
    chosen = target_named(target)
    if chosen.library == "tensorrt_rtx":
        return _host_ahead_of_time(
            chosen, compute_capability or chosen.compute_capability or DEFAULT_RTX, import_library
        )
    try:
        facts = find_gpu()
    except EngineError as error:
        if target == "this":
            raise EngineError(f"target this needs a GPU: {error}") from error
        raise BuildError(
            f"{_name_device(chosen)} This machine has no such GPU ({error}). {_tell_to_build_there(chosen, command)}"
        ) from error
    if target != "this" and not _is_device_of(chosen, facts):
        here = f"sm_{facts.compute_capability.replace('.', '')} ({facts.name})"
        raise BuildError(f"{_name_device(chosen)} This is {here}. {_tell_to_build_there(chosen, command)}")
    if target == "this":
        chosen = next((item for item in TARGETS.values() if item.device and _is_device_of(item, facts)), chosen)
    try:
        library = import_library("tensorrt")
    except EngineError:
        if target != "this" or facts.compute_capability not in RTX_COMPUTE_CAPABILITIES:
            raise
        return _host_ahead_of_time(TARGETS["rtx"], facts.compute_capability, import_library)
    check_kernels(library.name, library.numbers, facts.compute_capability, chosen.least)
    return BuildHost(
        library=library.name,
        version=library.version,
        compute_capability=facts.compute_capability,
        gpu=facts.name,
        driver=facts.driver,
        memory_bytes=facts.memory_bytes,
        shared_memory=facts.integrated,
        workspace_bytes=min(chosen.workspace_bytes, max(facts.memory_bytes // 8, 1)),
    )


def _host_ahead_of_time(
    target: Target, compute_capability: str, import_library: Callable[[str], tensorrt_api.TensorRT]
) -> BuildHost:
    library = import_library("tensorrt_rtx")
    return BuildHost(
        library.name,
        library.version,
        compute_capability,
        memory_bytes=int(target.device.memory_gb * 1e9) if target.device else None,
        workspace_bytes=target.workspace_bytes,
    )


def _is_device_of(target: Target, facts: DeviceFacts) -> bool:
    """Whether a GPU is the target's: by compute capability and a word of its name; the Orins differ by their memory."""
    if target.library != "tensorrt" or target.device is None or facts.compute_capability != target.compute_capability:
        return False
    if re.search(rf"\b{target.gpu}\b", facts.name) is None:
        return False
    # CUDA reports somewhat less than the data sheet, and of each name there is a model with half of the memory.
    gigabytes = facts.memory_bytes / 1e9
    return not target.shared_memory or 0.35 * target.device.memory_gb < gigabytes < 1.15 * target.device.memory_gb


def _name_device(target: Target) -> str:
    capability = (target.compute_capability or "").replace(".", "")
    return f"target {target.name} (sm_{capability}): TensorRT compiles on the GPU itself."


def _tell_to_build_there(target: Target, command: str) -> str:
    return f"Copy the bundle to the device and run there: {command or f'dit-build BUNDLE --target {target.name}'}"
