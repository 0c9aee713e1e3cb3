"""Train a small policy to reach a goal around an obstacle, and compare engine and PyTorch on the same episodes.

    python benchmarks/policy/reach.py

The task is two-dimensional and in NumPy: a point goes to a goal, and a disc that may lie between must not be touched.
The teacher passes it on the nearer side, and on one that it draws where the disc is in the middle of the way: one
observation then has two right answers, and their mean is a wrong one. The network is lerobot's multi-task DiT, small,
trained by DDPM with lerobot's defaults (cosine betas of 100 steps, epsilon, clip) and sampled by DDIM in 10 steps.
Episodes are run in pairs: the same start, goal, disc and noise for PyTorch and for each engine, whose rungs have
passed. The figures go to ``reach.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from dit_export import export, verify
from dit_export.checkpoints.random_weights import randomize
from dit_export.reference.policy_model import PolicyDiT
from numpy.typing import NDArray
from safetensors.torch import save_file

from dit_runtime import Policy
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.environment import describe_environment

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Act = Callable[[Float32, int], Float32]  # observations [B, 11] and the number of the plan → actions [B, HORIZON, 2]

RADIUS, MARGIN, SPEED, NEAR = 0.12, 0.1, 0.05, 0.05
HEAD_ON = 0.03  # the teacher takes either side of a disc that is so near to the middle of its way
HORIZON, EXECUTED, LENGTH = 8, 4, 60  # actions of a plan, how many are executed, and the most of an episode
OBSERVATION = 11
STEPS, BASE, BATCH = 10, 10000.0, 128
SPEC = ModelSpec(
    conditioning="adaln-zero",
    latent_channels=2,
    latent_size=(1, HORIZON),
    patch_size=1,
    width=64,
    depth=3,
    heads=4,
    mlp_width=256,
    classes=16,
    learned_variance=False,
    has_null=False,
    rotary=True,
    observation=OBSERVATION,
    time_width=32,
)
PROCESS = {
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
}


def make_episodes(count: int, seed: int) -> tuple[Float64, Float64, Float64]:
    """Starts, goals and discs ``[N, 2]``; the disc lies near the way."""
    random = np.random.default_rng(seed)
    start, goal = random.uniform(-1, 1, (2, count, 2))
    far = np.linalg.norm(goal - start, axis=1) < 0.8
    goal[far] = start[far] + 0.8 * np.sign(-start[far] + 1e-9) / np.sqrt(2)
    share = random.uniform(0.35, 0.65, (count, 1))
    disc = start + share * (goal - start) + random.normal(0, 0.08, (count, 2))
    return start, goal, disc


def teach(position: Float64, goal: Float64, disc: Float64, side: Float64) -> Float64:
    """The teacher's action ``[N, 2]``, of length ``SPEED`` at most: straight on, or along the disc.

    ``side`` is the one that it takes of a disc in the middle of its way.
    """
    ahead, aside = goal - position, disc - position
    way = np.linalg.norm(ahead, axis=1, keepdims=True)
    unit = ahead / np.maximum(way, 1e-9)
    along = np.sum(aside * unit, axis=1, keepdims=True)
    across = np.linalg.norm(aside - along * unit, axis=1, keepdims=True)
    blocked = (along > 0) & (along < way) & (across < RADIUS + MARGIN)
    cross = unit[:, 0] * aside[:, 1] - unit[:, 1] * aside[:, 0]  # above 0 where the disc lies to the left
    turn = np.where(np.abs(cross) < HEAD_ON, side, -np.sign(cross))
    normal = np.stack([-unit[:, 1], unit[:, 0]], axis=1) * turn[:, None]
    to_tangent = disc + normal * (RADIUS + 2 * MARGIN) - position
    target = np.where(blocked, to_tangent, ahead)
    length = np.linalg.norm(target, axis=1, keepdims=True)
    return np.asarray(target / np.maximum(length, 1e-9) * np.minimum(length, SPEED))


def observe(position: Float64, goal: Float64, disc: Float64, last: Float64) -> Float32:
    """The observation ``[N, 11]``, by hand in place of a trained encoder: goal and disc as they lie from the point."""
    ahead, aside = goal - position, disc - position
    way = np.linalg.norm(ahead, axis=1, keepdims=True)
    unit = ahead / np.maximum(way, 1e-9)
    along = np.sum(aside * unit, axis=1, keepdims=True)
    across = (unit[:, :1] * aside[:, 1:] - unit[:, 1:] * aside[:, :1]) / RADIUS
    near = np.minimum(way, 4 * SPEED) / SPEED - 2
    return np.concatenate([ahead, unit, near, aside, along, across, last / SPEED], axis=1).astype(np.float32)


def demonstrate(count: int, seed: int) -> tuple[Float32, Float32]:
    """The teacher's episodes as pairs: observations ``[M, 11]`` and the next actions ``[M, HORIZON, 2]`` over SPEED."""
    position, goal, disc = make_episodes(count, seed)
    side = np.random.default_rng(seed + 1).choice([-1.0, 1.0], count)
    seen, done, last = [], [], np.zeros((count, 2))
    for _ in range(LENGTH + HORIZON):
        seen.append(observe(position, goal, disc, last))
        last = teach(position, goal, disc, side)
        done.append(last)
        position = position + last
    actions = np.stack(done, axis=1) / SPEED
    chunks = [actions[:, step : step + HORIZON] for step in range(LENGTH)]
    return np.concatenate(seen[:LENGTH]), np.concatenate(chunks).astype(np.float32)


def train(steps: int, seed: int) -> PolicyDiT:
    """The network after ``steps`` of Adam on the noise's mean square error; the average of its weights."""
    torch.manual_seed(seed)
    observations, actions = (torch.from_numpy(each) for each in demonstrate(1500, seed))
    network = PolicyDiT(SPEC, BASE, has_positions=False)
    randomize(network, seed)
    for block in network.transformer_blocks:
        for parameter in block.adaLN_modulation.parameters():
            torch.nn.init.zeros_(parameter)
    scheduler = DDPMScheduler(**PROCESS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    for step in range(steps):
        index = torch.randint(len(actions), (BATCH,))
        clean, noise, t = actions[index], torch.randn(BATCH, HORIZON, 2), torch.randint(100, (BATCH,))
        loss = (network(scheduler.add_noise(clean, noise, t), t, observations[index]) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        share = min(0.995, (step + 1) / (step + 10))
        for name, tensor in network.state_dict().items():
            average[name].lerp_(tensor, 1 - share)
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    network.load_state_dict(average)
    return network.eval()


def save(network: PolicyDiT, folder: Path) -> Path:
    """The network as lerobot saves a policy."""
    folder.mkdir()
    save_file(
        {f"noise_predictor.{name}": each for name, each in network.state_dict().items()}, folder / "model.safetensors"
    )
    config = {
        "type": "multi_task_dit",
        "objective": "diffusion",
        "noise_scheduler_type": "DDIM",
        "num_inference_steps": STEPS,
        "horizon": HORIZON,
        "num_heads": SPEC.heads,
        "rope_base": BASE,
        "use_rope": True,
        **PROCESS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def seeds_of(count: int, plan: int) -> list[int]:
    return [1000 * episode + plan for episode in range(count)]


def act_in_pytorch(network: PolicyDiT) -> Act:
    """lerobot's loop around the network, with diffusers' scheduler; the noise is that of the engine's seeds."""
    scheduler: Any = DDIMScheduler(**PROCESS)

    def act(observations: Float32, plan: int) -> Float32:
        drawn = [
            torch.randn(2, HORIZON, generator=torch.Generator().manual_seed(s))
            for s in seeds_of(len(observations), plan)
        ]
        x, given = torch.stack(drawn).transpose(1, 2), torch.from_numpy(observations)
        scheduler.set_timesteps(STEPS)
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t.repeat(len(x)), given), t, x).prev_sample
        found: Float32 = x.numpy()
        return found

    return act


def act_on_engine(policy: Policy) -> Act:
    return lambda observations, plan: policy(observations, seeds_of(len(observations), plan))


def run_episodes(act: Act, count: int, seed: int) -> tuple[NDArray[np.bool_], Float64]:
    """Whether each episode succeeds, and its path ``[N, T, 2]``."""
    position, goal, disc = make_episodes(count, seed)
    last, path = np.zeros((count, 2)), [position]
    reached, touched = np.zeros(count, bool), np.zeros(count, bool)
    for plan in range(LENGTH // EXECUTED):
        actions = act(observe(position, goal, disc, last), plan)[:, :EXECUTED].astype(np.float64) * SPEED
        for step in range(EXECUTED):
            last = np.where(reached[:, None], 0, actions[:, step])
            position = position + last
            path.append(position)
            touched |= ~reached & (np.linalg.norm(position - disc, axis=1) < RADIUS)
            reached |= np.linalg.norm(position - goal, axis=1) < NEAR
    return reached & ~touched, np.stack(path, axis=1)


def interval_of(values: Float64, seed: int = 0) -> list[float]:
    """The 95 % bootstrap interval of a mean over episodes."""
    random = np.random.default_rng(seed)
    means = values[random.integers(0, len(values), (2000, len(values)))].mean(axis=1)
    return [round(float(each), 4) for each in np.percentile(means, [2.5, 97.5])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("reach.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # a model this small would spend more time on waiting for threads than on computing
    start = time.perf_counter()
    network = train(args.steps, args.seed)
    trained = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        source = save(network, Path(folder) / "reach")
        engines = {}
        for precision in ("fp32", "fp16"):
            bundle = Path(folder) / f"{precision}.bundle"
            export(source, bundle, precision=precision, verify=False)
            (checked,) = verify(bundle, "onnxruntime", quick=True)
            if not checked.passed:
                raise SystemExit(f"{precision}: {[rung.name for rung in checked.rungs if not rung.passed]}")
            engines[precision] = Policy(bundle, engine="onnxruntime")
        runs = {"pytorch": act_in_pytorch(network), **{name: act_on_engine(each) for name, each in engines.items()}}
        found = {name: run_episodes(act, args.episodes, args.seed + 100) for name, act in runs.items()}
        names = {name: each.engine.info.name for name, each in engines.items()}
    own, path = found["pytorch"]
    report: dict[str, Any] = {
        "training": {
            "steps": args.steps,
            "seconds": round(trained, 1),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "episodes": args.episodes,
        "sampler": f"ddim, {STEPS} steps, clip {PROCESS['clip_sample_range']}",
        "pytorch": {"success": float(own.mean()), "interval": interval_of(own.astype(float))},
        "environment": describe_environment(1),
    }
    for name in engines:
        success, other = found[name]
        difference = success.astype(float) - own
        report[name] = {
            "engine": names[name],
            "success": float(success.mean()),
            "difference": float(difference.mean()),
            "interval_of_difference": interval_of(difference) if difference.any() else [0.0, 0.0],
            "episodes_that_differ": int((success != own).sum()),
            "largest_distance_of_paths": float(np.linalg.norm(other - path, axis=2).max()),
        }
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in ("training", "pytorch", *engines)}, indent=1))


if __name__ == "__main__":
    main()
