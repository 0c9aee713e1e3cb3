"""FP32 weights for the parts of an FP16 bundle that move to FP32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from dit_export.bisect.fp16_operations import scope_of
from dit_export.bisect.graph_edits import Array
from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.graphs.autoencoder import Decoder, Encoder
from dit_export.graphs.from_weights import conditioner_from_weights, step_from_weights
from dit_export.graphs.precision import FP32
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import CheckpointError

GRAPHS = ("conditioner", "probe", "decoder", ENCODER)


def weights_from_checkpoint(
    checkpoint: Checkpoint, bundle: Bundle, graphs: Sequence[str] = GRAPHS
) -> dict[str, dict[str, Array]]:
    """The checkpoint's FP32 weights of some graphs, by graph and module.

    Raises:
        CheckpointError: the bundle was made from other weights.
    """
    if checkpoint.weights_sha256 != bundle.manifest.source.weights_sha256:
        raise CheckpointError(
            f"{checkpoint.name}: its weights are not those of {bundle.path}; name the checkpoint that was exported, "
            f"{bundle.manifest.source.name}"
        )
    parts = checkpoint.model, checkpoint.numerics, FP32, checkpoint.weights
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "conditioner": lambda: conditioner_from_weights(*parts),
        "probe": lambda: step_from_weights(*parts, checkpoint.positions(checkpoint.sizes[0])),
        "decoder": lambda: Decoder(checkpoint.autoencoder, FP32),
        ENCODER: lambda: Encoder(checkpoint.autoencoder, FP32),
    }
    return {
        graph: {name: tensor.float().numpy() for name, tensor in make[graph]().state_dict().items()} for graph in graphs
    }


def exact_weight_lookup(state: Mapping[str, Array], constants: Sequence[float]) -> Callable[[ir.Node, ir.Value], Array]:
    """A function that gives the FP32 value of an FP16 initializer, for the node that uses it.

    The value comes from ``state``, a module's FP32 weights by name, or from ``constants``, scalars that graphs hold
    rounded. A candidate is taken only if it rounds to the value that the graph holds; otherwise that value is returned.
    """

    def find_weight(node: ir.Node, value: ir.Value) -> Array:
        assert value.const_value is not None
        held = value.const_value.numpy()
        candidates: list[Array] = [np.asarray(constant, np.float32) for constant in constants] if held.ndim == 0 else []
        for kind in ("weight", "bias"):
            for name in (f"{scope_of(node)}.{kind}", value.name or ""):
                if name in state:
                    candidates += [state[name], state[name].T]
        for candidate in candidates:
            if candidate.shape == held.shape:
                with np.errstate(over="ignore"):
                    if np.array_equal(candidate.astype(np.float16), held):
                        return np.ascontiguousarray(candidate, np.float32)
        return held.astype(np.float32)

    return find_weight
