"""The PyTorch reference of the paper's four conditionings, against the oracle and what follows from the formulas.

All differences are max|Δ| relative to max|oracle|.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dit_export.reference.official_model import DiT
from support.oracle import CONDITIONINGS, Weights, dit, random_weights
from torch import Tensor

from dit_runtime.bundle.manifest import ModelSpec

HEADS = 4
CLASSES = 10
# Both compute the sinusoids in float32 and in the same order, so they add nothing to float64's limit.
LIMIT = {
    torch.float64: 1e-14,  # measured: 1.5e-15
    torch.float32: 2e-6,  # measured: 6.2e-7
}
LEAST_EFFECT = 1e-3  # of a weight times 1.5; measured: 4.6e-3, cross-attention's last bias of the queries

each_conditioning = pytest.mark.parametrize("conditioning", CONDITIONINGS)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_spec(
    conditioning: str, *, size: tuple[int, int] = (8, 8), patch: int = 2, channels: int = 4, learned: bool = True
) -> ModelSpec:
    """Three blocks of width 48; the MLP is not 4 times as wide, so that its width is read and not assumed."""
    return ModelSpec(
        conditioning=conditioning,
        latent_channels=channels,
        latent_size=size,
        patch_size=patch,
        width=48,
        depth=3,
        heads=HEADS,
        mlp_width=80,
        classes=CLASSES,
        learned_variance=learned,
    )


def make_weights(spec: ModelSpec, channels: int | None = None, dtype: torch.dtype = torch.float64) -> Weights:
    """The oracle's random weights for ``spec``, with ``channels`` outputs if told, float64 unless told."""
    weights = random_weights(
        0,
        width=spec.width,
        depth=spec.depth,
        patch=spec.patch_size,
        channels=spec.latent_channels,
        grid=spec.grid,
        classes=spec.classes,
        out_channels=spec.output_channels if channels is None else channels,
        conditioning=spec.conditioning,
        mlp_width=spec.mlp_width,
    )
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def make_inputs(spec: ModelSpec, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Four latents at the first, the last, a middle and a fractional timestep; the last label is the null class."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, spec.latent_channels, *spec.latent_size, generator=generator, dtype=dtype)
    return x, torch.tensor([0, 999, 481, 0.37]), torch.tensor([3, 0, 7, spec.null_class])


def reference(spec: ModelSpec, weights: Weights, channels: int | None = None) -> DiT:
    model = DiT(spec, channels).to(weights["pos_embed"].dtype)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def difference(computed: Tensor, expected: Tensor) -> float:
    assert computed.shape == expected.shape
    assert computed.dtype == expected.dtype
    return float((computed - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
@pytest.mark.parametrize(("size", "patch"), [((8, 8), 2), ((12, 8), 2), ((4, 12), 2), ((8, 8), 4), ((8, 16), 4)])
@each_conditioning
def test_reference_is_the_oracle(
    conditioning: str, size: tuple[int, int], patch: int, learned: bool, dtype: torch.dtype
) -> None:
    """The reference computes the paper's network with each conditioning, size, patch and output, in both precisions."""
    spec = make_spec(conditioning, size=size, patch=patch, learned=learned)
    weights = make_weights(spec, dtype=dtype)
    x, t, y = make_inputs(spec, dtype)
    expected = dit(weights, x, t, y, heads=HEADS, conditioning=conditioning)
    assert expected.shape == (4, 8 if learned else 4, *size)
    assert difference(reference(spec, weights)(x, t, y), expected) <= LIMIT[dtype]


@pytest.mark.parametrize(("latent_channels", "channels"), [(1, 1), (3, 6), (4, 8)])
@each_conditioning
def test_output_channels_may_be_told(conditioning: str, latent_channels: int, channels: int) -> None:
    """``channels`` overrides the spec's outputs, and latents need not have four channels."""
    spec = make_spec(conditioning, channels=latent_channels, learned=False)
    weights = make_weights(spec, channels=channels)
    inputs = make_inputs(spec)
    expected = dit(weights, *inputs, heads=HEADS, conditioning=conditioning)
    assert expected.shape[1] == channels
    computed = reference(spec, weights, channels)(*inputs)
    assert difference(computed, expected) <= LIMIT[torch.float64]


def packed_parts(name: str, weights: Weights) -> int:
    """How many projections the tensor called ``name`` holds one below the other."""
    if ".qkv." in name:
        return 3
    if ".kv." in name:
        return 2
    if ".adaLN_modulation." in name:
        return len(weights[name]) // weights["pos_embed"].shape[-1]
    return 1


@each_conditioning
def test_every_weight_acts(conditioning: str) -> None:
    """No weight is ignored by the oracle, hence none by a reference that equals it; only keys' biases cancel."""
    spec = make_spec(conditioning)
    weights = make_weights(spec)
    assert set(weights) == set(DiT(spec).state_dict())
    inputs = make_inputs(spec)
    expected = dit(weights, *inputs, heads=HEADS, conditioning=conditioning)
    for name, tensor in weights.items():
        parts = packed_parts(name, weights)
        for part in range(parts):
            changed = tensor.clone()
            changed.chunk(parts)[part].mul_(1.5)
            effect = difference(
                dit({**weights, name: changed}, *inputs, heads=HEADS, conditioning=conditioning), expected
            )
            if name.endswith((".qkv.bias", ".kv.bias")) and part == parts - 2:
                # A key's bias adds the same to all scores of a query, which softmax ignores. Measured: 7.7e-16.
                assert effect <= LIMIT[torch.float64], f"{name}, the keys' rows, changed the output by {effect:.1e}"
            else:
                assert effect >= LEAST_EFFECT, f"{name}, part {part + 1} of {parts}, has an effect of {effect:.1e}"


@each_conditioning
def test_every_weight_acts_in_the_reference_itself(conditioning: str) -> None:
    """The reference follows the oracle when each of its tensors is changed alone, so no agreement is by chance."""
    spec = make_spec(conditioning, size=(4, 8))
    weights = make_weights(spec)
    inputs = make_inputs(spec)
    model = reference(spec, weights)
    for name, parameter in model.state_dict().items():
        parameter.mul_(1.5)  # state_dict's tensors are the parameters themselves
        expected = dit({**weights, name: weights[name] * 1.5}, *inputs, heads=HEADS, conditioning=conditioning)
        assert difference(model(*inputs), expected) <= LIMIT[torch.float64], name  # measured: 1.6e-15
        parameter.copy_(weights[name])


def test_zeroed_modulation_is_the_identity() -> None:
    """An adaLN-Zero block with a zero modulation gives its tokens back exactly: how the paper initializes it."""
    spec = make_spec("adaln-zero")
    zeroed = {
        name: torch.zeros_like(tensor) if name.startswith("blocks.") and "adaLN" in name else tensor
        for name, tensor in make_weights(spec).items()
    }
    model = reference(spec, zeroed)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, spec.tokens, spec.width, generator=generator, dtype=torch.float64)
    condition = torch.randn(2, spec.width, generator=generator, dtype=torch.float64)
    for block in model.blocks:
        assert torch.equal(block(tokens, condition), tokens)

    inputs = make_inputs(spec)
    shallow = {name: tensor for name, tensor in zeroed.items() if not name.startswith(("blocks.1.", "blocks.2."))}
    outputs = [dit(weights, *inputs, heads=HEADS, conditioning="adaln-zero") for weights in (shallow, zeroed)]
    assert torch.equal(*outputs)


def test_adaln_is_adaln_zero_with_gates_of_one() -> None:
    """adaLN and adaLN-Zero differ in the two gates alone, so constant gates of 1 make them the same function."""
    spec = make_spec("adaln-zero")
    gated = make_weights(spec)
    plain = dict(gated)
    for name, tensor in gated.items():
        if name.startswith("blocks.") and "adaLN" in name:
            shift_1, scale_1, _, shift_2, scale_2, _ = tensor.chunk(6)
            ones = torch.full_like(shift_1, float(name.endswith(".bias")))
            gated[name] = torch.cat([shift_1, scale_1, ones, shift_2, scale_2, ones])
            plain[name] = torch.cat([shift_1, scale_1, shift_2, scale_2])
    inputs = make_inputs(spec)
    computed = reference(make_spec("adaln"), plain)(*inputs)
    assert difference(computed, reference(spec, gated)(*inputs)) <= LIMIT[torch.float64]  # measured: 0


@each_conditioning
def test_label_and_timestep_condition_every_token(conditioning: str) -> None:
    """Another label, or another timestep, changes every patch of the output: both reach all tokens."""
    spec = make_spec(conditioning)
    model = reference(spec, make_weights(spec))
    x, t, y = make_inputs(spec)
    expected = model(x, t, y)
    for other in (model(x, t, (y + 1) % CLASSES), model(x, t + 100, y)):
        change = (other - expected).abs().unflatten(2, (4, 2)).unflatten(4, (4, 2)).amax(dim=(1, 3, 5))  # [N, 4, 4]
        assert change.min() >= 0.01  # measured: 0.054, of outputs up to 4.3, by in-context's timestep


@each_conditioning
def test_images_do_not_mix(conditioning: str) -> None:
    """An image's output does not depend on the others in its batch."""
    spec = make_spec(conditioning)
    model = reference(spec, make_weights(spec))
    x, t, y = make_inputs(spec)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    assert difference(alone, model(x, t, y)) <= LIMIT[torch.float64]  # measured: 1.4e-15
