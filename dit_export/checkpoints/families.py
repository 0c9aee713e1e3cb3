"""The families of models: whose conventions a model was trained with and is sampled with.

A family says what the weights mean; a format says how they are stored. Files of one format may hold several families.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_runtime.bundle.manifest import (
    NOISE_AT_0,
    NOISE_AT_1,
    DefaultsSpec,
    DiffusionSpec,
    ModelSpec,
    SecondTime,
)


@dataclass(frozen=True)
class Family:
    """The conventions of a family.

    Attributes:
        defaults: sampler, steps and guidance scale where the caller names none.
        model: the implementation whose model is the reference, of checkpoints with adaLN-Zero.
        reference: what the golden records are made with, where ``{model}`` and ``{path}`` are filled in.
        guidance_channels: how many latent channels the reference's guidance acts on; None is all of them.
        copies_embedders: whether the source stores a copy of the timestep and label embedders in each block.
        stores_positions: whether the source stores its positional table; otherwise the reference computes it.
        time: which way the time of a velocity model runs; None for a diffusion model.
        time_shift: LightningDiT's ``timestep_shift`` of an ODE solver's times; 1 is none.
        autoencoder: the hub id of the autoencoder that the reference samples with, for a file that has none.
        second_time: what models of two times get beside t where nobody says it; None for models of one time.
        latent_scale: by which the reference scales the latents of Stable Diffusion's autoencoder, where that is not the
            autoencoder's own scaling.
    """

    defaults: DefaultsSpec
    model: str
    reference: str
    guidance_channels: int | None
    copies_embedders: bool
    stores_positions: bool
    time: str | None = None
    time_shift: float = 1.0
    autoencoder: str = "stabilityai/sd-vae-ft-mse"  # the official sample.py's
    second_time: SecondTime | None = None
    latent_scale: float | None = None

    def describe_reference(self, model: ModelSpec, diffusion: DiffusionSpec) -> str:
        """What the golden records of a model are made with, in words, for the manifest."""
        published = model.conditioning == "adaln-zero"
        own = self.model if published else f"the paper's {model.conditioning} DiT with the official numerics"
        text = self.reference.format(model=own, path=diffusion.path)
        if not model.has_null and not model.observation:
            text += ", no null class"
        guided = diffusion.guidance_channels
        if guided == (self.guidance_channels or model.latent_channels):
            return text
        return f"{text}, guidance on {guided} of {model.latent_channels} channels"


FAMILIES = {
    "diffusers": Family(
        # DiTPipeline's default guidance scale, with the 50 DDIM steps that its scheduler is used with.
        defaults=DefaultsSpec(sampler="ddim", steps=50, guidance=4.0),
        model="diffusers DiTTransformer2DModel",
        reference="{model}, autoencoder and scheduler in DiTPipeline's loop, FP32, null = classes",
        guidance_channels=None,
        copies_embedders=True,
        stores_positions=False,
    ),
    "official": Family(
        # The official sample.py.
        defaults=DefaultsSpec(sampler="ddpm", steps=250, guidance=4.0),
        model="facebookresearch/DiT's model",
        reference="{model} and respaced diffusion, diffusers autoencoder, FP32",
        guidance_channels=3,
        copies_embedders=False,
        stores_positions=True,
    ),
    "sit": Family(
        # SiT's sample.py has an adaptive solver, which no sampler table can hold; the paper also uses Heun's.
        defaults=DefaultsSpec(sampler="heun", steps=50, guidance=4.0),
        model="willisma/SiT's model",
        reference="{model} and fixed-step samplers, {path} path, diffusers autoencoder, FP32",
        guidance_channels=3,
        copies_embedders=False,
        stores_positions=True,
        time=NOISE_AT_0,
    ),
    "repa": Family(
        # The defaults of REPA's generate.py; the published figures are its SDE's, 250 steps, 1.8 up to a time of 0.7.
        defaults=DefaultsSpec(sampler="euler", steps=50, guidance=1.5),
        model="sihyun-yu/REPA's SiT",
        reference="{model} and samplers, {path} path, diffusers autoencoder, FP32",
        guidance_channels=None,
        copies_embedders=False,
        stores_positions=True,
        time=NOISE_AT_1,
        autoencoder="stabilityai/sd-vae-ft-ema",
    ),
    "lightningdit": Family(
        # The configuration of the published model of 800 epochs, whose 250 points are 249 steps.
        defaults=DefaultsSpec(sampler="euler", steps=249, guidance=6.7),
        model="hustvl/LightningDiT's model",
        reference="{model} and fixed-step samplers, {path} path, diffusers autoencoder, FP32",
        guidance_channels=3,
        copies_embedders=False,
        stores_positions=True,
        time=NOISE_AT_0,
        time_shift=0.3,
        autoencoder="hustvl/vavae-imagenet256-f16d32-dinov2",
    ),
    "meanflow": Family(
        # evaluate.py's one step, and the scale that its README asks for: guidance is in the weights.
        defaults=DefaultsSpec(sampler="meanflow", steps=1, guidance=1.0),
        model="zhuyu-cs/MeanFlow's SiT",
        reference="{model} and sampler, {path} path, diffusers autoencoder, FP32",
        guidance_channels=None,
        copies_embedders=False,
        stores_positions=True,
        time=NOISE_AT_1,
        autoencoder="stabilityai/sd-vae-ft-ema",
        second_time="t-r",
        latent_scale=0.18125,
    ),
    "multi-task-dit": Family(
        # The configuration's defaults; a policy has its own sampler and steps.
        defaults=DefaultsSpec(sampler="ddpm", steps=100, guidance=1.0),
        model="huggingface/lerobot's multi-task DiT",
        reference="{model}, its scheduler of diffusers or its Euler, FP32",
        guidance_channels=None,
        copies_embedders=False,
        stores_positions=True,
    ),
}
