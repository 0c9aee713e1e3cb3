"""What is recorded beside a figure, on a PC, a datacenter box and a Jetson (file systems made for the test)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dit_runtime.core.environment import describe_environment


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def nothing(command: Sequence[str]) -> str:
    raise FileNotFoundError(command[0])


def test_a_jetson_records_power_mode_and_clocks(tmp_path: Path) -> None:
    """Power mode, GPU and CPU clocks with whether they are pinned, board and release."""
    gpu, cpu = "sys/class/devfreq/17000000.gpu", "sys/devices/system/cpu/cpufreq/policy0"
    root = files(
        tmp_path,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n# more\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm bf16\n",
            **{f"{gpu}/{name}_freq": value for name, value in {"cur": "306000000", "min": "1020000000"}.items()},
            f"{gpu}/max_freq": "1020000000",
            **{f"{cpu}/scaling_{name}_freq": value for name, value in {"cur": "1728000", "min": "729600"}.items()},
            f"{cpu}/scaling_max_freq": "1728000",
            "sys/class/devfreq/15340000.vic/cur_freq": "115200000",
        },
    )
    found = describe_environment(root=root, run=lambda command: "NV Power Mode: MAXN_SUPER\n2\n")
    assert found["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert found["cpu_flags"] == ["asimd", "bf16"]
    assert found["jetson"] == {
        "release": "R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
        "power_mode": "MAXN_SUPER",
        "clocks_mhz": {
            "17000000.gpu": {"now": 306.0, "min": 1020.0, "max": 1020.0, "pinned": True},
            "cpu policy0": {"now": 1728.0, "min": 729.6, "max": 1728.0, "pinned": False},
        },
    }
    files(root, {"var/lib/nvpmodel/status": "pmode:0002"})
    assert describe_environment(root=root, run=nothing)["jetson"]["power_mode"] == "pmode:0002"


def test_a_datacenter_box_records_its_gpus(tmp_path: Path) -> None:
    """Name, driver, power limit and clocks of each GPU; without a driver there is no entry."""
    line = "NVIDIA L4, 580.95.05, 72.00 W, 210 MHz, 405 MHz, 2040 MHz, 6251 MHz\n"
    (gpu,) = describe_environment(root=tmp_path, run=lambda command: line)["gpus"]
    assert gpu["name"] == "NVIDIA L4"
    assert gpu["power.limit"] == "72.00 W"
    assert gpu["clocks.max.mem"] == "6251 MHz"
    assert "gpus" not in describe_environment(root=tmp_path, run=nothing)
    assert "gpus" not in describe_environment(root=tmp_path, run=lambda command: "no devices were found\n")


def test_here() -> None:
    """This machine's record names its processor, numpy, and the threads that were asked for."""
    found = describe_environment(threads=3)
    assert found["threads"] == 3
    assert found["libraries"]["numpy"]
    assert found["processor"]
    assert found["cores"] >= 1
