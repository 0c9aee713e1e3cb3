"""The PyTorch reference: a checkpoint's unpatched modules, run as the checkpoint's own code runs them.

In the diffusers family they are diffusers' transformer and schedulers in ``DiTPipeline``'s loop, with the number of
classes as the null label (``DiTPipeline`` itself hard-codes 1000). In the other families they are the plain DiT of
``official_model.py`` and the loops of ``loops.py``. The autoencoder is always diffusers'. The reference computes in
FP32 except inside ``at_precision``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.random_weights import SkippedInitialization
from dit_export.reference.lightning_model import LightningDiT, rotary_positions
from dit_export.reference.loops import (
    LoopStep,
    OfficialDiffusion,
    SiTPath,
    diffusers_ddim,
    diffusers_ddpm,
)
from dit_export.reference.mean_flow import mean_flow
from dit_export.reference.official_model import DiT, embed_times
from dit_export.reference.policy_model import PolicyDiT
from dit_export.reference.repa import RepaPath
from dit_runtime.bundle.manifest import NOISE_AT_1, ModelSpec


@dataclass
class Observation:
    """The tensors of one evaluation of the network, in order.

    Attributes:
        tokens: the input ``[N, T, D]`` of the first block; in-context conditioning has two tokens more.
        conditions: what each block and the final layer compute from timestep and label.
        blocks: the output ``[N, T, D]`` of each block.
    """

    tokens: list[Tensor] = field(default_factory=list)
    conditions: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)


class Reference:
    """A checkpoint's unpatched modules, at the size of its ``model``.

    ``dtype`` is the dtype that the modules compute in; guidance and sampler compute in the dtype of the latents.
    ``table_factors`` are what the numbers of the conditioning table are multiplied by in the graphs; of INT8 alone.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.model
        self.dtype = self.autoencoder_dtype = torch.float32
        self.table_factors = torch.ones(())
        self.channels, self.classes = self.spec.latent_channels, self.spec.classes
        self.observations = make_observations(self.spec) if self.spec.observation else None
        self.blocks: Any  # a module list; the attributes of its modules have no types
        if checkpoint.transformer is not None:
            self.transformer: Any = checkpoint.transformer()
            self.blocks = self.transformer.transformer_blocks
            self.evaluate = self._run_diffusers if self.spec.grid[0] == self.spec.grid[1] else self._run_diffusers_parts
        elif checkpoint.own_weights is not None:
            own = checkpoint.own_weights
            with SkippedInitialization():
                self.transformer = PolicyDiT(self.spec, checkpoint.numerics.rotary_base, "pos_embedding" in own)
            self.transformer.load_state_dict(dict(own), assign=True)
            self.transformer.eval().requires_grad_(False)
            self.blocks = self.transformer.transformer_blocks
            self.evaluate = self._run_policy
        else:
            with SkippedInitialization():
                spec = self.spec
                is_lightning = spec.norm == "rms" or spec.mlp == "swiglu" or spec.rotary
                self.transformer = (LightningDiT if is_lightning else DiT)(spec, checkpoint.channels)
            state = (
                dict(checkpoint.weights)
                if self.spec.latent_size == checkpoint.trained_size
                else {
                    **{name: checkpoint.weights[name] for name in checkpoint.weights if name != "pos_embed"},
                    "pos_embed": official_positions(self.spec.width, self.spec.grid),
                }
                | (rotary_positions(self.spec) if self.spec.rotary else {})
            )
            self.transformer.load_state_dict(state, assign=True)
            self.transformer.eval().requires_grad_(False)
            self.blocks = self.transformer.blocks
            self.evaluate = self._run_official

    def _run_diffusers(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        output: Tensor = self.transformer(z, timestep=t, class_labels=labels).sample
        return output

    def _run_diffusers_parts(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """diffusers' own modules in its own order, for images that are not square; its ``forward`` makes squares."""
        model = self.transformer
        x = model.pos_embed(z)
        for block in model.transformer_blocks:
            x = block(x, timestep=t, class_labels=labels)
        condition = model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(nn.functional.silu(condition)).chunk(2, dim=1)
        x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        (h, w), p = self.spec.grid, self.spec.patch_size
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(-1, h, w, p, p, self.checkpoint.channels))
        return x.reshape(-1, self.checkpoint.channels, h * p, w * p)

    def _run_official(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        output: Tensor = self.transformer(z, t, labels)
        return output[:, : self.spec.output_channels]  # SiT drops the second half

    def _run_policy(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Actions are latents ``[N, A, 1, T]`` here, and a label is the number of an observation."""
        assert self.observations is not None
        output: Tensor = self.transformer(z[:, :, 0].transpose(1, 2), t, self.observations[labels])
        return output.transpose(1, 2)[:, :, None]

    def predict(self, z: Tensor, t: Tensor, labels: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """Guided prediction ``[B, C, H, W]`` and the conditional branch's variance channels.

        Guidance acts on all channels as in ``DiTPipeline``, or on the first three as in the official
        ``forward_with_cfg``; the other channels are the conditional branch's.
        """
        if guidance == 1:
            output = self.evaluate(z.to(self.dtype), t, labels).to(z.dtype)
            return output[:, : self.channels], output[:, self.channels :]
        classes = torch.cat([labels, torch.full_like(labels, self.spec.null_class)])
        both = torch.cat([z, z]).to(self.dtype)
        output, null = self.evaluate(both, torch.cat([t, t]), classes).to(z.dtype).chunk(2)
        guided = self.checkpoint.diffusion.guidance_channels
        cond, uncond = output[:, :guided], null[:, :guided]
        e = torch.cat([uncond + guidance * (cond - uncond), output[:, guided : self.channels]], dim=1)
        return e, output[:, self.channels :]

    def loop(self, name: str, steps: int, generators: list[torch.Generator]) -> Iterator[LoopStep]:
        """The reference's own sampling loop.

        At another precision than FP32 diffusers' arrays are made in float64. The FP32 reference's own arrays are
        slightly off, and this error is part of every difference from the reference, also of an engine's.
        """
        diffusion, learned = self.checkpoint.diffusion, self.spec.learned_variance
        if diffusion.second_time is not None:
            return mean_flow(steps, diffusion.second_time)
        if diffusion.path is not None:
            path = RepaPath(diffusion.path) if diffusion.time == NOISE_AT_1 else SiTPath(diffusion.path)
            if isinstance(path, SiTPath) and name == "euler":
                return path.ode(steps, diffusion.time_shift)
            return path.ode(steps) if name == "euler" else path.sde(steps, generators)
        if self.checkpoint.scheduler is None:
            official = OfficialDiffusion(diffusion.betas, steps, self.table_dtype)
            return official.ddim() if name == "ddim" else official.ddpm(learned, generators)
        betas = None if self.dtype == torch.float32 else diffusion.betas
        if name == "ddim":
            return diffusers_ddim(self.checkpoint.scheduler, steps, generators, betas)
        return diffusers_ddpm(self.checkpoint.scheduler.config, steps, learned, generators, betas)

    @property
    def table_dtype(self) -> torch.dtype:
        """The dtype of guidance and sampler: float64 if the modules compute in FP64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @contextlib.contextmanager
    def observe(self) -> Iterator[Observation]:
        """Collect the tensors that go through the network inside this block."""
        seen = Observation()
        spec = self.spec

        def see_input(_: Any, inputs: Any) -> None:
            seen.tokens.append(inputs[0].clone())
            if spec.conditioning == "in-context":
                seen.conditions.append(inputs[0][:, spec.tokens :].clone())

        hooks = [self.blocks[0].register_forward_pre_hook(see_input)]
        hooks += [
            block.register_forward_hook(lambda _, __, output: seen.blocks.append(output.clone()))
            for block in self.blocks
        ]
        hooks += [
            module.register_forward_hook(lambda _, __, output: seen.conditions.append(output.clone()))
            for module in self._find_conditioning_modules()
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _find_conditioning_modules(self) -> list[nn.Module]:
        """The modules that compute conditions from timestep and label."""
        model = self.transformer
        if self.checkpoint.transformer is not None:
            return [*(block.norm1.linear for block in self.blocks), model.proj_out_1]
        if self.spec.conditioning == "cross-attention":
            return [block.cross_attn.kv for block in self.blocks]
        if self.spec.conditioning == "in-context":
            return []
        if self.spec.observation:
            return [block.adaLN_modulation for block in self.blocks]
        return [*(block.adaLN_modulation for block in self.blocks), model.final_layer.adaLN_modulation]

    def compute_table(self, t: Tensor, labels: Tensor) -> Tensor:
        """The conditioning table ``[N, …]`` of timesteps ``[N]`` or ``[N, 2]`` and labels ``[N]``, by the conditioning
        modules alone.

        It is the table that ``observe`` gives for an evaluation of the whole network.
        """
        model = self.transformer
        with self.observe() as seen:
            if self.checkpoint.transformer is not None:
                x = torch.zeros(len(t), 1, self.spec.width, dtype=self.dtype)
                for block in self.blocks:
                    block.norm1(x, timestep=t, class_labels=labels, hidden_dtype=self.dtype)
                condition = self.blocks[0].norm1.emb(t, labels, hidden_dtype=self.dtype)
                model.proj_out_1(nn.functional.silu(condition))
            elif self.observations is not None:
                condition = model.features(t, self.observations[labels])
                for module in self._find_conditioning_modules():
                    module(condition)
            else:
                embeddings: tuple[Tensor, Tensor] = embed_times(model, t), model.y_embedder(labels)
                as_tokens = self.spec.conditioning in ("in-context", "cross-attention")
                condition = torch.stack(embeddings, dim=1) if as_tokens else embeddings[0] + embeddings[1]
                if self.spec.conditioning == "in-context":
                    seen.conditions.append(condition)
                for module in self._find_conditioning_modules():
                    module(condition)
        return self.table_from_observation(seen)

    def table_from_observation(self, seen: Observation) -> Tensor:
        """The conditions of an evaluation of N rows, arranged as a bundle's conditioning table ``[N, …]``."""
        if self.spec.conditioning == "in-context":
            return seen.conditions[0]  # (N, 2, D)
        if self.spec.conditioning == "cross-attention":
            pairs = [kv.unflatten(2, (2, -1)).transpose(1, 2) for kv in seen.conditions]  # (N, 2, 2, D) each
            table = torch.stack(pairs, dim=1)
        else:
            vectors = torch.cat(seen.conditions, dim=1)
            table = vectors.reshape(len(vectors), -1, self.spec.width)  # (N, 6·depth + 2, D)
        return table * self.table_factors.to(table.dtype)

    @contextlib.contextmanager
    def at_precision(self, dtype: torch.dtype, autoencoder: torch.dtype | None = None) -> Iterator[None]:
        """Run the modules in other dtypes inside this block; afterwards they are FP32 again, bit by bit.

        Args:
            dtype: of the network.
            autoencoder: of the autoencoder; None is the network's.
        """
        dtypes = (dtype, autoencoder or dtype)
        modules = zip((self.transformer, self.checkpoint.autoencoder), dtypes, strict=True)
        present = [(module, own) for module, own in modules if module is not None]
        pairs = [(t, own) for module, own in present for t in (*module.parameters(), *module.buffers())]
        pairs = [(tensor, own) for tensor, own in pairs if tensor.is_floating_point()]
        # FP64 holds every FP32 number, so the originals need not be kept.
        originals = [None if own == torch.float64 else tensor.data for tensor, own in pairs]
        # Tensors made in inference mode cannot replace others.
        with torch.inference_mode(False), torch.no_grad():
            for tensor, own in pairs:
                tensor.data = tensor.data.to(own)
        self.dtype, self.autoencoder_dtype = dtypes
        try:
            with _WideAccumulation() if torch.float16 in dtypes else contextlib.nullcontext():
                yield
        finally:
            self.dtype = self.autoencoder_dtype = torch.float32
            with torch.inference_mode(False), torch.no_grad():
                for (tensor, _), original in zip(pairs, originals, strict=True):
                    tensor.data = tensor.data.float() if original is None else original

    def decode(self, z: Tensor) -> Tensor:
        """Float images ``[B, 3, H, W]`` from latents, not clamped."""
        autoencoder = self.checkpoint.autoencoder
        assert autoencoder is not None
        config = autoencoder.config
        latents = 1 / config.scaling_factor * z
        if config.get("latents_std") is not None:
            latents = latents * self._per_channel(config.latents_std) + self._per_channel(config.latents_mean)
        elif config.shift_factor:
            latents = latents + config.shift_factor
        images: Tensor = autoencoder.decode(latents.to(self.autoencoder_dtype)).sample
        return images.to(z.dtype)

    def _per_channel(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=self.table_dtype)[:, None, None]  # (C, 1, 1)

    def encode(self, images: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Tensor]:
        """Mean and, with a posterior, standard deviation of uint8 images ``[B, H, W, 3]``, as the sampler's latents."""
        autoencoder = self.checkpoint.autoencoder
        assert autoencoder is not None
        scale, shift = autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0
        if autoencoder.config.get("latents_std") is not None:
            scale = scale / self._per_channel(autoencoder.config.latents_std)
            shift = self._per_channel(autoencoder.config.latents_mean)
        outside = self.table_dtype
        x = (2 * (torch.from_numpy(images).permute(0, 3, 1, 2).to(outside) / 255) - 1).to(self.autoencoder_dtype)
        if isinstance(autoencoder, AutoencoderTiny):
            return {"mean": (autoencoder.encode(x).latents.to(outside) - shift) * scale}
        posterior = autoencoder.encode(x).latent_dist
        return {"mean": (posterior.mean.to(outside) - shift) * scale, "std": posterior.std.to(outside) * scale}

    @staticmethod
    def images_from_decoded(decoded: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Images ``[B, H, W, 3]`` in uint8, as ``DiTPipeline`` and ``numpy_to_pil`` make them."""
        scaled = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
        images: np.ndarray[Any, np.dtype[np.uint8]] = (scaled * 255).round().astype("uint8")
        return images


def make_observations(spec: ModelSpec) -> Tensor:
    """The observations ``[classes, O]`` that a policy's records are of."""
    return torch.randn(spec.classes, spec.observation, generator=torch.Generator().manual_seed(0))


def official_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """The official ``get_2d_sincos_pos_embed`` ``[1, T, D]``; the grid need not be square."""
    columns, rows = np.meshgrid(np.arange(grid[1], dtype=np.float64), np.arange(grid[0], dtype=np.float64))
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    parts = []
    for position in (columns, rows):  # "here w goes first"
        out = np.einsum("m,d->md", position.reshape(-1), omega)
        parts += [np.sin(out), np.cos(out)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]


class _WideAccumulation(TorchFunctionMode):
    """FP16 products as a GPU computes them: FP16 operands and results, FP32 sums.

    On a CPU without FP16 instructions PyTorch's own FP16 products are up to a thousand times slower than FP32 products.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.linear, F.conv2d) or args[0].dtype != torch.float16:
            return func(*args, **(kwargs or {}))
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        named = {key: value.float() if isinstance(value, Tensor) else value for key, value in (kwargs or {}).items()}
        return func(*wide, **named).half()
