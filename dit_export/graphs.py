"""ONNX graphs from modules: tracing, readable names, and files without a trace of the machine that made them."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from dit_export.autoencoder import Decoder
from dit_export.model import MODULATIONS, Conditioner, Step
from dit_runtime.bundle import GraphSpec, ModelSpec, TensorSpec

OPSET = 20  # the newest that TensorRT 10.3 (JetPack 6) reads; has a single Gelu node
INLINE_BYTES = 1024  # smaller constants stay in the .onnx file


@dataclass(frozen=True)
class Axes:
    """A graph's tensors as data: name → (dtype, axes); axes given by name are dynamic."""

    inputs: Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]


def conditioner_axes(spec: ModelSpec) -> Axes:
    """The conditioner's tensors."""
    table = ("rows", MODULATIONS * spec.depth + 2, spec.width)
    return Axes(
        inputs={"timesteps": (torch.float32, ("rows",)), "labels": (torch.int32, ("rows",))},
        outputs={"modulation": ("float32", table)},
    )


def step_axes(spec: ModelSpec) -> Axes:
    """The step's tensors."""
    picture = (spec.latent_channels, *spec.latent_size)
    _, table = conditioner_axes(spec).outputs["modulation"]
    return Axes(
        inputs={
            "state": (torch.float32, ("batch", 3, *picture)),
            "noise": (torch.float32, ("batch", *picture)),
            "coefficients": (torch.float32, ("batch", 17)),
            "guidance": (torch.float32, ("branches", "batch", spec.latent_channels)),
            "rows": (torch.int32, ("branches", "batch")),
            "modulation": (torch.float32, table),
        },
        outputs={
            "next_state": ("float32", ("batch", 3, *picture)),
            "denoised": ("float32", ("batch", *picture)),
        },
    )


def decoder_axes(spec: ModelSpec, image_size: tuple[int, int]) -> Axes:
    """The decoder's tensors; ``image_size`` is height and width in pixels."""
    return Axes(
        inputs={"latents": (torch.float32, ("batch", spec.latent_channels, *spec.latent_size))},
        outputs={
            "images": ("uint8", ("batch", *image_size, 3)),
            "decoded": ("float32", ("batch", 3, *image_size)),
        },
    )


def write_graphs(
    folder: Path, conditioner: Conditioner, step: Step, decoder: Decoder, image_size: tuple[int, int]
) -> Iterator[tuple[str, GraphSpec]]:
    """Trace and write the four graphs into ``folder``; yields each name and description as it is done.

    ``probe`` is the step's graph with the blocks' outputs added, on the step's weights.
    """
    spec = step.spec
    axes = conditioner_axes(spec)
    model = traced(conditioner, axes)
    yield "conditioner", saved(model, folder, "conditioner", axes)
    axes = step_axes(spec)
    model = traced(step, axes)
    outputs = list(model.graph.outputs)
    blocks = [f"blocks.{index}" for index in range(spec.depth)]
    for value, name in zip(outputs[2:], blocks, strict=True):
        value.name = name
    tokens = ("branches*batch", spec.tokens, spec.width)
    probe = replace(axes, outputs={**axes.outputs, **dict.fromkeys(blocks, ("float32", tokens))})
    del model.graph.outputs[2:]
    yield "step", saved(model, folder, "step", axes)
    model.graph.outputs.extend(outputs[2:])
    yield "probe", saved(model, folder, "probe", probe, weights="graphs/step.weights")
    axes = decoder_axes(spec, image_size)
    yield "decoder", saved(traced(decoder, axes), folder, "decoder", axes)


def traced(module: nn.Module, axes: Axes) -> ir.Model:
    """The module as an ONNX model at opset 20, with names instead of the exporter's metadata."""
    examples, dynamic = [], []
    # A dimension traced at 1 becomes a constant; 2 everywhere, and 4 rows for the gather to choose from.
    sizes = {"batch": 2, "branches": 2, "rows": 4}
    symbols = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in sizes}
    for dtype, shape in axes.inputs.values():
        concrete = [sizes[axis] if isinstance(axis, str) else axis for axis in shape]
        examples.append(torch.zeros(concrete, dtype=dtype))
        dynamic.append({index: symbols[axis] for index, axis in enumerate(shape) if isinstance(axis, str)})
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(axes.inputs),
            output_names=list(axes.outputs),
            dynamic_shapes=dynamic,
            optimize=True,
            verify=False,
        )
    assert program is not None
    model = program.model
    name_nodes(model)
    strip_metadata(model)
    return model


def saved(model: ir.Model, folder: Path, name: str, axes: Axes, weights: str | None = None) -> GraphSpec:
    """Write ``graphs/NAME.onnx`` and its weights, or point it at weights already written."""
    model.graph.name = name
    target = folder / "graphs" / f"{name}.onnx"
    target.parent.mkdir(exist_ok=True)
    own = f"{name}.weights" if weights is None else Path(weights).name
    # Saving turns initializers into references to the file; the probe is saved from those of the step.
    ir.save(model, target, external_data=own, size_threshold_bytes=INLINE_BYTES)
    return GraphSpec(
        file=f"graphs/{name}.onnx",
        weights=f"graphs/{own}",
        inputs=tuple(
            TensorSpec(key, str(dtype).removeprefix("torch."), shape) for key, (dtype, shape) in axes.inputs.items()
        ),
        outputs=tuple(TensorSpec(key, dtype, shape) for key, (dtype, shape) in axes.outputs.items()),
    )


def name_nodes(model: ir.Model) -> None:
    """Name nodes after the module they come from, ``blocks.17.attn.qkv/MatMul``, so that audits can name blocks."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        scopes: Sequence[str] = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        modules = [scope for scope in scopes[:-1] if scope]  # the last scope is the operation itself
        base = f"{modules[-1]}/{node.op_type}" if modules else node.op_type
        counts[base] = count = counts.get(base, -1) + 1
        node.name = f"{base}.{count}" if count else base


def strip_metadata(model: ir.Model) -> None:
    """Remove stack traces, paths and exporter notes: they differ between machines and tell of their folders."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress lines, warnings and log records off the user's terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
