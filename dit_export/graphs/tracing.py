"""Makes ONNX graphs from modules: traces them, names their nodes, and writes files that tell nothing of the machine."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from dit_export.checkpoints.positions import Positions
from dit_export.graphs.autoencoder import Decoder, Encoder
from dit_export.graphs.model import Conditioner, PolicyConditioner, Step, table_axes
from dit_runtime.bundle.manifest import (
    ENCODER,
    SIZED_GRAPHS,
    GraphSpec,
    ModelSpec,
    TensorSpec,
    name_for_size,
)
from dit_runtime.samplers.schedule import CLIPPED, COEFFICIENTS

OPSET = 20  # the newest that TensorRT 10.3 (JetPack 6) reads; has a single Gelu node
INLINE_BYTES = 1024  # smaller constants stay in the .onnx file


@dataclass(frozen=True)
class Axes:
    """A graph's inputs and outputs: dtype and axes by name. An axis is a size, or the name of a dynamic dimension."""

    inputs: Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]


def conditioner_axes(spec: ModelSpec, table_dtype: torch.dtype) -> Axes:
    """The conditioner's tensors."""
    name, shape = table_axes(spec)
    times = ("rows",) if spec.times == 1 else ("rows", spec.times)
    condition: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {"labels": (torch.int32, ("rows",))}
    if spec.observation:
        condition = {"observations": (torch.float32, ("rows", spec.observation))}
    return Axes(
        inputs={"timesteps": (torch.float32, times), **condition},
        outputs={name: (_dtype_name(table_dtype), ("rows", *shape))},
    )


def step_axes(spec: ModelSpec, table_dtype: torch.dtype) -> Axes:
    """The step's tensors."""
    image = (spec.latent_channels, *spec.latent_size)
    name, shape = table_axes(spec)
    return Axes(
        inputs={
            "state": (torch.float32, ("batch", 3, *image)),
            "noise": (torch.float32, ("batch", *image)),
            "coefficients": (torch.float32, ("batch", CLIPPED if spec.clips else COEFFICIENTS)),
            "guidance": (torch.float32, ("branches", "batch", spec.latent_channels)),
            "rows": (torch.int32, ("branches", "batch")),
            name: (table_dtype, ("rows", *shape)),
        },
        outputs={
            "next_state": ("float32", ("batch", 3, *image)),
            "denoised": ("float32", ("batch", *image)),
        },
    )


def decoder_axes(channels: int, factor: int) -> Axes:
    """The decoder's tensors; ``factor`` is image pixels per latent pixel."""
    image = (f"{factor}*height", f"{factor}*width")
    return Axes(
        inputs={"latents": (torch.float32, ("batch", channels, "height", "width"))},
        outputs={
            "images": ("uint8", ("batch", *image, 3)),
            "decoded": ("float32", ("batch", 3, *image)),
        },
    )


def encoder_axes(channels: int, factor: int, has_deviation: bool) -> Axes:
    """The encoder's tensors."""
    latents = ("batch", channels, f"image_height//{factor}", f"image_width//{factor}")
    return Axes(
        inputs={"images": (torch.uint8, ("batch", "image_height", "image_width", 3))},
        outputs=dict.fromkeys(("mean", "std") if has_deviation else ("mean",), ("float32", latents)),
    )


def write_conditioner(folder: Path, conditioner: Conditioner | PolicyConditioner) -> GraphSpec:
    """Trace and write the conditioner."""
    axes = conditioner_axes(conditioner.spec, conditioner.table_dtype)
    return save_model(trace(conditioner, axes), folder, "conditioner", axes)


def write_steps(
    folder: Path,
    step: Step,
    table_dtype: torch.dtype,
    positions: Mapping[tuple[int, int], Positions],
    edit: Callable[[ir.Model], None] | None = None,
) -> Iterator[tuple[str, GraphSpec]]:
    """Trace and write step and probe for each latent size; yield the name and description of each graph when written.

    ``positions``: the positional tables of each size, the step's own first. ``probe`` is the step's graph with the
    blocks' outputs added. All graphs share one weights file. Tensors that differ at another size, above all its
    positional table, are in that size's ``.onnx`` file. ``edit`` changes each traced model in place.
    """
    shared: Shared = {}
    for size, at_size in positions.items():
        at = step if size == step.spec.latent_size else step.at(replace(step.spec, latent_size=size), at_size)
        spec, axes = at.spec, step_axes(at.spec, table_dtype)
        model = trace(at, axes)
        if edit is not None:
            edit(model)
        outputs = list(model.graph.outputs)
        blocks = [f"blocks.{index}" for index in range(spec.depth)]
        for value, name in zip(outputs[2:], blocks, strict=True):
            value.name = name
        tokens = ("branches*batch", spec.tokens + 2 * (spec.conditioning == "in-context"), spec.width)
        probe = replace(axes, outputs={**axes.outputs, **dict.fromkeys(blocks, ("float32", tokens))})
        del model.graph.outputs[2:]
        names = SIZED_GRAPHS if at is step else tuple(name_for_size(name, size) for name in SIZED_GRAPHS)
        yield names[0], save_model(model, folder, names[0], axes, "step", shared)
        model.graph.outputs.extend(outputs[2:])
        yield names[1], save_model(model, folder, names[1], probe, "step", shared)


def write_decoder(folder: Path, decoder: Decoder) -> GraphSpec:
    """Trace and write the decoder, for any size."""
    axes = decoder_axes(decoder.channels, decoder.factor)
    return save_model(trace(decoder, axes), folder, "decoder", axes)


def write_encoder(folder: Path, encoder: Encoder) -> GraphSpec:
    """Trace and write the encoder, for any image size that is a multiple of its factor."""
    axes = encoder_axes(encoder.channels, encoder.factor, encoder.has_deviation)
    return save_model(trace(encoder, axes, smallest=encoder.factor), folder, ENCODER, axes)


def trace(module: nn.Module, axes: Axes, smallest: int = 1) -> ir.Model:
    """The module as an ONNX model at opset 20, with readable names instead of the exporter's metadata.

    ``smallest``: the least height and width that the graph takes.
    """
    examples, dynamic = [], []
    # A dimension that is 1 while tracing becomes a constant, and two equal dimensions may become one. So sizes are 2,
    # the gather chooses from 4 rows, and images are not square.
    sizes = {"batch": 2, "branches": 2, "rows": 4}
    sides = {"height": 6, "width": 4, "image_height": 6 * smallest, "image_width": 4 * smallest}
    symbols = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in sizes}
    symbols |= {name: torch.export.Dim(name, min=smallest, max=1 << 16) for name in sides}
    for dtype, shape in axes.inputs.values():
        concrete = [(sizes | sides)[axis] if isinstance(axis, str) else axis for axis in shape]
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


# The tensors that a weights file already holds, by dtype, shape and hash.
Shared = dict[tuple[str, tuple[int, ...], str], ir.TensorProtocol]


def save_model(
    model: ir.Model, folder: Path, name: str, axes: Axes, weights: str | None = None, shared: Shared | None = None
) -> GraphSpec:
    """Write ``graphs/NAME.onnx`` and its weights file.

    Several graphs may share a weights file: ``weights`` is its name, ``shared`` the tensors in it. The first graph
    writes the file; the others refer to it, and keep tensors that it does not hold in their ``.onnx`` file.
    """
    model.graph.name = name
    for value, (_, shape) in zip(model.graph.outputs, axes.outputs.values(), strict=True):
        value.shape = ir.Shape(shape)
    target = folder / "graphs" / f"{name}.onnx"
    target.parent.mkdir(exist_ok=True)
    file = f"{weights or name}.weights"
    known = {} if shared is None else shared
    if not known:
        tensors = {key: value.const_value for key, value in _find_weights(model)}
        # This turns initializers into references to the file; the graphs that share it take over the references.
        ir.external_data.unload_from_model(model, target.parent, file, size_threshold_bytes=INLINE_BYTES)
        if shared is not None:
            shared.update({_fingerprint(tensors[key]): value.const_value for key, value in _find_weights(model)})
    for _, value in _find_weights(model):
        if not isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = known.get(_fingerprint(value.const_value), value.const_value)
    ir.save(model, target)
    return GraphSpec(
        file=f"graphs/{name}.onnx",
        weights=f"graphs/{file}",
        inputs=tuple(TensorSpec(key, _dtype_name(dtype), shape) for key, (dtype, shape) in axes.inputs.items()),
        outputs=tuple(TensorSpec(key, dtype, shape) for key, (dtype, shape) in axes.outputs.items()),
    )


def _find_weights(model: ir.Model) -> list[tuple[str, Any]]:
    """The initializers that belong in a weights file, by name."""
    found = model.graph.initializers.items()
    return [(key, v) for key, v in found if v.const_value is not None and v.const_value.nbytes >= INLINE_BYTES]


def _fingerprint(tensor: ir.TensorProtocol) -> tuple[str, tuple[int, ...], str]:
    array = np.ascontiguousarray(tensor.numpy())
    return str(array.dtype), array.shape, hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def name_nodes(model: ir.Model) -> None:
    """Name each node after the module it comes from, ``blocks.17.attn.qkv/MatMul``, so that audits can name blocks."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        scopes: Sequence[str] = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        modules = [scope for scope in scopes[:-1] if scope]  # the last scope is the operation itself
        base = f"{modules[-1]}/{node.op_type}" if modules else node.op_type
        counts[base] = count = counts.get(base, -1) + 1
        node.name = f"{base}.{count}" if count else base


def strip_metadata(model: ir.Model) -> None:
    """Remove stack traces, paths and exporter notes: they differ between machines and reveal their folders."""
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
