"""What an engine on a CPU depends on: the processor, its matrix instructions, and the available memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from dit_runtime.core.environment import CPU_FLAGS, INT8_FLAGS
from dit_runtime.core.errors import EngineError


@dataclass(frozen=True)
class Processor:
    """A processor: its ``model`` as the system names it, and which of ``CPU_FLAGS`` it has (``flags``)."""

    model: str
    flags: tuple[str, ...]


def read_processor(root: Path = Path("/")) -> Processor:
    """The processor of this machine; ``root`` is the folder that has ``proc``."""
    model = platform.machine()  # platform.processor() would start uname
    with contextlib.suppress(OSError):
        for line in (root / "proc" / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                return Processor(model, tuple(flag for flag in CPU_FLAGS if flag in value.split()))
    return Processor(model, ())


def explain_slow_int8(processor: Processor) -> str | None:
    """A line that says what INT8 is worth on a processor that does not multiply it; None of others and unknown ones."""
    if not processor.flags or set(INT8_FLAGS) & set(processor.flags):
        return None
    return (
        f"this CPU ({processor.model}) has no instructions that multiply INT8 ({' or '.join(INT8_FLAGS)}), so an INT8 "
        "bundle may be slower here than others; compare the checkpoint's export with --fp16, or without an option for "
        "FP32: dit-bench BUNDLE"
    )


def describe_machine() -> dict[str, str]:
    """The identity of this machine, for verdicts and timings that hold on it alone."""
    cpu = read_processor()
    board = Path("/proc/device-tree/model")  # on a Jetson the processor has no name of its own
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": cpu.model,
        "instructions": " ".join(cpu.flags),
        "board": board.read_text(errors="replace").strip("\0 \n") if board.is_file() else "",
    }


def read_available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated before the system swaps or a container's limit ends the process; None if unknown."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc" / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)  # from KiB
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = root / "sys" / "fs" / "cgroup"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # The group's share of the page cache counts as used, but is given back when memory is short.
        reclaimable = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(reclaimable.get("inactive_file", 0)))
    return min(found, default=None)


def check_memory(need: int, what: str, root: Path = Path("/")) -> None:
    """Say before loading, rather than be killed, that ``need`` bytes are not available.

    ``what`` needs them, for the message.

    Raises:
        EngineError: fewer bytes are available than needed.
    """
    available = read_available_memory(root)
    if available is not None and need > available:
        raise EngineError(
            f"{what} needs at least {need / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB is available; "
            "end other programs or use a smaller model"
        )


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver is installed: the providers of a wheel are listed without one too."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def count_cpus() -> int:
    """CPUs that this process may use: an engine that chooses its own threads takes at most as many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_use(status: Path = Path("/proc/self/status")) -> dict[str, int]:
    """Bytes that this process holds: ``resident``, of which ``anonymous`` and ``file_backed``, and ``peak`` so far.

    Empty where the system does not say.
    """
    names = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file_backed", "VmHWM": "peak"}
    found = {}
    try:
        for line in status.read_text().splitlines():
            key, _, value = line.partition(":")
            if key in names:
                found[names[key]] = int(value.split()[0]) * 1024
    except OSError:
        return {}
    return found
