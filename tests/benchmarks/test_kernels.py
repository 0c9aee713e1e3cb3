"""Kernels per block, as the real TensorRT-RTX builder counts them, through ``benchmarks/kernels.py``."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from dit_export.checkpoints.layouts import Numerics, official_shapes
from dit_export.checkpoints.positions import Positions
from dit_export.checkpoints.random_weights import random_tensors
from dit_export.graphs import model
from dit_export.graphs.from_weights import step_from_weights
from dit_export.graphs.precision import FP32

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script as a module, for a narrow model with DiT-XL's head size of 72."""
    spec = importlib.util.spec_from_file_location("kernels_benchmark", FOLDER / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.XL = replace(module.XL, width=144, heads=2, mlp_width=576, latent_size=(8, 8))
    return module


@pytest.mark.slow  # two builds
def test_a_block_is_eight_kernels(benchmark: ModuleType, tmp_path: Path) -> None:
    """A block is 8 kernels and the rest 5, for one branch and for two, no stream waits, every attention is fused."""
    pytest.importorskip("tensorrt_rtx")
    row = benchmark.measure(next(benchmark.iterate_ablations()), (2, 4), tmp_path)
    for blocks in (2, 4):
        for profile in row[f"blocks_{blocks}"]["profiles"]:
            assert (profile["kernels"], profile["waits_signals"]) == (8 * blocks + 5, 0)  # measured: 21 and 37
            assert profile["fused_attention"] == blocks


def test_an_ablation_is_the_same_function(benchmark: ModuleType) -> None:
    """What the table calls the same function gives the same numbers as the exported one, in FP32."""

    def next_state(ablation: object) -> torch.Tensor:
        spec = replace(benchmark.XL, depth=2, conditioning=ablation.conditioning)  # type: ignore[attr-defined]
        shapes = official_shapes(spec, spec.output_channels)
        weights = {name: stored.read() for name, stored in random_tensors(shapes, 0).items()}
        random = torch.Generator().manual_seed(1)
        state, noise, coefficients, guidance, table = (
            torch.randn(shape, generator=random)
            for shape in ((3, 3, 4, 8, 8), (3, 4, 8, 8), (3, 17), (2, 3, 4), (5, *model.table_axes(spec)[1]))
        )
        rows = torch.tensor([[0, 1, 2], [3, 4, 0]], dtype=torch.int32)
        with ExitStack() as stack, torch.inference_mode():
            for (owner, name), function in ablation.replaced.items():  # type: ignore[attr-defined]
                stack.enter_context(patch.object(owner, name, function))
            positions = Positions(benchmark.official_table(spec.width, spec.grid))
            step = step_from_weights(spec, Numerics(), FP32, weights, positions)
            found: torch.Tensor = step(state, noise, coefficients, guidance, rows, table)[0]
        return found

    expected: dict[str, torch.Tensor] = {}
    for ablation in benchmark.iterate_ablations():
        found = next_state(ablation)
        reference = expected.setdefault(ablation.conditioning, found)
        error = float((found - reference).abs().max() / reference.abs().max())
        if ablation.exact:
            assert error <= 5e-6, ablation.name  # measured: 2.3e-6, LayerNorm written out
        else:
            assert error >= 1e-3, ablation.name  # measured: 2.2e-2, the queries' bias alone


def test_the_committed_figures(benchmark: ModuleType) -> None:
    """DiT-XL/2's 28 blocks take at most 230 kernels in both profiles, waits and signals counted, all fused."""
    figures = json.loads((FOLDER / "kernels.json").read_text(encoding="utf-8"))
    assert figures["label"] == benchmark.LABEL
    for profile in figures["whole"][0]["blocks_28"]["profiles"]:
        assert profile["kernels"] + profile["waits_signals"] <= 230
        assert profile["fused_attention"] == 28
    table = benchmark.format_table(figures)
    assert all(ablation.name in table for ablation in benchmark.iterate_ablations())
