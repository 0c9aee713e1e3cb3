"""Where an engine is built and will run: the library, its version, and the GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dit_engines.targets import GIB, RTX_COMPUTE_CAPABILITIES, TARGETS, Target, check_kernels, target_named
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.cuda import DeviceFacts, device
from dit_runtime.backends.tensorrt.store import described
from dit_runtime.core.errors import BuildError, EngineError

DEFAULT_RTX = "8.9"


@dataclass(frozen=True)
class BuildHost:
    """``gpu`` and ``driver`` are None where engines are built ahead of time, for another machine, and ``memory_bytes``
    where it is not known which.

    ``shared_memory`` is whether GPU and system share one; ``workspace_bytes`` the most that a kernel may use.
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
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers."""
        return tensorrt_api.TensorRT(None, self.library, self.version).numbers

    def in_words(self) -> str:
        return described(self.library, self.version, self.compute_capability, self.gpu)


def build_host_for(
    target: str,
    compute_capability: str | None = None,
    *,
    command: str = "",
    present: Callable[[], DeviceFacts] = device,
    imported: Callable[[str], tensorrt_api.TensorRT] = tensorrt_api.library,
) -> BuildHost:
    """Where a target is built, checked to be here.

    Args:
        target: a name of ``TARGETS``.
        compute_capability: of the GPU that ``rtx`` is built for.
        command: to run on the device, for the message that says so.
        present: asks for the GPU here.
        imported: imports a library.

    Raises:
        BuildError: the target's device is not the one here, or the library has no kernels for it.
        EngineError: the library is missing; or for ``this``, the GPU or its driver.
    """
    chosen = target_named(target)
    if chosen.library == "tensorrt_rtx":
        return _ahead_of_time(chosen, compute_capability or chosen.compute_capability or DEFAULT_RTX, imported)
    try:
        facts = present()
    except EngineError as error:
        if target == "this":
            raise EngineError(f"target this needs a GPU: {error}") from error
        raise BuildError(f"{_elsewhere(chosen)} None is here ({error}). {_there(chosen, command)}") from error
    if target != "this" and not _is(chosen, facts):
        here = f"sm_{facts.compute_capability.replace('.', '')} ({facts.name})"
        raise BuildError(f"{_elsewhere(chosen)} This is {here}. {_there(chosen, command)}")
    if target == "this":
        chosen = next((item for item in TARGETS.values() if item.device and _is(item, facts)), chosen)
    try:
        library = imported("tensorrt")
    except EngineError:
        if target != "this" or facts.compute_capability not in RTX_COMPUTE_CAPABILITIES:
            raise
        return _ahead_of_time(TARGETS["rtx"], facts.compute_capability, imported)
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


def _ahead_of_time(
    target: Target, compute_capability: str, imported: Callable[[str], tensorrt_api.TensorRT]
) -> BuildHost:
    library = imported("tensorrt_rtx")
    return BuildHost(
        library.name,
        library.version,
        compute_capability,
        memory_bytes=int(target.device.memory_gb * 1e9) if target.device else None,
        workspace_bytes=target.workspace_bytes,
    )


def _is(target: Target, facts: DeviceFacts) -> bool:
    """By compute capability and a word of the GPU's name; the Orins have the same and differ by their memory."""
    if target.library != "tensorrt" or target.device is None or facts.compute_capability != target.compute_capability:
        return False
    if re.search(rf"\b{target.gpu}\b", facts.name) is None:
        return False
    # CUDA reports somewhat less than the data sheet, and each name has a smaller model with half of the memory.
    gigabytes = facts.memory_bytes / 1e9
    return not target.shared_memory or 0.35 * target.device.memory_gb < gigabytes < 1.15 * target.device.memory_gb


def _elsewhere(target: Target) -> str:
    capability = (target.compute_capability or "").replace(".", "")
    return f"target {target.name} (sm_{capability}): TensorRT compiles on the GPU itself."


def _there(target: Target, command: str) -> str:
    return f"Copy the bundle to the device and run there: {command or f'dit-build BUNDLE --target {target.name}'}"
