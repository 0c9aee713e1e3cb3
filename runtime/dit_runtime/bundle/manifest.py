"""The types of ``manifest.json``: the model, the graphs with their inputs and outputs, and the limits of verification.

A manifest is untrusted. Reading it raises an error for every value that is missing, unknown or inconsistent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from dit_runtime.bundle.precision import QUANTIZED, Precision, is_kept
from dit_runtime.bundle.quantization import CalibrationSpec, is_block_linear
from dit_runtime.core.decode import Amount, Natural, Range, decode, optional, without_defaults

SCHEMA = 5
GRAPHS = ("conditioner", "step", "probe", "decoder")
ENCODER = "encoder"
AUTOENCODER = ("decoder", ENCODER)
SIZED_GRAPHS = ("step", "probe")  # each is traced for one latent size; the other graphs take any size
CONDITIONINGS = ("adaln-zero", "adaln", "cross-attention", "in-context")
PATHS = ("linear", "gvp", "vp")
# Which way the time of a velocity model runs: to the image as SiT's, or to the noise as REPA's.
TIMES = (NOISE_AT_0, NOISE_AT_1) = ("noise-at-0", "noise-at-1")
Time = Literal["noise-at-0", "noise-at-1"]
TURNED = ("linear", "gvp")  # the paths of models with the time ``noise-at-1``
# What a model of two times gets as its second one, beside t: the length of the step to r, or r.
SECOND_TIMES = (INTERVAL, END) = ("t-r", "r")
SecondTime = Literal["t-r", "r"]

# Far above any model's: with larger numbers a damaged manifest would cost memory or time before it is found out.
Side = Annotated[int, Range(1, 1 << 16)]  # of latents; the graphs take no more
Width = Annotated[int, Range(1, 1 << 16)]
Count = Annotated[int, Range(1, 1 << 12)]  # channels, blocks, heads
Steps = Annotated[int, Range(1, 10_000)]


@dataclass(frozen=True)
class ModelSpec:
    """The transformer's architecture and shape.

    Attributes:
        conditioning: one of ``CONDITIONINGS``, the paper's four.
        latent_channels, latent_size: of the latents; the size is height and width in latent pixels.
        patch_size: side of a patch in latent pixels.
        width: the hidden size D.
        depth, heads: the number of blocks, and of attention heads in each.
        mlp_width: width of the MLP's hidden layer.
        classes: the number of classes, without the null class; of a policy, the number of recorded observations.
        learned_variance: whether the network also predicts the variance.
        has_null: whether the label table's last row is the null class, which guidance needs.
        qk_norm: of queries and keys before their product, over each head: ``none``, a LayerNorm or an RMSNorm, with
            weights.
        norm: before attention, before the MLP and at the end: a LayerNorm, or an RMSNorm with weights.
        mlp: the MLP's activation: ``gelu`` approximated with tanh, or ``swiglu``, whose first layer is twice as wide.
        rotary: whether queries and keys are turned by their token's row and column (RoPE).
        observation: numbers of an observation, of a policy: the conditioner takes an observation in place of a label,
            and the network has neither norm nor modulation after its last block; 0 for a model of classes.
        time_width: width of a policy's timestep embedding, which stands beside the observation.
        clips: whether the step clips the denoised estimate: its rows of coefficients have a bound.
        times: how many times the network gets: t, or t and a second one (MeanFlow).
    """

    conditioning: str
    latent_channels: Count
    latent_size: tuple[Side, Side]
    patch_size: Side
    width: Width
    depth: Count
    heads: Count
    mlp_width: Annotated[int, Range(1, 1 << 20)]
    classes: Annotated[int, Range(0, 1 << 24)]
    learned_variance: bool
    has_null: bool = optional(True)
    qk_norm: Literal["none", "layer", "rms"] = optional("none")
    norm: Literal["layer", "rms"] = optional("layer")
    mlp: Literal["gelu", "swiglu"] = optional("gelu")
    rotary: bool = optional(False)
    clips: bool = optional(False)
    times: Literal[1, 2] = optional(1)
    observation: Annotated[int, Range(0, 1 << 16)] = optional(0)
    time_width: Annotated[int, Range(0, 1 << 12)] = optional(0)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of patches along height and width."""
        return self.latent_size[0] // self.patch_size, self.latent_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def attentions(self) -> int:
        """The number of attention operations in one forward."""
        return self.depth * (2 if self.conditioning == "cross-attention" else 1)

    @property
    def output_channels(self) -> int:
        return self.latent_channels * (2 if self.learned_variance else 1)

    @property
    def label_rows(self) -> int:
        """The number of rows of the label table."""
        return self.classes + self.has_null

    @property
    def null_class(self) -> int:
        """The label of the unconditional branch; without a null class it is 0, which records are guided away from."""
        return self.classes if self.has_null else 0


@dataclass(frozen=True)
class SchedulerOptions:
    """What a diffusers scheduler's configuration states about steps, by diffusers' own names.

    None is an option that the configuration does not state, or states as diffusers' solvers have it by default.
    ``dit_runtime.samplers.options`` says what each sampler does with each. ``first_timestep`` is the one number that
    diffusers has no name for: where noise levels are given and timesteps follow, the timestep of the first level, which
    in diffusers hangs on the last digit of a float32.
    """

    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range", "learned"] | None
    ) = optional(None)
    algorithm_type: Literal["dpmsolver", "sde-dpmsolver", "sde-dpmsolver++"] | None = optional(None)
    solver_order: Annotated[int, Range(1, 3)] | None = optional(None)
    solver_type: Literal["heun", "bh1"] | None = optional(None)
    lower_order_final: bool | None = optional(None)
    euler_at_final: bool | None = optional(None)
    use_karras_sigmas: bool | None = optional(None)
    use_exponential_sigmas: bool | None = optional(None)
    use_beta_sigmas: bool | None = optional(None)
    use_lu_lambdas: bool | None = optional(None)
    use_flow_sigmas: bool | None = optional(None)
    use_dynamic_shifting: bool | None = optional(None)
    sigma_min: Amount | None = optional(None)
    sigma_max: Amount | None = optional(None)
    shift_terminal: float | None = optional(None)
    final_sigmas_type: Literal["sigma_min"] | None = optional(None)
    lambda_min_clipped: float | None = optional(None)
    predict_x0: bool | None = optional(None)
    disable_corrector: tuple[Natural, ...] | None = optional(None)
    beta_schedule: Literal["squaredcos_cap_v2"] | None = optional(None)
    first_timestep: Natural | None = optional(None)
    clip_sample: bool | None = optional(None)
    clip_sample_range: Annotated[float, Range(1e-6, 1e6)] | None = optional(None)

    @property
    def clip_bound(self) -> float | None:
        """The bound of the denoised estimate of the samplers that clip; None where they do not."""
        return (self.clip_sample_range or 1.0) if self.clip_sample else None

    def stated(self) -> dict[str, Any]:
        """The options that are stated, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class DiffusionSpec:
    """The forward process, the quantity that the network predicts, and the reference scheduler's conventions.

    Attributes:
        betas: one float64 for each training timestep; a last beta of 1 means zero terminal SNR. Empty with a ``path``.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` (the clean latents), or ``velocity`` for a model with
            a ``path``.
        guidance_channels: the number of latent channels that classifier-free guidance acts on, from the first.
        timestep_spacing, steps_offset, set_alpha_to_one: diffusers' scheduler settings of the same names.
            A spacing of ``default`` is one that the checkpoint does not state: each sampler has its own.
        path: SiT's ``linear``, ``gvp`` or ``vp``; None for a model with betas.
        options: the options of diffusers' scheduler; the file leaves them out where nothing is stated.
        time: which way the time of a velocity model runs, one of ``TIMES``: the velocity is dx/dt in that time.
        time_shift: s of the times s·t/(1 + (s − 1)·t) at which an ODE solver of a velocity model takes the uniform t.
        second_time: what a model of two times gets beside t, one of ``SECOND_TIMES``: it predicts the average velocity
            from r to t. None for a model of one time.
        guidance_inside: whether guidance was trained into the weights, so that sampling takes no scale but 1.
    """

    betas: tuple[float, ...]
    prediction_type: str
    guidance_channels: Natural
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    path: str | None = None
    options: SchedulerOptions = optional(SchedulerOptions())
    time: Time = optional("noise-at-0")
    time_shift: Annotated[float, Range(1e-3, 1e3)] = optional(1.0)
    second_time: SecondTime | None = optional(None)
    guidance_inside: bool = optional(False)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. An axis of ``shape`` is a size, or the name of a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[Natural | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """A graph: its ONNX file, the file of its weights, and its inputs and outputs."""

    file: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class AutoencoderSpec:
    """The autoencoder. ``factor`` is image pixels per latent pixel. A policy has ``NO_AUTOENCODER``.

    The graphs apply scaling and shift themselves; they are here for the record. With ``latents_mean`` and
    ``latents_std`` ``[C]`` the autoencoder's own latents are z·std/scaling_factor + mean.
    """

    name: str
    scaling_factor: float
    shift_factor: float
    factor: Annotated[int, Range(1, 256)]
    latents_mean: tuple[float, ...] = optional(())
    latents_std: tuple[Amount, ...] = optional(())


NO_AUTOENCODER = AutoencoderSpec("none", 1.0, 0.0, 1)  # of a policy, whose latents are its actions


@dataclass(frozen=True)
class PrecisionSpec:
    """The precision of the graphs, and the named units that stay FP32, or in an INT8 or FP8 bundle FP16."""

    name: Precision
    keep_fp32: tuple[str, ...]
    keep_fp16: tuple[str, ...] = optional(())

    @property
    def numbers(self) -> Precision:
        """The precision of the numbers between the products: FP16 in an INT8 or FP8 bundle, else the bundle's own."""
        return Precision.FP16 if self.name in QUANTIZED else self.name

    def precision_of(self, unit: str) -> Precision:
        """The precision of the numbers of a named unit, such as ``blocks.17.mlp``.

        The autoencoder of a BF16 bundle is FP16: BF16's 8 bits would be seen in its images, and ONNX's Conv has no BF16
        at the opset of the graphs.
        """
        if is_kept(unit, self.keep_fp32):
            return Precision.FP32
        return Precision.FP16 if self.name == Precision.BF16 and unit in AUTOENCODER else self.numbers

    def quantizes(self, linear: str) -> bool:
        """Whether a linear layer, such as ``blocks.17.mlp.fc1``, multiplies INT8 or FP8."""
        return is_block_linear(linear) and self.name in QUANTIZED and not is_kept(linear, self.keep_fp16)


@dataclass(frozen=True)
class SourceSpec:
    """Where the weights came from, and which implementation is their reference."""

    name: str
    revision: str | None
    reference: str
    weights_sha256: str | None


@dataclass(frozen=True)
class DefaultsSpec:
    """The defaults of sampling."""

    sampler: str
    steps: Steps
    guidance: float


@dataclass(frozen=True)
class FileSpec:
    """A file's size and SHA-256."""

    bytes: Natural
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``. ``docs/bundle-format.md`` specifies every field.

    Attributes:
        sizes: the latent sizes (height, width) that the bundle has graphs for; the first is ``model.latent_size``.
        tolerances: by precision and kind of rung, the largest error that an engine may have.
        thresholds: by precision and kind of rung, the largest ratio of an engine's error to PyTorch's own error.
        floors: by precision and record, PyTorch's own error in that precision: the relative L2 of each block, image or
            step. The floor of FP32 is against FP64, the other floors are against FP32. The name of a record of a
            further size has the suffix of that size's graphs.
        magnitudes: by unit of the precision policy, the largest |x| that enters or leaves one of its matrix products
            on the reference's own trajectory. ``blocks.N`` is the residual stream after block N.
        calibration: how an INT8 or FP8 bundle's ranges were found; None of any other bundle.
        files: size and SHA-256 of every other file of the bundle.
    """

    schema: int
    producer: dict[str, str]
    source: SourceSpec
    model: ModelSpec
    sizes: tuple[tuple[Side, Side], ...]
    diffusion: DiffusionSpec
    autoencoder: AutoencoderSpec
    precision: PrecisionSpec
    defaults: DefaultsSpec
    class_names: tuple[str, ...]
    graphs: dict[str, GraphSpec]
    tolerances: dict[str, dict[str, Amount]]
    thresholds: dict[str, dict[str, Amount]]
    floors: dict[str, dict[str, tuple[Amount, ...]]]
    magnitudes: dict[str, Amount]
    calibration: CalibrationSpec | None = optional(None)
    files: dict[str, FileSpec] = field(default_factory=dict)

    @property
    def table(self) -> TensorSpec:
        """The tensor of the conditioning table: the conditioner's output, and an input of step and probe."""
        return self.graphs["conditioner"].outputs[0]

    @property
    def has_decoder(self) -> bool:
        """Whether latents become images; a policy's are its actions."""
        return "decoder" in self.graphs

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels, at the size in use."""
        return self.image_sizes[self.sizes.index(self.model.latent_size)]

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """``sizes`` in pixels."""
        factor = self.autoencoder.factor
        return tuple((height * factor, width * factor) for height, width in self.sizes)

    def to_json(self) -> str:
        return json.dumps(without_defaults(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def name_for_size(name: str, size: tuple[int, int]) -> str:
    """The name of a graph, record or folder for a latent size that is not the bundle's first."""
    return f"{name}-{size[0]}x{size[1]}"


def manifest_from_json(raw: Mapping[str, Any]) -> Manifest:
    """Decode a manifest. Raises DecodeError where a value does not have the type that ``Manifest`` declares.

    ``consistency.check_consistency`` checks that the values fit each other.
    """
    return decode(Manifest, raw)
