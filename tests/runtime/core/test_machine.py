"""What is said of a machine that lacks what a bundle is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_runtime.core.machine import explain_slow_int8, read_processor


@pytest.mark.parametrize(
    ("line", "able"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16", False),
        ("flags : fpu avx2 avx512f avx512_vnni", True),
        ("flags : fpu avx2 avx_vnni", True),
        ("flags : fpu amx_int8 amx_tile", True),
        ("Features : fp asimd", False),
        ("Features : fp asimd asimddp", True),
        ("", True),  # nobody knows
    ],
)
def test_a_processor_without_int8(tmp_path: Path, line: str, able: bool) -> None:
    """What INT8 is worth is said of a processor without instructions for it, with the alternatives."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"model name : Some CPU\n{line}\n")
    said = explain_slow_int8(read_processor(tmp_path))
    assert (said is None) == able
    if said is not None:
        assert "Some CPU" in said
        assert "the checkpoint's export with --fp16, or without an option for FP32" in said
