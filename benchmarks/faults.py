"""Seed faults that engines and exporters have had, one at a time, and show which rung of the verification fails first.

    python benchmarks/faults.py FP32.bundle FP16.bundle

The script prints the catch table in Markdown. A fault is an edit of a graph, a wrong input or output of a graph, or a
wrong schedule. No file of a bundle is changed. ``tests/benchmarks/test_faults.py`` checks the rung of every fault.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import numpy_helper

from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.noise import TorchNoise
from dit_runtime.samplers.schedule import (
    A_Z,
    INPUT,
    LOG_SIGMA_V,
    MATRIX,
    NOISE,
    Schedule,
)
from dit_runtime.verify import image_rungs
from dit_runtime.verify import replay as replay_module
from dit_runtime.verify import verification as verify
from dit_runtime.verify.rung import Rung

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
NETWORK = ("step", "probe")
BELOW = "below FP16's own error"
NOT_THERE = "no fault in FP16"
IN_FP16_ONLY = "no fault in FP32"


class Graph:
    """A graph to edit. Its nodes and initializers are found by name."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.model = onnx.load(bundle.graph(name))  # with its weights
        self.graph = self.model.graph

    def node(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if node.name == name)

    def array(self, name: str) -> Array:
        return numpy_helper.to_array(next(item for item in self.graph.initializer if item.name == name))

    def put(self, name: str, array: Array) -> None:
        """Replace an initializer, or add one."""
        tensor = numpy_helper.from_array(np.array(array, order="C"), name)
        for item in self.graph.initializer:
            if item.name == name:
                item.CopyFrom(tensor)
                return
        self.graph.initializer.append(tensor)

    def weight(self, node: str, change: Callable[[Array], Array]) -> None:
        """Change the weights of a product, its second input."""
        name = self.node(node).input[1]
        self.put(name, change(self.array(name)).astype(self.array(name).dtype))


class FaultyEngine(OnnxRuntimeEngine):
    """ONNX Runtime with edits of some graphs, and with changes of some graphs' inputs and outputs."""

    def __init__(
        self,
        bundle: Bundle,
        edits: Mapping[str, Callable[[Graph], None]],
        inputs: Mapping[str, Callable[[Arrays], Arrays]],
        outputs: Mapping[str, Callable[[Arrays], Arrays]],
    ) -> None:
        super().__init__(bundle, threads=1)
        self.bundle, self.edits, self.inputs, self.outputs = bundle, edits, inputs, outputs
        self.faulty: dict[str, FaultySession] = {}

    def session(self, graph: str) -> FaultySession:  # type: ignore[override]
        if graph not in self.faulty:
            self.faulty[graph] = FaultySession(self, graph, super().session)
        return self.faulty[graph]


class FaultySession:
    def __init__(self, engine: FaultyEngine, graph: str, sound: Callable[[str], Any]) -> None:
        self.engine, self.graph = engine, graph
        if graph in engine.edits:
            import onnxruntime

            edited = Graph(engine.bundle, graph)
            engine.edits[graph](edited)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            session = onnxruntime.InferenceSession(edited.model.SerializeToString(), options)
            self.evaluate = lambda inputs, names: session.run(list(names), inputs)
        else:
            self.evaluate = sound(graph).run

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        given = self.engine.inputs.get(self.graph, lambda same: same)(dict(inputs))
        found = dict(zip(outputs, self.evaluate(given, outputs), strict=True))
        return list(self.engine.outputs.get(self.graph, lambda same: same)(found).values())


@dataclass(frozen=True)
class Fault:
    """A mistake, and the first rung that fails with it.

    Attributes:
        name: the mistake in words.
        rung: the first rung that fails in FP32, and in FP16 unless ``fp16`` names another.
        where: a part of the rung's detail, which points at the mistake.
        edits: by graph, a function that edits the graph.
        inputs: by graph, a function that changes the inputs.
        outputs: by graph, a function that changes the outputs.
        description: a function that changes the manifest.
        patch: a module of the runtime, a name in it, and its replacement.
        fp16: ``BELOW``, ``NOT_THERE``, or the rung that fails in FP16; empty for ``rung``.
        fp32: ``IN_FP16_ONLY``, or empty for ``rung``.
        graph: the graph that the mistake is in. A bundle without it, such as without an encoder, has no such fault.
    """

    name: str
    rung: str
    where: str = ""
    edits: Mapping[str, Callable[[Graph], None]] | None = None
    inputs: Mapping[str, Callable[[Arrays], Arrays]] | None = None
    outputs: Mapping[str, Callable[[Arrays], Arrays]] | None = None
    description: Callable[[Bundle], Bundle] | None = None
    patch: tuple[Any, str, Any] | None = None
    fp16: str = ""
    fp32: str = ""
    graph: str = "step"

    def expected(self, precision: str) -> str:
        """The name of the rung that should fail in a precision, or the reason why none does."""
        return self.fp32 or self.rung if precision == "fp32" else self.fp16 or self.rung

    def first_failure(self, bundle: Bundle) -> Rung | None:
        """The first rung that fails with this fault."""
        if self.description is not None:
            bundle = self.description(bundle)
        engine = FaultyEngine(bundle, self.edits or {}, self.inputs or {}, self.outputs or {})
        with mock.patch.object(*self.patch) if self.patch else contextlib.nullcontext(), np.errstate(all="ignore"):
            return next((rung for rung in verify.verify(bundle, engine) if not rung.passed), None)


def edit_network(change: Callable[[Graph], None]) -> dict[str, Callable[[Graph], None]]:
    """Edit the step and the probe in the same way."""
    return dict.fromkeys(NETWORK, change)


def set_epsilon(node: str, value: float) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        next(item for item in graph.node(node).attribute if item.name == "epsilon").f = value

    return change


def edit_initializer(name: str, change: Callable[[Array], Array]) -> Callable[[Graph], None]:
    """Change an initializer."""
    return lambda graph: graph.put(name, change(graph.array(name)))


def shift_frequencies(graph: Graph) -> None:
    half = len(graph.array("frequencies"))
    graph.put("frequencies", np.exp(-np.log(10000) * np.arange(half) / half).astype(np.float32))


def swap_features(graph: Graph) -> None:
    node = graph.node("Concat")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def transpose_positions(table: Array) -> Array:
    side = int(np.sqrt(table.shape[1]))
    return table.reshape(1, side, side, -1).transpose(0, 2, 1, 3).reshape(table.shape)


def take_larger_positions(table: Array) -> Array:
    """Take the positions of a grid twice as large, from its first corner."""
    side = int(np.sqrt(table.shape[1]))
    larger = table.reshape(1, side, side, -1).repeat(2, axis=1).repeat(2, axis=2)
    return larger[:, :side, :side].reshape(table.shape)


def swap_shift_and_scale(graph: Graph) -> None:
    """Swap the shift and the scale of the first block's attention."""
    scale, shift = graph.node("blocks.0/Add"), graph.node("blocks.0/Add.1")
    scale.input[0], shift.input[1] = shift.input[1], scale.input[0]


def use_another_gate(graph: Graph) -> None:
    graph.node("blocks.1/Mul.1").input[0] = graph.node("blocks.0/Mul.1").input[0]


def drop_scale(graph: Graph) -> None:
    node = graph.node("blocks.1.attn/Mul")
    graph.put("one", np.ones((), graph.array(node.input[1]).dtype))
    node.input[1] = "one"


def use_exact_gelu(graph: Graph) -> None:
    graph.node("blocks.0.mlp/Gelu").attribute[0].s = b"none"


def permute_head(weight: Array) -> Array:
    """Reverse the order of the first head's values."""
    changed = weight.copy()
    width = weight.shape[0]
    head = slice(2 * width, 2 * width + 32)
    changed[:, head] = weight[:, head][:, ::-1]
    return changed


def swap_queries_and_keys(weight: Array) -> Array:
    width = weight.shape[0]
    return np.concatenate([weight[:, width : 2 * width], weight[:, :width], weight[:, 2 * width :]], axis=1)


def make_overflow(graph: Graph) -> None:
    """Multiply the values by 32768, and divide their projection by it: the same function in FP32."""
    width = graph.array(graph.node("blocks.1.attn.qkv/MatMul").input[1]).shape[0]

    def values(weight: Array) -> Array:
        changed = weight.copy()
        changed[..., 2 * width :] = changed[..., 2 * width :] * weight.dtype.type(32768)
        return changed

    graph.weight("blocks.1.attn.qkv/MatMul", values)
    bias = graph.node("blocks.1.attn.qkv/Add").input[1]
    graph.put(bias, values(graph.array(bias)))
    graph.weight("blocks.1.attn.proj/MatMul", lambda weight: weight / weight.dtype.type(32768))


def transpose_patches(graph: Graph) -> None:
    """Swap rows and columns inside each patch of the output."""
    node = graph.node("Transpose.1")
    order = next(item for item in node.attribute if item.name == "perm")
    n, c, h, p, w, q = order.ints
    del order.ints[:]
    order.ints.extend([n, c, h, q, w, p])


def take_null_variance(graph: Graph) -> None:
    graph.put("last", np.array(-1, np.int64))
    graph.node("Gather.4").input[1] = "last"


def put_nan(outputs: Arrays) -> Arrays:
    for value in outputs.values():
        if len(value) > 1:
            value[1] = np.nan
    return outputs


def roll_images(outputs: Arrays) -> Arrays:
    return {name: np.roll(value, 1, axis=0) for name, value in outputs.items()}


def swap_slots(outputs: Arrays) -> Arrays:
    changed = {name: value.copy() for name, value in outputs.items()}
    if "next_state" in changed:
        changed["next_state"][:, 1:] = changed["next_state"][:, :0:-1]
    return changed


def swap_gates(outputs: Arrays) -> Arrays:
    (name, table), *_ = outputs.items()
    changed = table.copy()
    changed[:, 2], changed[:, 8] = table[:, 8], table[:, 2]
    return {name: changed}


def move_label(inputs: Arrays) -> Arrays:
    return {**inputs, "labels": np.maximum(inputs["labels"] - 1, 0).astype(np.int32)}


def use_class_0_for_null(inputs: Arrays) -> Arrays:
    labels = inputs["labels"]
    return {**inputs, "labels": np.where(labels == 10, 0, labels).astype(np.int32)}


def move_timestep(inputs: Arrays) -> Arrays:
    return {**inputs, "timesteps": (inputs["timesteps"] + 1).astype(np.float32)}


def use_first_rows(inputs: Arrays) -> Arrays:
    """Give every image the first image's rows of the conditioning table."""
    return {**inputs, "rows": np.repeat(inputs["rows"][:, :1], inputs["rows"].shape[1], axis=1)}


def drop_vae_scale(graph: Graph) -> None:
    name = next(item for item in graph.node("Mul").input if item != "latents")
    graph.put(name, np.ones_like(graph.array(name)))


def truncate(graph: Graph) -> None:
    graph.node("Round").op_type = "Floor"


def reverse_channels(outputs: Arrays) -> Arrays:
    return {name: value[..., ::-1] if name == "images" else value for name, value in outputs.items()}


def make_constant(outputs: Arrays) -> Arrays:
    return {name: np.zeros_like(value) if name == "images" else value for name, value in outputs.items()}


def unscale_mean(outputs: Arrays) -> Arrays:
    return {**outputs, "mean": outputs["mean"] / 0.9}


def reverse_images(inputs: Arrays) -> Arrays:
    return {"images": inputs["images"][..., ::-1]}


def take_logarithm(outputs: Arrays) -> Arrays:
    return {**outputs, "std": np.log(outputs["std"])}


def set_null(label: int) -> Callable[..., Any]:
    original = replay_module.branch_rows
    return lambda labels, _, branches: original(labels, label, branches)


def swap_branches(labels: Array, null: int, branches: int) -> tuple[Array, Array]:
    conditions, rows = ORIGINAL_ROWS(labels, null, branches)
    return conditions, rows[::-1]


ORIGINAL_ROWS = replay_module.branch_rows


def change_diffusion(**changes: Any) -> Callable[[Bundle], Bundle]:
    """Change facts of the forward process in the manifest."""

    def changed(bundle: Bundle) -> Bundle:
        manifest = bundle.manifest
        return replace(bundle, manifest=replace(manifest, diffusion=replace(manifest.diffusion, **changes)))

    return changed


def change_schedule(sampler: str, change: Callable[[Array], None]) -> tuple[Any, str, Any]:
    """Change the coefficients ``[T, 17]`` of a sampler."""

    def faulty(name: str, *args: Any, **options: Any) -> Schedule:
        schedule = schedule_for(name, *args, **options)
        if name == sampler:
            coefficients = schedule.coefficients.copy()
            change(coefficients)
            schedule = replace(schedule, coefficients=coefficients)
        return schedule

    return verify, "schedule_for", faulty


def shrink_denoised(rows: Array) -> None:
    rows[:, A_Z] *= 0.999


def enlarge_noise(rows: Array) -> None:
    rows[:, NOISE] *= 1.01


def fix_variance(rows: Array) -> None:
    rows[:, LOG_SIGMA_V] = 0


def spoil_step(rows: Array) -> None:
    rows[6, MATRIX] *= 1.001
    rows[6, INPUT] *= 1.001


def draw_from_next_seed(seed: int) -> TorchNoise:
    return TorchNoise(seed + 1)


def draw_from_one_stream() -> Callable[[int], TorchNoise]:
    """Draw the noise of the whole batch from one generator, instead of one for each image."""
    shared: list[TorchNoise] = []

    def stream(seed: int) -> TorchNoise:
        if seed == 0:
            shared[:] = [TorchNoise(0)]
        return shared[0]

    return stream


FAULTS = (
    # The inputs of the blocks.
    Fault("sinusoids with exponent i/128 for i/127", "conditioner", edits={"conditioner": shift_frequencies}),
    Fault("sine and cosine exchanged", "conditioner", edits={"conditioner": swap_features}),
    Fault("conditioner: timestep one too large", "conditioner", inputs={"conditioner": move_timestep}),
    Fault("conditioner: label one too small", "conditioner", inputs={"conditioner": move_label}),
    Fault("conditioner: null class is class 0", "conditioner", inputs={"conditioner": use_class_0_for_null}),
    Fault(
        "gates of two blocks exchanged in the table",
        "conditioner",
        "block 0 attention gate",
        outputs={"conditioner": swap_gates},
    ),
    Fault(
        "patches transposed",
        "embedding",
        edits=edit_network(edit_initializer("patch_embed.weight", lambda weight: weight.transpose(0, 1, 3, 2))),
    ),
    Fault("positions transposed", "embedding", edits=edit_network(edit_initializer("position", transpose_positions))),
    Fault(
        "positions of another size",
        "embedding",
        edits=edit_network(edit_initializer("position", take_larger_positions)),
    ),
    # The blocks.
    Fault(
        "attention norm's ε 1e-5 for 1e-6",
        "blocks",
        "first: block 1",
        edits=edit_network(set_epsilon("blocks.1.norm1/LayerNormalization", 1e-5)),
        fp16=BELOW,
    ),
    Fault(
        "MLP norm's ε 1e-6 for 1e-5",
        "blocks",
        "first: block 0",
        edits=edit_network(set_epsilon("blocks.0.norm2/LayerNormalization", 1e-6)),
        fp16=BELOW,
    ),
    Fault(
        "weights scaled until FP16 overflows",
        "blocks",
        "not finite: block 1",
        edits=edit_network(make_overflow),
        fp32=IN_FP16_ONLY,
    ),
    Fault(
        "a product's weights rounded to FP16",
        "blocks",
        "first: block 1",
        edits=edit_network(
            lambda graph: graph.weight(
                "blocks.1.mlp.fc1/MatMul", lambda weight: weight.astype(np.float16).astype(weight.dtype)
            )
        ),
        fp16=NOT_THERE,
    ),
    Fault("adaLN: shift for scale", "blocks", "first: block 0", edits=edit_network(swap_shift_and_scale)),
    Fault("gate of another block", "blocks", "first: block 1", edits=edit_network(use_another_gate)),
    Fault("softmax without its scale", "blocks", "first: block 1", edits=edit_network(drop_scale)),
    Fault(
        "a head's values permuted",
        "blocks",
        "first: block 1",
        edits=edit_network(lambda graph: graph.weight("blocks.1.attn.qkv/MatMul", permute_head)),
    ),
    Fault(
        "queries for keys",
        "blocks",
        "first: block 0",
        edits=edit_network(lambda graph: graph.weight("blocks.0.attn.qkv/MatMul", swap_queries_and_keys)),
    ),
    Fault("exact GELU for tanh's", "blocks", "first: block 0", edits=edit_network(use_exact_gelu), fp16=BELOW),
    Fault(
        "a bias dropped",
        "blocks",
        "first: block 1",
        edits=edit_network(edit_initializer("blocks.1.attn.proj.bias", np.zeros_like)),
    ),
    # The network.
    Fault(
        "last norm's ε 1e-5 for 1e-6",
        "forward G=1",
        edits=edit_network(set_epsilon("final_norm/LayerNormalization", 1e-5)),
        fp16=BELOW,
    ),
    Fault("unpatchified transposed", "forward G=1", edits=edit_network(transpose_patches)),
    Fault("one image of a batch is not a number", "forward G=1", "not finite", outputs={"step": put_nan}),
    Fault("images of a batch in another order", "forward G=1", outputs={"step": roll_images}),
    Fault("one condition for the whole batch", "forward G=1", inputs={"step": use_first_rows}),
    Fault("guidance halves exchanged", "forward G=2", patch=(replay_module, "branch_rows", swap_branches)),
    Fault("wrong null class", "forward G=2", patch=(replay_module, "branch_rows", set_null(0))),
    Fault(
        "guidance on 3 of 4 channels",
        "forward G=2",
        "channel 3 of 4",
        description=change_diffusion(guidance_channels=3),
    ),
    Fault("variance of the null branch", "forward G=2 variance", edits=edit_network(take_null_variance)),
    # The sampler.
    Fault("the sampler's memory exchanged", "sampler update", "slot", outputs={"step": swap_slots}),
    Fault("noise of another seed", "ddim noise", patch=(image_rungs, "TorchNoise", draw_from_next_seed)),
    Fault("one stream of noise for the batch", "ddim noise", patch=(image_rungs, "TorchNoise", draw_from_one_stream())),
    Fault(
        "timesteps off by one", "ddim teacher-forced", "first: step 1;", description=change_diffusion(steps_offset=1)
    ),
    Fault(
        "timesteps spaced otherwise", "ddim teacher-forced", description=change_diffusion(timestep_spacing="trailing")
    ),
    Fault(
        "last ᾱ is not one",
        "ddim teacher-forced",
        "first: step 50;",
        description=change_diffusion(set_alpha_to_one=False),
    ),
    Fault(
        "denoised's coefficient",
        "ddim teacher-forced",
        "denoised",
        patch=change_schedule("ddim", shrink_denoised),
    ),
    Fault(
        "one step's coefficients",
        "ddim teacher-forced",
        "first: step 7;",
        patch=change_schedule("ddim", spoil_step),
    ),
    Fault("noise too large", "ddpm teacher-forced", "next latents", patch=change_schedule("ddpm", enlarge_noise)),
    Fault(
        "learned variance ignored", "ddpm teacher-forced", "next latents", patch=change_schedule("ddpm", fix_variance)
    ),
    # The autoencoder and the images.
    Fault("the VAE's scale left out", "decoder", edits={"decoder": drop_vae_scale}),
    Fault(
        "a bias of the VAE dropped",
        "decoder",
        edits={"decoder": edit_initializer("decoder.conv_in.bias", np.zeros_like)},
        fp16=BELOW,
    ),
    Fault("levels truncated", "uint8 images", "-0.4", edits={"decoder": truncate}),
    Fault("red and blue exchanged", "uint8 images", outputs={"decoder": reverse_channels}),
    Fault("constant images", "uint8 images", outputs={"decoder": make_constant}),
    Fault("the encoder's mean not scaled", "encoder", "first: mean", outputs={ENCODER: unscale_mean}, graph=ENCODER),
    Fault("the encoder's channels reversed", "encoder", inputs={ENCODER: reverse_images}, graph=ENCODER),
    Fault(
        "the encoder's deviation is a logarithm",
        "encoder",
        "first: std",
        outputs={ENCODER: take_logarithm},
        graph=ENCODER,
    ),
)


def iterate_catch_table(bundles: Sequence[Bundle]) -> Iterator[str]:
    """Yield the lines of a Markdown table: for each fault, the first rung that fails in each bundle."""
    titles = [bundle.manifest.precision.name.upper() for bundle in bundles]
    yield f"| fault | {' | '.join(f'first to fail in {title}' for title in titles)} |"
    yield f"|---|{'---|' * len(bundles)}"
    for fault in FAULTS:
        cells = []
        for bundle in bundles:
            if fault.graph not in bundle.manifest.graphs:
                cells.append(f"no {fault.graph} in this bundle")
                continue
            precision = bundle.manifest.precision.name
            rung = fault.first_failure(bundle)
            wanted = fault.expected(precision)
            cells.append(wanted if rung is None else f"{rung.name}: {rung.detail.replace('|', '·')}")
            if (wanted in (BELOW, NOT_THERE, IN_FP16_ONLY)) != (rung is None) or (rung and rung.name != wanted):
                cells[-1] += f" — expected: {wanted}"
        yield f"| {fault.name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    args = parser.parse_args()
    for line in iterate_catch_table([open_bundle(path) for path in args.bundles]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
