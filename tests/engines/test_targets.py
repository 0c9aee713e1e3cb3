"""Targets as data, and whether the device that a target names is the one here."""

from __future__ import annotations

import contextlib
import json

import pytest
from support.commands import run_command

from dit_engines.build_host import BuildHost, build_host_for
from dit_engines.targets import DEVICES, GIB, TARGETS, check_kernels, check_precision, format_targets, target_named
from dit_runtime.backends.tensorrt.api import TensorRT
from dit_runtime.backends.tensorrt.cuda import DeviceFacts, read_device
from dit_runtime.bundle.precision import Precision
from dit_runtime.core.errors import BuildError, EngineError


def gpu(name: str, compute_capability: str, memory_bytes: int) -> DeviceFacts:
    """A GPU as the driver describes it."""
    integrated = name.startswith(("Orin", "Thor"))
    return DeviceFacts(name, compute_capability, memory_bytes, memory_bytes // 2, "540.4.0", integrated)


ORIN = gpu("Orin", "8.7", 7_990_000_000)
L4 = gpu("NVIDIA L4", "8.9", 23_600_000_000)


def host_for(
    target: str, facts: DeviceFacts | None, version: str = "10.3.0", libraries: tuple[str, ...] = ("tensorrt",)
) -> BuildHost:
    def find_gpu() -> DeviceFacts:
        if facts is None:
            raise EngineError("no NVIDIA driver answers")
        return facts

    def import_library(name: str) -> TensorRT:
        if name not in libraries:
            raise EngineError(f"{name} is not installed")
        return TensorRT(None, name, version)

    return build_host_for(
        target, command=f"dit-build b --target {target}", find_gpu=find_gpu, import_library=import_library
    )


def test_the_list_is_whole() -> None:
    """Every target of the issue is there, with figures that agree with its device's."""
    names = "orin-nano orin-nx agx-orin thor l4 a100 h100 b200 rtx-30 rtx-40 rtx-50 rtx this"
    assert list(TARGETS) == names.split()
    for target in TARGETS.values():
        if target.device is not None:
            assert target.compute_capability == target.device.compute_capability
            assert target.workspace_bytes <= target.device.memory_gb * GIB / 4
        assert (target.optimization_level is None) == (target.library == "tensorrt_rtx")
        assert target.name in format_targets()
    assert all(device in [target.device for target in TARGETS.values()] for device in DEVICES)
    assert [name for name, target in TARGETS.items() if target.shared_memory] == names.split()[:4]


def test_the_command_lists_them() -> None:
    """``--list-targets`` needs no bundle, for people and as JSON."""
    done = run_command("dit-build", "--list-targets")
    assert done.returncode == 0
    assert "Jetson Orin Nano Super" in done.stdout
    listed = json.loads(run_command("dit-build", "--list-targets", "--json").stdout)
    assert [item["name"] for item in listed] == list(TARGETS)
    assert listed[0]["profiles"] == "1 before 10.8"
    assert run_command("dit-build").stderr.startswith("dit-build: expected a bundle, or --list-targets")


def test_profiles_by_version() -> None:
    """One profile on JetPack 6's 10.3, any number once the fault was fixed, and always on RTX."""
    orin, rtx = TARGETS["orin-nano"], TARGETS["rtx"]
    assert [orin.profile_limit(version) for version in ((10, 3, 0), (10, 7), (10, 8), (11, 4, 1))] == [1, 1, None, None]
    assert rtx.profile_limit((1, 7, 1)) is None


def test_the_device_is_here() -> None:
    """On the device the build host is the GPU with its library, driver and memory."""
    found = host_for("l4", L4)
    assert found == BuildHost(
        "tensorrt", "10.3.0", "8.9", "NVIDIA L4", "540.4.0", 23_600_000_000, False, 23_600_000_000 // 8
    )
    orin = host_for("orin-nano", ORIN)
    assert (orin.shared_memory, orin.workspace_bytes, orin.numbers) == (True, 7_990_000_000 // 8, (10, 3, 0))
    assert host_for("this", ORIN) == orin  # finds what it is
    unknown = host_for("this", gpu("NVIDIA L40S", "8.9", 48_000_000_000))
    assert (unknown.gpu, unknown.workspace_bytes) == ("NVIDIA L40S", 4 * GIB)


@pytest.mark.parametrize(
    ("target", "facts", "words"),
    [
        (
            "l4",
            None,
            "target l4 (sm_89): TensorRT compiles on the GPU itself. This machine has no such GPU (no NVIDIA driver",
        ),
        ("l4", ORIN, "This is sm_87 (Orin)."),
        ("l4", gpu("NVIDIA L40S", "8.9", 48_000_000_000), "This is sm_89 (NVIDIA L40S)."),
        ("h100", gpu("NVIDIA H200", "9.0", 150_000_000_000), "This is sm_90 (NVIDIA H200)."),
        ("agx-orin", ORIN, "This is sm_87 (Orin)."),
        ("orin-nano", gpu("Orin", "8.7", 64_000_000_000), "This is sm_87 (Orin)."),
    ],
)
def test_another_device_is_refused(target: str, facts: DeviceFacts | None, words: str) -> None:
    """A target's engines are not built where they would not run, and the command to run there is said."""
    with pytest.raises(BuildError) as raised:
        host_for(target, facts)
    assert words in str(raised.value)
    assert str(raised.value).endswith(f"Copy the bundle to the device and run there: dit-build b --target {target}")


def test_ahead_of_time_needs_no_gpu() -> None:
    """RTX targets are built without asking for a GPU, for the compute capability of their name."""
    hosts = [host_for(name, None, "1.7.1", ("tensorrt_rtx",)) for name in ("rtx-30", "rtx-40", "rtx-50", "rtx")]
    assert [item.compute_capability for item in hosts] == ["8.6", "8.9", "12.0", "8.9"]
    assert {item.gpu for item in hosts} == {None}
    with pytest.raises(EngineError, match="tensorrt_rtx is not installed"):
        host_for("rtx", None)


def test_this_gpu() -> None:
    """``this`` says when there is no GPU; on a GeForce with TensorRT-RTX alone it is that."""
    with pytest.raises(EngineError, match="target this needs a GPU: no NVIDIA driver answers"):
        host_for("this", None)
    geforce = gpu("NVIDIA GeForce RTX 5090", "12.0", 32_000_000_000)
    found = host_for("this", geforce, "1.7.1", ("tensorrt_rtx",))
    assert (found.library, found.compute_capability, found.gpu) == ("tensorrt_rtx", "12.0", None)
    with pytest.raises(EngineError, match="tensorrt is not installed"):
        host_for("this", ORIN, libraries=())


def test_a_library_without_the_gpus_kernels() -> None:
    """The server build of 10.13.3 on Orin, and a TensorRT older than the GPU, are told before they try."""
    with pytest.raises(
        BuildError, match=r"TensorRT 10\.13\.3 on sm_87: .*\(SBSA\) and has no kernels for Orin; install"
    ):
        host_for("orin-nano", ORIN, "10.13.3.9")
    assert host_for("orin-nano", ORIN, "10.16.2").version == "10.16.2"
    with pytest.raises(BuildError, match=r"TensorRT 10\.7\.0 is too old for sm_100; install 10\.8 or later"):
        host_for("b200", gpu("NVIDIA B200", "10.0", 192_000_000_000), "10.7.0")
    with pytest.raises(BuildError, match="is too old"):
        check_kernels("tensorrt", (10, 2, 0), "8.9", (10, 3))


@pytest.mark.parametrize(
    ("precision", "capability", "words"),
    [
        (Precision.FP8, "8.7", "b: sm_87 does not multiply FP8, which takes sm_89 or later; .* with --int8, or"),
        (Precision.FP8, "8.6", "sm_86"),
        (Precision.FP8, "7.5", "sm_75"),
        (Precision.BF16, "7.5", "b: sm_75 does not multiply BF16, which takes sm_80 or later; .* with --fp16, or"),
    ],
)
def test_a_precision_that_the_gpu_lacks(precision: Precision, capability: str, words: str) -> None:
    """Refused before a build, with the reason and the nearest precision: a builder may make part of an engine."""
    with pytest.raises(BuildError, match=words):
        check_precision(precision, capability, "b")


@pytest.mark.parametrize(
    ("precision", "capability"), [("fp8", "8.9"), ("fp8", "9.0"), ("fp8", "12.0"), ("bf16", "8.0"), ("int8", "7.5")]
)
def test_a_precision_that_the_gpu_has(precision: str, capability: str) -> None:
    check_precision(Precision(precision), capability, "b")


def test_an_unknown_target() -> None:
    """A name that is no target is answered with those that are."""
    with pytest.raises(BuildError, match="target 'xavier' is not supported; choose one of orin-nano, "):
        target_named("xavier")


def test_no_driver_is_one_line() -> None:
    """Without a GPU or its driver the real question ends in an ``EngineError``."""
    with contextlib.suppress(EngineError):
        pytest.skip(f"there is a GPU here: {read_device().name}")
    with pytest.raises(EngineError) as raised:
        read_device()
    assert "\n" not in str(raised.value)
