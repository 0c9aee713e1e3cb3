"""The sampling loop against the unpatched modules in DiTPipeline's own loop."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.commands import run_command
from support.optional import diffusers, torch

from dit_runtime import Pipeline
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.commands.info import bundle_info
from dit_runtime.core.errors import SamplingError
from dit_runtime.output.inputs import InputFiles
from dit_runtime.output.jobs import jobs_from_labels
from dit_runtime.output.request import LabelledImages, OutputRequest
from dit_runtime.verify.metrics import psnr


def reference_images(
    checkpoint: Path, labels: list[int], seeds: list[int], steps: int, guidance: float, eta: float = 0.0
) -> np.ndarray:
    """diffusers' modules and DDIM scheduler, guided with null = number of classes; one generator per image."""
    pipeline = diffusers.DiTPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
    y = torch.tensor(labels)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            cond, null = (
                pipeline.transformer(z, timestep=t.expand(len(z)), class_labels=classes).sample[:, :4]
                for classes in (y, torch.full_like(y, 10))
            )
            e = null + guidance * (cond - null)
            z = scheduler.step(e, t, z, eta=eta, generator=generators).prev_sample
        images = pipeline.vae.decode(1 / pipeline.vae.config.scaling_factor * z).sample
    images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return (images * 255).round().astype(np.uint8)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_images_are_pytorchs(checkpoint: Path, bundles: dict[str, Path], eta: float) -> None:
    """From labels and seeds to pixels: the FP32 bundle makes what diffusers makes."""
    labels, seeds = [3, 0, 9], [7, 123456789, 2**40 + 5]
    found = Pipeline(bundles["fp32"])(labels, seeds, steps=50, guidance=1.5, sampler="ddim", eta=eta)
    expected = reference_images(checkpoint, labels, seeds, 50, 1.5, eta)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert psnr(found, expected) >= 60  # measured: 87.8 dB, or no difference
    assert (difference <= 1).mean() >= 0.999


def test_fp16_images_are_close(checkpoint: Path, bundles: dict[str, Path]) -> None:
    """The FP16 bundle's images stay within 35 dB of FP32 PyTorch's."""
    found = Pipeline(bundles["fp16"])([1, 2], [1, 2], steps=50, guidance=1.5)
    assert psnr(found, reference_images(checkpoint, [1, 2], [1, 2], 50, 1.5)) >= 35  # measured: 63.9 dB


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(bundles: dict[str, Path], sampler: str) -> None:
    """One noise stream per image: alone or among others, the same seed makes the same image."""
    pipe = Pipeline(bundles["fp32"])
    together = pipe([3, 5, 5, 0], [11, 12, 13, 14], steps=10, guidance=2.0, sampler=sampler)
    for index, (label, seed) in enumerate([(3, 11), (5, 12), (5, 13), (0, 14)]):
        alone = pipe([label], [seed], steps=10, guidance=2.0, sampler=sampler)
        assert np.abs(alone[0].astype(int) - together[index].astype(int)).max() <= 1
    assert np.abs(together[1].astype(int) - together[2].astype(int)).max() > 20


def test_the_table_in_pieces_changes_nothing(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A conditioning table too large for its budget is computed in windows of timesteps, with equal results."""
    pipe = Pipeline(bundles["fp32"])
    whole = pipe([1, 2, 3], 5, steps=20, guidance=1.5, sampler="ddpm")
    row = 4 * 14 * 64
    for rows in (4, 5, 13):  # a step of three labels needs four
        monkeypatch.setattr("dit_runtime.sampling.batch.LIMITS", TableLimits(row * rows))
        assert np.array_equal(pipe([1, 2, 3], 5, steps=20, guidance=1.5, sampler="ddpm"), whole)


def test_trajectory_yields_every_step(bundles: dict[str, Path]) -> None:
    """The generator under the call yields index, latents and denoised of each step; the last latents are decoded."""
    pipe = Pipeline(bundles["fp32"])
    seen = list(pipe.trajectory(labels=["class 1", "kind 2"], seeds=[7, 8], steps=6, guidance=1.5, sampler="ddim"))
    assert [index for index, _, _ in seen] == list(range(6))
    assert all(z.shape == x.shape == (2, 4, 8, 8) and z.dtype == x.dtype == np.float32 for _, z, x in seen)
    assert not np.array_equal(seen[0][1], seen[1][1])  # kept arrays are not overwritten
    images = pipe(labels=[1, 2], seeds=[7, 8], steps=6, guidance=1.5, sampler="ddim")
    assert np.array_equal(pipe.decode(seen[-1][1]), images)
    # DDIM's last step ends at the denoised estimate itself.
    assert np.abs(seen[-1][1] - seen[-1][2]).max() <= 1e-5 * np.abs(seen[-1][1]).max()


def test_guidance_one_skips_the_null_branch(bundles: dict[str, Path]) -> None:
    """Scale 1 runs G = 1 and gives what the two-branch formula gives at scale 1."""
    pipe = Pipeline(bundles["fp32"], "onnxruntime")
    calls = []
    step = pipe.engine.session("step")
    original = step.run
    step.run = lambda inputs, outputs: calls.append(inputs["rows"].shape) or original(inputs, outputs)
    try:
        one = pipe([4], [1], steps=5, guidance=1.0)
        nearly = pipe([4], [1], steps=5, guidance=1.0000001)
    finally:
        del step.run
    assert set(calls[:5]) == {(1, 1)}
    assert set(calls[5:]) == {(2, 1)}
    assert np.abs(one.astype(int) - nearly.astype(int)).max() <= 1


class NotingEngine(OnnxRuntimeEngine):
    """Notes each call of a graph, and each graph whose memory is given back."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.noted: list[str] = []

    def session(self, graph):
        session = super().session(graph)

        def run(inputs, outputs):
            self.noted.append(graph)
            return session.run(inputs, outputs)

        return SimpleNamespace(run=run)

    def release(self, graph):
        self.noted.append(f"no {graph}")
        super().release(graph)


def test_memory_is_given_back_when_a_graph_is_done(bundles: dict[str, Path]) -> None:
    """With ``once`` the conditioner goes before the second step and the step before the decoder; a second run works."""
    engine = NotingEngine(open_bundle(bundles["fp32"]))
    pipe = Pipeline(engine._bundle, engine, once=True)
    images = pipe([3, 4], [5, 6], steps=3)
    assert engine.noted == ["conditioner", "step", "no conditioner", "step", "step", "no step", "decoder"]
    assert np.array_equal(pipe([3, 4], [5, 6], steps=3), images)
    engine.noted.clear()
    Pipeline(engine._bundle, engine)([3], steps=2)
    assert engine.noted == ["conditioner", "step", "step", "decoder"]


class SmallEngine(OnnxRuntimeEngine):
    def __init__(self, bundle, **options):
        super().__init__(bundle, **options)
        self.info = replace(self.info, max_batch=2)


class BrokenEngine(OnnxRuntimeEngine):
    """Gives NaN from its third step on."""

    count = 0

    def session(self, graph):
        session = super().session(graph)
        if graph != "step":
            return session
        outer = self

        class Broken:
            def run(self, inputs, outputs):
                outer.count += 1
                results = session.run(inputs, outputs)
                return [result * np.nan for result in results] if outer.count >= 3 else results

        return Broken()


def test_arguments_that_do_not_fit(bundles: dict[str, Path]) -> None:
    """Each wrong argument is refused before any work, with what was got and what was expected."""
    pipe = Pipeline(bundles["fp32"])
    wrong = [
        ({"labels": []}, "no labels"),
        ({"labels": [10]}, "label 10: expected 0 to 9"),
        ({"labels": [-1]}, "label -1"),
        ({"labels": ["cat"]}, "label 'cat'"),
        ({"labels": [1, 2], "seeds": [1]}, "1 seeds for 2 labels"),
        ({"labels": [1, 2], "seeds": [1, 2**64]}, r"seed 18446744073709551616: expected a whole number from -2\^63"),
        ({"labels": [1, 2], "seeds": 2**64 - 1}, "seed 18446744073709551616: expected"),
        ({"labels": [1], "seeds": 1.5}, "seed 1.5: expected"),
        ({"labels": [1], "seeds": [1.5]}, "seed 1.5: expected"),
        ({"labels": [1, 2], "seeds": "12"}, "seed '12': expected"),
        ({"labels": [1], "seeds": "1e3"}, "seed '1e3': expected"),
        ({"labels": [1], "seeds": np.array([1.0])}, "seed 1.0: expected"),
        ({"labels": None}, "label None: expected a class number or name"),
        ({"labels": 3.0}, "label 3.0: expected a class number or name"),
        ({"labels": True}, "label True: expected a class number or name"),
        ({"labels": np.array([True])}, "label True: expected a class number or name"),
        ({"labels": b"3"}, "label b'3': expected a class number or name"),
        ({"labels": {3: "much"}}, "expected distinct classes with finite weights"),
        ({"labels": [1], "steps": 2.0}, "steps 2.0: expected a whole number"),
        ({"labels": [1], "steps": True}, "steps True: expected a whole number"),
        ({"labels": [1], "steps": "2"}, "steps '2': expected a whole number"),
        ({"labels": [1], "guidance": "much"}, "guidance 'much': expected one number"),
        ({"labels": [1], "sampler": ""}, "sampler '' is unknown"),
        ({"labels": [1], "steps": 0}, "0 steps: expected 1 to 1000"),
        ({"labels": [1], "steps": 1001}, "1001 steps"),
        ({"labels": [1], "guidance": float("nan")}, "guidance nan"),
        ({"labels": [1], "guidance": -1}, "guidance -1"),
        ({"labels": [1], "guidance": 0, "sampler": "ddpm"}, "guidance 0 with sampler ddpm"),
        ({"labels": [1, 2], "guidance": [1, 2, 3]}, "3 guidance scales for 2 labels"),
        ({"labels": [1], "sampler": "plms"}, "choose one of ddim, ddpm, dpmpp-2m, .*, sde-heun"),
        ({"labels": [1], "sampler": "euler"}, "prediction type 'epsilon': expected one of ddim, ddpm"),
        ({"labels": [1], "noise": np.zeros((1, 4, 8, 7), np.float32)}, r"expected finite float32 \[1, 4, 8, 8\]"),
        ({"labels": [1], "eta": 2.0}, "eta 2"),
    ]
    for arguments, message in wrong:
        with pytest.raises(SamplingError, match=message):
            pipe.trajectory(**arguments)


def test_labels_and_seeds_in_every_form(pipe: Pipeline) -> None:
    """Lists, tuples, ranges, iterators and arrays, and one label or seed alone, which need not be Python's int."""
    for labels in ([3, 4], (3, 4), range(3, 5), iter((3, 4)), np.array([3, 4], np.uint8), ["3", "class 4"]):
        found = pipe.prepare(labels, np.int64(5), steps=np.int64(2))
        assert [(image.labels, image.seed) for image in found] == [({3: 1.0}, 5), ({4: 1.0}, 6)]
    for seeds in (5, np.array(5), np.array([5, 6], np.uint64), iter((5, 6)), range(5, 7)):
        assert [image.seed for image in pipe.prepare([3, 4], seeds, steps=2)] == [5, 6]
    assert pipe.prepare(np.array(3), -1, steps=2)[0].labels == {3: 1.0}


def test_a_batch_the_engine_cannot_take(bundles: dict[str, Path]) -> None:
    """An engine's limit is checked before the loop, and the error says which batch would fit."""
    pipe = Pipeline(bundles["fp32"])
    pipe.engine = SmallEngine(pipe.bundle)
    with pytest.raises(SamplingError, match=r"batch of 3: .* takes at most 2; .*--batch-size 2"):
        pipe([1, 2, 3])


def test_not_a_number_stops_the_loop(bundles: dict[str, Path]) -> None:
    """Latents that are no longer finite end the loop with the step's number and the engine's name."""
    pipe = Pipeline(bundles["fp32"])
    pipe.engine = BrokenEngine(pipe.bundle)
    with pytest.raises(SamplingError, match=r"not finite after step 3 of 10 on onnxruntime"):
        pipe([1], steps=10)


def test_latents_that_are_no_numbers_are_never_shown(bundles: dict[str, Path]) -> None:
    """A preview gets no NaN: an image that fails in the last step ends the trajectory before that step is yielded."""
    pipe = Pipeline(bundles["fp32"], "onnxruntime")
    session = pipe.engine.session("step")
    original, calls = session.run, []

    def run(inputs, outputs):
        calls.append(1)
        state, denoised = original(inputs, outputs)
        if len(calls) == 4:
            state = state.copy()
            state[0] = np.nan
        return [state, denoised]

    session.run = run
    try:
        seen = []
        with pytest.raises(SamplingError, match="not finite after step 4 of 4"):
            seen.extend(pipe.trajectory([1, 2], [1, 2], steps=4))
    finally:
        del session.run
    assert all(np.isfinite(latents).all() for _, latents, _ in seen)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("tile", [None, 4])
def test_pixels_that_are_no_numbers_are_never_shown(bundles: dict[str, Path], engine: str, tile: int | None) -> None:
    """Fails if an image whose pixels are not finite is returned, black, decoded whole or in tiles, among good ones."""
    pytest.importorskip(engine)
    pipe = Pipeline(bundles["fp32"], engine, threads=1)
    latents = np.random.default_rng(0).standard_normal((3, *pipe.latent_shape)).astype(np.float32)
    assert pipe.decode(latents, tile).std() > 0
    latents[1, 0, 2, 2] = np.nan
    with pytest.raises(SamplingError, match=f"decoded pixels are not finite on {engine}.*run dit-verify") as error:
        pipe.decode(latents, tile)
    assert "--keep-fp32" not in str(error.value)  # the decoder is FP32


@pytest.mark.parametrize("tile", [None, 4])
def test_a_decoder_beyond_the_range_of_fp16(bundles: dict[str, Path], tile: int | None) -> None:
    """Fails if an FP16 decoder that overflows writes black images, or the error does not name the cure."""
    latents = np.full((1, 4, 8, 8), 1e7, np.float32)
    assert Pipeline(bundles["fp32"], "onnxruntime").decode(latents, tile).any()
    with pytest.raises(SamplingError, match=r"not finite on onnxruntime .*export again with --keep-fp32 decoder"):
        Pipeline(bundles["fp16"], "onnxruntime").decode(latents, tile)


def test_the_check_of_pixels_decodes_once_and_changes_no_bit(bundles: dict[str, Path]) -> None:
    """Fails if the check of pixels decodes a second time, or the images are not the decoder's own."""
    pipe = Pipeline(bundles["fp16"], "onnxruntime", threads=1)
    session = pipe.engine.session("decoder")
    latents = np.random.default_rng(0).standard_normal((2, *pipe.latent_shape)).astype(np.float32)
    (expected,) = session.run({"latents": latents}, ["images"])
    original, calls = session.run, []

    def run(inputs, outputs):
        calls.append(outputs)
        return original(inputs, outputs)

    session.run = run
    try:
        found = pipe.decode(latents)
    finally:
        del session.run
    assert calls == [["images", "decoded"]]
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_the_defaults_of_an_old_bundle_fit_its_timesteps(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if a bundle with 50 default steps and 20 training timesteps cannot be sampled without naming the steps."""
    old = Path(shutil.copytree(bundles["fp32"], tmp_path / "old.bundle"))
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest["defaults"]["steps"] == 50
    manifest["diffusion"]["betas"] = manifest["diffusion"]["betas"][:20]
    (old / "manifest.json").write_text(json.dumps(manifest))
    pipe = Pipeline(old, "onnxruntime", threads=1)
    # diffusers' UniPC cannot run 20 leading steps of 20.
    assert [len(pipe.prepare([1], sampler=name)[0].schedule) for name in (None, "ddim", "unipc")] == [20, 20, 19]
    assert pipe([1]).shape == (1, 32, 32, 3)
    with pytest.raises(SamplingError, match="50 steps: expected 1 to 20"):
        pipe([1], steps=50)
    assert bundle_info(pipe.bundle)["defaults"]["steps"] == 20
    done = run_command("dit-sample", old, "--write-table", tmp_path / "table.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ddim, 20 steps" in done.stdout


def test_one_label_is_one_image(bundles: dict[str, Path]) -> None:
    """Fails if text is taken letter by letter, or a mixture class by class, for the labels of several images."""
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    for label, weights in (("class 3", {3: 1.0}), ("7", {7: 1.0}), (4, {4: 1.0}), ({3: 0.7, 5: 0.3}, {3: 0.7, 5: 0.3})):
        assert [image.labels for image in pipe.prepare(label)] == [weights]
        assert [image.labels for image in pipe.prepare([label, label])] == [weights] * 2
    with pytest.raises(SamplingError, match="label 33: expected 0 to 9"):
        pipe.prepare("33")
    inputs, output = InputFiles(None, None, None), OutputRequest(Path("x.png"))
    assert jobs_from_labels(pipe, LabelledImages("7", settings={"steps": 1}), inputs, output).count == 1
    (job,) = jobs_from_labels(pipe, LabelledImages("7+3", settings={"steps": 1}), inputs, output).each
    assert [image.labels for image in job.batch] == [{7: 0.5, 3: 0.5}]
