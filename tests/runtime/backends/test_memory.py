"""The memory that sampling needs: sums that can be checked by hand, and the message when a batch does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_engines.build_host import BuildHost
from dit_engines.preflight import check_memory, count_usual_rows, estimate_graphs, need_at
from dit_engines.recipe import recipe_for
from dit_runtime.backends.tensorrt.memory import (
    CONTEXT_BYTES,
    SYSTEM_BYTES,
    Need,
    check_fits,
    describe_bytes,
    estimate_available_bytes,
    need_of,
)
from dit_runtime.backends.tensorrt.store import StoredGraph
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import EngineError


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp16"])


def graph(name: str, weights: int, *profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], int]) -> StoredGraph:
    return StoredGraph(
        name, "", 0, "", tuple(shapes for shapes, _ in profiles), weights, tuple(size for _, size in profiles)
    )


def step_profile(branches: int, batch: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    shapes = {
        "state": ((1, 3, 4, 8, 8), (batch, 3, 4, 8, 8)),
        "noise": ((1, 4, 8, 8), (batch, 4, 8, 8)),
        "coefficients": ((1, 17), (batch, 17)),
        "guidance": ((branches, 1, 4), (branches, batch, 4)),
        "rows": ((branches, 1), (branches, batch)),
    }
    return {name: (least, least, largest) for name, (least, largest) in shapes.items()}


def graphs(conditioner_weights: int = 1) -> dict[str, StoredGraph]:
    return {
        "conditioner": graph("conditioner", conditioner_weights, ({}, 2)),
        "step": graph("step", 1000, (step_profile(1, 4), 300), (step_profile(2, 4), 500)),
        "decoder": graph("decoder", 100, ({"latents": ((1, 4, 8, 8), (1, 4, 8, 8), (4, 4, 8, 8))}, 400)),
    }


def test_the_loop_by_hand(bundle: Bundle) -> None:
    """Weights of step and decoder, the larger of their activations, the table, and the tensors between them."""
    need = need_of(bundle.manifest, graphs(), 2, 2, 10)
    image = 4 * 8 * 8
    tensors = 4 * 2 * (3 + 1 + 3 + 1) * image + 4 * (2 * 17 + 2 * 2 * 4 + 2 * 2)  # state, noise, both results, FP32
    decoded = 4 * 2 * image + 2 * 32 * 32 * 3 * (1 + 4)  # latents, and the image as uint8 and as FP32
    assert need == Need(1100, 500, 4 * 10 * 14 * 64, tensors + decoded)
    assert need_of(bundle.manifest, graphs(), 2, 1, 10).activations == 400  # the decoder's
    with pytest.raises(EngineError, match="no optimization profile of the step takes batch 5 with 2 branches"):
        need_of(bundle.manifest, graphs(), 5, 2, 10)


def test_the_conditioner_goes_first(bundle: Bundle) -> None:
    """The conditioner is freed before the loop: the need is the larger of both, not their sum."""
    need = need_of(bundle.manifest, graphs(conditioner_weights=10**9), 2, 2, 10)
    assert (need.weights, need.activations) == (10**9, 2)
    assert need.buffers == 10 * (4 + 4)  # timestep and label of each row


def test_what_can_be_had() -> None:
    """A Jetson keeps the system's share, a card the context's; the driver's own figure comes first."""
    assert estimate_available_bytes(8 * 10**9, shared=True) == 8 * 10**9 - SYSTEM_BYTES
    assert estimate_available_bytes(24 * 10**9, shared=False) == 24 * 10**9 - CONTEXT_BYTES
    assert estimate_available_bytes(8 * 10**9, shared=True, free_bytes=5 * 10**9) == 5 * 10**9
    assert estimate_available_bytes(10**9, shared=True) == 0


def test_too_little_memory_names_the_batch_that_fits() -> None:
    """The error has the need in parts, what there is, and the largest batch that fits."""

    def need(batch: int) -> Need:
        return Need(1_000_000_000, batch * 1_000_000_000, 39_000_000, 1_000_000)

    assert check_fits(need, 4, 5_040_000_000) == need(4)
    with pytest.raises(EngineError) as raised:
        check_fits(need, 8, 5_500_000_000)
    assert str(raised.value) == (
        "batch 8 needs 9.04 GB (weights 1.00 GB, activations 8.00 GB, conditioning table 39 MB, tensors 1 MB) of the "
        "GPU's memory, and 5.50 GB are available; batch 4 fits (5.04 GB)"
    )
    with pytest.raises(EngineError, match=r"not even batch 1 fits; decode in tiles \(--decode-tile\)"):
        check_fits(need, 2, 1_500_000_000)


def test_before_the_first_build(bundle: Bundle) -> None:
    """Without a builder's figures the need is an estimate and says so; too small a GPU is refused before the build."""
    recipe = recipe_for("rtx", "8.9", 4, (1, 2), 64)
    assert count_usual_rows(recipe, 1) == 64  # of 100
    assert count_usual_rows(recipe_for("rtx", "8.9", 4, (1, 2), 1024), 4) == 250
    estimate = estimate_graphs(bundle, recipe, ("conditioner", "step", "decoder"))
    assert estimate["step"].weights_bytes == bundle.manifest.files["graphs/step.weights"].bytes
    needs = [need_at(bundle, recipe, estimate, batch, True).total for batch in (1, 2, 3, 4)]
    assert needs == sorted(needs)
    host = BuildHost("tensorrt", "10.16.2", "8.9", "Tiny", "580", CONTEXT_BYTES + needs[1], False)
    with pytest.raises(EngineError, match=r"an estimate before the first build\) of .*batch 2 fits \("):
        check_memory(bundle, recipe, host, ("conditioner", "step", "decoder"))
    roomy = BuildHost("tensorrt", "10.16.2", "8.9", "Large", "580", CONTEXT_BYTES + needs[3], False)
    need = check_memory(bundle, recipe, roomy, ("conditioner", "step", "decoder"))
    assert need is not None
    assert need.total == needs[3]
    assert check_memory(bundle, recipe, BuildHost("tensorrt_rtx", "1.7.1", "8.9"), ()) is None


def test_sizes_in_words() -> None:
    """Megabytes below one gigabyte, of powers of ten."""
    assert [describe_bytes(size) for size in (0, 92_400_000, 1_120_000_000)] == ["0 MB", "92 MB", "1.12 GB"]
