"""What a measured figure depends on besides the code: processor, libraries, power mode and clocks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13")
# Instructions that multiply INT8, and all that decide how fast matrix products are.
INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", *INT8_FLAGS)
GPU_QUERY = "name,driver_version,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"

RunCommand = Callable[[Sequence[str]], str]


def describe_environment(threads: int = 0, root: Path = Path("/"), run: RunCommand | None = None) -> dict[str, Any]:
    """The machine and its libraries, to be recorded beside every figure.

    Args:
        threads: of the engine; 0 where the engine chooses.
        root: of the file system: it has ``proc``, ``sys`` and ``etc``.
        run: runs a command and returns its stdout, or raises ``OSError``.
    """
    run = run or _run_command
    found: dict[str, Any] = {
        "system": _describe_system(),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "libraries": {"numpy": np.__version__, **_read_versions()},
    }
    for line in _read_text(root / "proc" / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            found["processor"] = value.strip()
        elif key.strip() in ("flags", "Features"):
            present = set(value.split())
            found["cpu_flags"] = [flag for flag in CPU_FLAGS if flag in present]
            break
    if model := _read_text(root / "proc" / "device-tree" / "model"):
        found["board"] = model
    if release := _read_text(root / "etc" / "nv_tegra_release"):
        found["jetson"] = {"release": release.splitlines()[0].lstrip("# "), **_describe_jetson(root, run)}
    else:
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = run(["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]).splitlines()
            names = GPU_QUERY.split(",")
            found["gpus"] = [
                dict(zip(names, (value.strip() for value in line.split(",")), strict=True)) for line in lines
            ]
    return found


def _describe_system() -> str:
    """System, release, architecture and C library. ``platform.platform`` starts ``uname`` on Python 3.10."""
    system = os.uname()
    library = "".join(platform.libc_ver())
    return "-".join([system.sysname, system.release, system.machine, *([f"with-{library}"] if library else [])])


def _describe_jetson(root: Path, run: RunCommand) -> dict[str, Any]:
    """Power mode (``nvpmodel``) and clocks in MHz: now, lowest and highest.

    A power mode caps the clocks. ``jetson_clocks`` pins them at the highest, so ``pinned`` says whether lowest and
    highest are the same.
    """
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        if mode := re.search(r"NV Power Mode:\s*(\S.*)", run(["nvpmodel", "-q"])):
            found["power_mode"] = mode[1].strip()
    if "power_mode" not in found and (status := _read_text(root / "var" / "lib" / "nvpmodel" / "status")):
        found["power_mode"] = status
    clocks: dict[str, dict[str, float | bool]] = {}
    for folder in sorted((root / "sys" / "class" / "devfreq").glob("*")):
        values = [_read_text(folder / f"{name}_freq") for name in ("cur", "min", "max")]
        if "gpu" in folder.name and all(value.isdecimal() for value in values):
            clocks[folder.name] = _describe_clock([int(value) / 1e6 for value in values])  # from Hz
    for folder in sorted((root / "sys" / "devices" / "system" / "cpu" / "cpufreq").glob("policy*")):
        values = [_read_text(folder / f"scaling_{name}_freq") for name in ("cur", "min", "max")]
        if all(value.isdecimal() for value in values):
            clocks[f"cpu {folder.name}"] = _describe_clock([int(value) / 1e3 for value in values])  # from kHz
    if clocks:
        found["clocks_mhz"] = clocks
    return found


def _describe_clock(values: list[float]) -> dict[str, float | bool]:
    current, least, most = values
    return {"now": current, "min": least, "max": most, "pinned": least == most}


def _read_versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().strip("\0")
    except OSError:
        return ""


def _run_command(command: Sequence[str]) -> str:
    """The stdout of a command; raises OSError if it is not installed, fails or does not answer in 10 s."""
    if shutil.which(command[0]) is None:  # no process is forked to find that out
        raise FileNotFoundError(f"{command[0]} is not installed")
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=10, check=True)
    except subprocess.SubprocessError as error:
        raise OSError(str(error)) from error
    return done.stdout
