"""Whether the values of a manifest fit each other, before any of them is used.

Each value alone may be sound and the whole not: a table of another shape than the model's, a decoder for other latents,
sizes that no file of the bundle could hold. Whatever reads a manifest relies on what is checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from dit_runtime.bundle.manifest import (
    CONDITIONINGS,
    ENCODER,
    GRAPHS,
    NO_AUTOENCODER,
    NOISE_AT_1,
    PATHS,
    SIZED_GRAPHS,
    TURNED,
    GraphSpec,
    Manifest,
    ModelSpec,
    TensorSpec,
    name_for_size,
)
from dit_runtime.bundle.precision import EXPORTED, QUANTIZED
from dit_runtime.bundle.quantization import linears_of
from dit_runtime.core.decode import show

COEFFICIENTS, CLIPPED = 17, 19  # of a row of a sampler's schedule, without and with a clip
SPACINGS = ("default", "leading", "trailing", "linspace", "official", "uniform")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "velocity")
CONDITION_TOKENS = 2  # timestep and label
VECTORS = {"adaln-zero": 6, "adaln": 4}  # of a block in the table

MOST_LATENTS = 1 << 26  # numbers of one image's latents: 256 MiB
MOST_PIXELS = 1 << 30  # of one image
MOST_ROW = 1 << 26  # numbers in a row of the conditioning table
MOST_BETAS = 10_000
MOST_CALIBRATION_LABELS = 10_000
LEAST_BETA = 1e-12  # 1 - beta is below 1 in float64
LONGEST_TEXT = 500  # characters; the longest class name of ImageNet has 130

Axes = tuple[int | str, ...]
Tensors = dict[str, tuple[str, Axes]]  # dtype and shape by name


def check_consistency(manifest: Manifest) -> None:
    """Raises ValueError where values of a manifest do not fit each other."""
    _check_texts(manifest)
    _check_files(manifest)
    _check_model(manifest)
    _check_sizes(manifest)
    _check_latents(manifest)
    _check_diffusion(manifest)
    _check_graphs(manifest)
    _check_weights(manifest)
    for limits in (manifest.tolerances, manifest.thresholds):
        if manifest.precision.name not in limits:
            raise ValueError(f"no limits for {manifest.precision.name!r}")


def _check_texts(manifest: Manifest) -> None:
    """Check the length of what goes into messages and listings."""
    source, names = manifest.source, (manifest.defaults.sampler, manifest.autoencoder.name)
    kept = (*manifest.precision.keep_fp32, *manifest.precision.keep_fp16)
    lists = (manifest.class_names, kept, manifest.files, manifest.graphs, manifest.magnitudes)
    for text in (source.name, source.reference, *names, *(text for texts in lists for text in texts)):
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"text {show(text)} of {len(text)} characters, expected {LONGEST_TEXT} at most")


def _check_files(manifest: Manifest) -> None:
    for name, spec in manifest.files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or not name.isprintable() or {*name} & {"\\", ":"}:
            raise ValueError(f"file name {show(name)} leads outside the bundle")
        if not re.fullmatch("[0-9a-f]{64}", spec.sha256):
            raise ValueError(f"files: {show(name)} has sha256 {show(spec.sha256)}, expected 64 hexadecimal digits")
    for graph in manifest.graphs.values():
        for file in (graph.file, graph.weights):
            if file not in manifest.files:
                raise ValueError(f"graph file {show(file)} has no hash")


def _check_model(manifest: Manifest) -> None:
    model = manifest.model
    if manifest.precision.name not in EXPORTED:
        raise ValueError(f"precision {manifest.precision.name}: not implemented, expected {' or '.join(EXPORTED)}")
    _check_quantization(manifest)
    _check_choice("conditioning", model.conditioning, CONDITIONINGS)
    if model.times > 1 and model.conditioning not in VECTORS:
        raise ValueError(
            f"{model.times} times with conditioning {model.conditioning}, expected one of {', '.join(VECTORS)}"
        )
    if model.width % model.heads:
        raise ValueError(f"{model.heads} heads do not divide width {model.width}")
    if bool(model.observation) != bool(model.time_width):
        raise ValueError(f"observation {model.observation} with time_width {model.time_width}; expected both or none")
    if model.observation and (model.conditioning != "adaln-zero" or model.has_null or model.learned_variance):
        raise ValueError("a policy with another conditioning than adaln-zero, a null class or a learned variance")
    if model.observation and manifest.autoencoder != NO_AUTOENCODER:
        raise ValueError(f"a policy with the autoencoder {show(manifest.autoencoder.name)}; expected none")
    if model.observation and (model.latent_size[0], model.patch_size) != (1, 1):
        raise ValueError(
            f"a policy of latents {model.latent_size[0]} high with patch size {model.patch_size}; expected 1 and 1"
        )
    if math.prod(table_shape(model)) > MOST_ROW:
        raise ValueError(f"a conditioning table with {math.prod(table_shape(model))} numbers in a row")
    if len(manifest.class_names) not in (0, model.classes):
        raise ValueError(f"{len(manifest.class_names)} class names for {model.classes} classes")


def _check_quantization(manifest: Manifest) -> None:
    calibration, quantized = manifest.calibration, manifest.precision.name in QUANTIZED
    if (calibration is not None) != quantized:
        raise ValueError(f"precision {manifest.precision.name} {'without' if quantized else 'with'} calibration")
    if manifest.precision.keep_fp16 and not quantized:
        raise ValueError(
            f"precision {manifest.precision.name} with units to keep in FP16, which only "
            f"{' and '.join(name.upper() for name in QUANTIZED)} have"
        )
    if calibration is None:
        return
    if not calibration.labels or max(calibration.labels) >= max(manifest.model.label_rows, 1):
        raise ValueError(f"calibration.labels {show(list(calibration.labels))}, expected labels of this model")
    if len(calibration.labels) > MOST_CALIBRATION_LABELS or len(calibration.sampler) > LONGEST_TEXT:
        raise ValueError(
            f"calibration with {len(calibration.labels)} labels, expected {MOST_CALIBRATION_LABELS} at most"
        )
    if not any(map(manifest.precision.quantizes, linears_of(manifest.model.conditioning, manifest.model.depth))):
        raise ValueError(f"precision {manifest.precision.name}, and every linear layer is kept in FP16")


def _check_sizes(manifest: Manifest) -> None:
    model, sizes = manifest.model, manifest.sizes
    if not sizes or sizes[0] != model.latent_size:
        raise ValueError(f"sizes {show(sizes)} do not begin with {model.latent_size}")
    if len(set(sizes)) != len(sizes):
        raise ValueError(f"sizes {show(sizes)} name a size twice")
    for height, width in sizes:
        if height % model.patch_size or width % model.patch_size:
            raise ValueError(f"patch size {model.patch_size} does not divide size {height}x{width}")
        if model.latent_channels * height * width > MOST_LATENTS:
            raise ValueError(f"size {height}x{width} with {model.latent_channels} channels is more than one image's")
        if height * width * manifest.autoencoder.factor**2 > MOST_PIXELS:
            raise ValueError(
                f"size {height}x{width} with factor {manifest.autoencoder.factor} is more than one image's"
            )


def _check_latents(manifest: Manifest) -> None:
    autoencoder, channels = manifest.autoencoder, manifest.model.latent_channels
    counts = {len(autoencoder.latents_mean), len(autoencoder.latents_std)}
    if counts not in ({0}, {channels}):
        raise ValueError(f"latents_mean and latents_std of {show(sorted(counts))} channels; expected {channels}")
    if not all(value > 0 for value in autoencoder.latents_std):
        raise ValueError("latents_std holds 0; expected numbers above 0")


def _check_diffusion(manifest: Manifest) -> None:
    diffusion = manifest.diffusion
    _check_choice("prediction type", diffusion.prediction_type, PREDICTIONS)
    _check_choice("timestep spacing", diffusion.timestep_spacing, SPACINGS)
    if (diffusion.prediction_type == "velocity") != (diffusion.path in PATHS):
        raise ValueError(f"prediction type {diffusion.prediction_type!r} with path {show(diffusion.path)}")
    if diffusion.time == NOISE_AT_1 and diffusion.path not in TURNED:
        raise ValueError(f"time {NOISE_AT_1} with path {show(diffusion.path)}; expected one of {', '.join(TURNED)}")
    if diffusion.time_shift != 1 and (diffusion.path is None or diffusion.time == NOISE_AT_1):
        raise ValueError(f"time_shift {diffusion.time_shift:g} with path {show(diffusion.path)} and {diffusion.time}")
    if (diffusion.second_time is not None) != (manifest.model.times == 2):
        raise ValueError(f"second_time {show(diffusion.second_time)} of a model of {manifest.model.times} times")
    if diffusion.second_time is not None and diffusion.time != NOISE_AT_1:
        raise ValueError(f"second_time {diffusion.second_time} with time {diffusion.time}; expected {NOISE_AT_1}")
    *betas, last = diffusion.betas or (0.5,)
    if diffusion.path is None and not (
        diffusion.betas and all(LEAST_BETA <= beta < 1 for beta in betas) and 0 < last <= 1
    ):
        raise ValueError("betas must lie between 0 and 1")
    if len(diffusion.betas) > MOST_BETAS or (diffusion.path is not None and diffusion.betas):
        raise ValueError(f"{len(diffusion.betas)} betas with path {show(diffusion.path)}")
    if (diffusion.options.first_timestep or 0) >= max(len(diffusion.betas), 1):
        raise ValueError(f"first_timestep {diffusion.options.first_timestep} of {len(diffusion.betas)} timesteps")
    if diffusion.options.clip_bound is not None and not manifest.model.clips:
        raise ValueError("options.clip_sample true, and the model's step does not clip")
    if abs(diffusion.steps_offset) > len(diffusion.betas):
        raise ValueError(f"steps_offset {diffusion.steps_offset} for {len(diffusion.betas)} training timesteps")
    if diffusion.guidance_channels > manifest.model.latent_channels:
        raise ValueError(
            f"guidance on {diffusion.guidance_channels} channels of {manifest.model.latent_channels} latent channels"
        )


def _check_graphs(manifest: Manifest) -> None:
    model = manifest.model
    sizes = dict.fromkeys(SIZED_GRAPHS, model.latent_size)
    sizes |= {name_for_size(name, size): size for size in manifest.sizes[1:] for name in SIZED_GRAPHS}
    expected = dict.fromkeys((*GRAPHS, *sizes))
    optional: tuple[str, ...] = (ENCODER,)
    if model.observation:
        del expected["decoder"]
        optional = ()
    if missing := [name for name in expected if name not in manifest.graphs]:
        raise ValueError(f"no graph {missing[0]!r}")
    if unknown := [name for name in manifest.graphs if name not in (*expected, *optional)]:
        raise ValueError(f"unknown graph {show(unknown[0])}")
    table = _table_of(manifest)
    for name, graph in manifest.graphs.items():
        inputs, outputs = _tensors_of(manifest, name, sizes.get(name, model.latent_size), table)
        if name == ENCODER and len(graph.outputs) == 1:
            del outputs["std"]  # an autoencoder without a posterior has none
        _check_tensors(f"graphs.{name}.inputs", graph.inputs, inputs)
        _check_tensors(f"graphs.{name}.outputs", graph.outputs, outputs)


def _table_of(manifest: Manifest) -> Tensors:
    """The conditioning table, which the conditioner gives and step and probe take."""
    outputs, model = manifest.graphs["conditioner"].outputs, manifest.model
    dtypes = ("float16", "float32") if model.conditioning == "cross-attention" else ("float32",)
    if len(outputs) != 1 or outputs[0].dtype not in dtypes:
        raise ValueError(f"graphs.conditioner.outputs: expected one table of {' or '.join(dtypes)}")
    names = {"cross-attention": "keys_values", "in-context": "tokens"}
    return {names.get(model.conditioning, "modulation"): (outputs[0].dtype, ("rows", *table_shape(model)))}


def table_shape(model: ModelSpec) -> tuple[int, ...]:
    """The shape of a row of the conditioning table."""
    if model.conditioning == "cross-attention":
        return (model.depth, 2, CONDITION_TOKENS, model.width)  # keys and values
    if model.conditioning == "in-context":
        return (CONDITION_TOKENS, model.width)
    vectors = VECTORS[model.conditioning] * model.depth
    return (vectors if model.observation else vectors + 2, model.width)  # and the final layer's shift and scale


def _tensors_of(manifest: Manifest, name: str, size: tuple[int, int], table: Tensors) -> tuple[Tensors, Tensors]:
    """The inputs and outputs that a graph has in ``docs/bundle-format.md``."""
    model, factor = manifest.model, manifest.autoencoder.factor
    latents: Axes = ("batch", model.latent_channels, *size)
    state: Axes = ("batch", 3, *latents[1:])
    if name == "conditioner":
        times: Axes = ("rows",) if model.times == 1 else ("rows", model.times)
        condition: Tensors = {"labels": ("int32", ("rows",))}
        if model.observation:
            condition = {"observations": ("float32", ("rows", model.observation))}
        return {"timesteps": ("float32", times), **condition}, table
    if name == "decoder":
        image = (f"{factor}*height", f"{factor}*width")
        return (
            {"latents": ("float32", ("batch", model.latent_channels, "height", "width"))},
            {"images": ("uint8", ("batch", *image, 3)), "decoded": ("float32", ("batch", 3, *image))},
        )
    if name == ENCODER:
        encoded = ("float32", ("batch", model.latent_channels, f"image_height//{factor}", f"image_width//{factor}"))
        images: Axes = ("batch", "image_height", "image_width", 3)
        return {"images": ("uint8", images)}, {"mean": encoded, "std": encoded}
    inputs: Tensors = {
        "state": ("float32", state),
        "noise": ("float32", latents),
        "coefficients": ("float32", ("batch", CLIPPED if model.clips else COEFFICIENTS)),
        "guidance": ("float32", ("branches", "batch", model.latent_channels)),
        "rows": ("int32", ("branches", "batch")),
        **table,
    }
    outputs: Tensors = {"next_state": ("float32", state), "denoised": ("float32", latents)}
    if name.startswith("probe"):
        tokens = (size[0] // model.patch_size) * (size[1] // model.patch_size)
        tokens += CONDITION_TOKENS * (model.conditioning == "in-context")
        block: Axes = ("branches*batch", tokens, model.width)
        outputs |= {f"blocks.{index}": ("float32", block) for index in range(model.depth)}
    return inputs, outputs


def _check_tensors(where: str, found: tuple[TensorSpec, ...], expected: Tensors) -> None:
    names = [tensor.name for tensor in found]
    if sorted(names) != sorted(expected):
        raise ValueError(f"{where}: got {show(names)}, expected {show(list(expected))}")
    for tensor in found:
        dtype, shape = expected[tensor.name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(
                f"{where}: {tensor.name} is {show(tensor.dtype)} {show(list(tensor.shape))}, expected {dtype} "
                f"{show(list(shape))} of this model"
            )


def _check_weights(manifest: Manifest) -> None:
    """Check the model's sizes against the bytes of its files: the least that their matrices take, in 16 or 8 bits."""
    model = manifest.model
    number = 1 if manifest.precision.name in QUANTIZED else 2  # the least bytes of one
    for name, numbers in {
        # The labels' embedding, or a policy's modulations.
        "conditioner": model.width * (6 * model.depth * model.observation or model.classes),
        "step": model.width * model.mlp_width,  # a matrix of a block's MLP
    }.items():
        held = sum(manifest.files[file].bytes for file in _files_of(manifest.graphs[name]))
        if number * numbers > held:
            raise ValueError(
                f"the {name}'s files have {held} bytes, expected {number * numbers} at least for this model"
            )


def _files_of(graph: GraphSpec) -> Iterable[str]:
    return {graph.file, graph.weights}


def _check_choice(what: str, found: str, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise ValueError(f"{what} {show(found)}, expected one of {', '.join(choices)}")
