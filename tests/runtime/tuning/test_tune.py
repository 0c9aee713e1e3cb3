"""Few-step tables of the tiny bundle: better than named samplers, and used for what they were fitted for."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.bundles import signed
from support.commands import run_command

from dit_runtime import Pipeline, open_bundle, read_table, tune, write_table
from dit_runtime.backends import host_loop
from dit_runtime.core import replace as replacing
from dit_runtime.core.errors import ParityError, SamplingError
from dit_runtime.samplers.guidance import Guidance
from dit_runtime.sampling.tables import describe_difference
from dit_runtime.tuning import teacher
from dit_runtime.tuning import tune as tuning
from dit_runtime.tuning.request import TuneRequest
from dit_runtime.tuning.tune import Tuned
from dit_runtime.verify.metrics import psnr

STEPS, TEACHER = 4, 24
SETTINGS = {"teacher": ("ddim", TEACHER), "pictures": 8, "guidance": (1.5,)}


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with an engine store of its own."""
    folder = tmp_path_factory.mktemp("tune") / "tiny.bundle"
    return Path(shutil.copytree(bundles["fp32"], folder, ignore=shutil.ignore_patterns("engines")))


@pytest.fixture(scope="module")
def own_pipe(bundle: Path) -> Pipeline:
    return Pipeline(bundle, "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def tuned(own_pipe: Pipeline) -> Tuned:
    return tune(own_pipe, STEPS, **SETTINGS)


@pytest.fixture
def table(tuned: Tuned, tmp_path: Path) -> Path:
    write_table(tuned.schedule, tmp_path / "few.json")
    return tmp_path / "few.json"


def test_a_table_beats_ddim_on_other_images(own_pipe: Pipeline, tuned: Tuned) -> None:
    """Judged anew with the pipeline alone, on seeds and labels that no fit saw."""
    labels, seeds = list(range(10)), list(range(500, 510))
    wanted = own_pipe(labels, seeds, sampler="ddim", steps=TEACHER, guidance=1.5)
    few = own_pipe(labels, seeds, sampler=tuned.schedule, guidance=1.5)
    named = own_pipe(labels, seeds, sampler="ddim", steps=STEPS, guidance=1.5)
    assert tuned.schedule.steps == len(tuned.schedule) == STEPS
    assert psnr(few, wanted) > psnr(named, wanted) + 3


def test_the_figures_are_those_of_the_held_out_images(own_pipe: Pipeline, tuned: Tuned) -> None:
    """The record's PSNR, again from plain calls: the second half of the seeds, with the labels of the first."""
    fitted = tuned.schedule.fitted
    assert fitted is not None
    labels, seeds = list(fitted.labels), list(range(4, 8))
    assert len(labels) == fitted.held_out.pictures == 4
    wanted = own_pipe(labels, seeds, sampler="ddim", steps=TEACHER, guidance=1.5)
    found = own_pipe(labels, seeds, sampler=tuned.schedule, guidance=1.5)
    assert psnr(found, wanted) == pytest.approx(fitted.held_out.psnr_db, abs=0.01)
    assert fitted.held_out.psnr_low_db <= fitted.held_out.psnr_db <= fitted.held_out.psnr_high_db
    best = tuned.judgement.named[0]
    name, spacing = best.name.split()
    rival = own_pipe(labels, seeds, sampler=name, spacing=spacing, steps=STEPS, guidance=1.5)
    assert psnr(rival, wanted) == pytest.approx(best.psnr_db, abs=0.01)
    assert {each.name.split()[0] for each in tuned.judgement.named} == {"ddim", "dpmpp-2m", "dpmpp-3m", "unipc"}


def test_a_table_comes_back_whole(tuned: Tuned, table: Path) -> None:
    again = read_table(table)
    assert again.fitted == tuned.schedule.fitted
    np.testing.assert_array_equal(again.coefficients, tuned.schedule.coefficients)
    assert again.sampler == "few-4"


def test_a_named_samplers_table_has_no_record(own_pipe: Pipeline, tmp_path: Path) -> None:
    """Files of named samplers are as they were before there was a record."""
    schedule = own_pipe.prepare([1], steps=3)[0].schedule
    write_table(schedule, tmp_path / "t.json")
    assert "fitted" not in json.loads((tmp_path / "t.json").read_text())


def test_another_bundle_is_refused(bundles: dict[str, Path], tuned: Tuned) -> None:
    other = Pipeline(bundles["fp16"], "onnxruntime", threads=1)
    with pytest.raises(SamplingError, match="was fitted to bundle"):
        other([1], sampler=tuned.schedule, guidance=1.5)


def test_another_use_is_said_once(own_pipe: Pipeline, tuned: Tuned, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dit_runtime")
    own_pipe.prepare([1], sampler=tuned.schedule, guidance=1.5)
    assert not caplog.records
    for _ in range(2):
        own_pipe.prepare([1], sampler=tuned.schedule, guidance=4.0, guidance_interval=(0.1, 0.9))
    (record,) = caplog.records
    assert "guidance 4 and another guidance interval" in record.message


def test_another_size_or_an_image_is_said(own_pipe: Pipeline, tuned: Tuned, caplog: pytest.LogCaptureFixture) -> None:
    """At full strength an image is only a start; later, a row would read a past output that no row wrote."""
    caplog.set_level(logging.INFO, "dit_runtime")
    image = np.zeros((4, 8, 8), np.float32)
    own_pipe.prepare([1], sampler=tuned.schedule, guidance=1.5, init=image, strength=1.0)
    assert "is used with an image to start from" in caplog.text
    with pytest.raises(SamplingError, match="which only skipped rows write"):
        own_pipe.prepare([1], sampler=tuned.schedule, guidance=1.5, init=image, strength=0.5)
    fitted, manifest = tuned.schedule.fitted, own_pipe.manifest
    assert fitted is not None
    line = describe_difference(replace(fitted, size=(48, 48)), manifest, [Guidance(1.5)], from_image=False)
    assert line is not None
    assert "at 48x48 from noise, and is used with size 32x32: its images may be further" in line


def test_a_velocity_model(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The teacher is Heun, and the table nearer to it than Euler and Heun of as many evaluations."""
    path = shutil.copytree(bundles["fp32"], tmp_path / "flow.bundle", ignore=shutil.ignore_patterns("engines"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["diffusion"].update(betas=[], prediction_type="velocity", path="linear")
    manifest["defaults"]["sampler"] = "heun"
    (path / "manifest.json").write_text(json.dumps(manifest))
    pipe = Pipeline(signed(path), "onnxruntime", threads=1)
    fast = tuning.fit_table(pipe, TuneRequest(4, pictures=8, guidance=(1.5,)))
    assert fast.schedule.fitted is not None
    assert fast.schedule.fitted.teacher == "heun:100"
    assert {each.name for each in fast.judgement.named} == {"euler", "heun"}
    assert fast.judgement.table.psnr_db > fast.judgement.named[0].psnr_db + 3


def test_it_shares_a_batch_with_other_samplers(own_pipe: Pipeline, tuned: Tuned) -> None:
    """Continuous batching: the same latents as alone."""
    few = own_pipe.prepare([3, 4], [8, 9], sampler=tuned.schedule, guidance=1.5)
    other = own_pipe.prepare([5], [10], sampler="dpmpp-2m", steps=6)
    found = dict(own_pipe.stream([*few, *other], batch_size=3))
    alone = own_pipe.sample_latents(few)
    np.testing.assert_allclose(np.stack([found[0], found[1]]), alone, atol=1e-5)


def test_a_teacher_may_have_a_spacing(bundle: Path, tmp_path: Path) -> None:
    """The command takes it as a third word, and the record has it."""
    words = ("--steps", "3", "--teacher", "dpmpp-2m:12:karras", "--pictures", "4", "--guidance", "1.5", "--json")
    done = run_command("dit-tune", bundle, *words, "--engine", "onnxruntime", "-o", tmp_path / "few.json")
    assert done.returncode == 0, done.stderr
    fitted = json.loads(done.stdout)["fitted"]
    assert (fitted["teacher"], fitted["teacher_spacing"]) == ("dpmpp-2m:12", "karras")


def test_the_teacher_runs_once(own_pipe: Pipeline, tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another step count takes the teacher's latents from the store, unless a bit of them changed."""
    ran = []
    steps = Pipeline.iterate_steps
    monkeypatch.setattr(Pipeline, "iterate_steps", lambda self, images: ran.append(1) or steps(self, images))
    tuning.fit_table(own_pipe, TuneRequest(2, **SETTINGS))
    assert not ran
    for file in own_pipe.bundle.engines.glob("tune/*/states.npy"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    again = tuning.fit_table(own_pipe, TuneRequest(STEPS, **SETTINGS))
    assert ran
    np.testing.assert_array_equal(again.schedule.coefficients, tuned.schedule.coefficients)


def test_an_interrupted_teacher_goes_on(own_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, tuned: Tuned) -> None:
    """Batches that were done before Ctrl-C are not run again."""
    request = TuneRequest(2, **{**SETTINGS, "seed": 77}, batch_size=3)
    ran = []
    steps = Pipeline.iterate_steps

    def stop_in_the_second(self: Pipeline, images: object) -> object:
        ran.append(1)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return steps(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "iterate_steps", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        tuning.fit_table(own_pipe, request)
    tuning.fit_table(own_pipe, request)
    assert len(ran) == 4  # three batches, and the second one twice


def test_a_store_that_cannot_be_written_is_said(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, tuned: Tuned
) -> None:
    """The fit goes on without it: the table is the same."""
    (tmp_path / "file").touch()
    pipe = Pipeline(open_bundle(bundle, tmp_path / "file"), "onnxruntime", threads=1)
    caplog.set_level(logging.INFO, "dit_runtime")
    again = tuning.fit_table(pipe, TuneRequest(STEPS, **SETTINGS))
    assert "cannot be kept" in caplog.text
    np.testing.assert_array_equal(again.schedule.coefficients, tuned.schedule.coefficients)


def test_old_states_make_room(own_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, tuned: Tuned) -> None:
    """The store keeps no more than its bound, and always what was written last."""
    monkeypatch.setattr(teacher, "MOST_KEPT_BYTES", 1)
    tuning.fit_table(own_pipe, TuneRequest(1, **{**SETTINGS, "seed": 5}))
    assert len(list(own_pipe.bundle.engines.glob("tune/*/states.npy"))) == 1


def test_a_table_of_several_scales_serves_each(own_pipe: Pipeline) -> None:
    """Half of the images have each scale, in both halves."""
    pooled = tuning.fit_table(own_pipe, TuneRequest(3, **{**SETTINGS, "guidance": (1.0, 3.0)}))
    assert pooled.schedule.fitted is not None
    assert pooled.schedule.fitted.guidance == (1.0, 3.0)
    assert pooled.is_best


def test_a_named_sampler_that_is_better_wins(own_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that is spoiled: no table, and the sampler's name."""
    monkeypatch.setattr(tuning, "PULL", 1e9)
    monkeypatch.setattr(tuning, "search_positions", lambda fit, start, *_: start)
    monkeypatch.setattr(tuning, "path_positions", lambda grid, states, starts, pull: starts[0])
    monkeypatch.setattr(tuning, "refine_rows", lambda network, grid, states, *fitted: fitted)
    with pytest.raises(ParityError, match="so the table is not used; fit more --pictures, or sample with"):
        tune(own_pipe, STEPS, **SETTINGS)


def test_the_command_without_a_better_table(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 and no file; the figures are printed all the same."""
    monkeypatch.setattr(Tuned, "is_best", False)
    words = ("--steps", "2", "--teacher", "ddim:24", "--pictures", "8", "--guidance", "1.5", "--json")
    engine = ("--engine", "onnxruntime", "--threads", "1")
    done = run_command("dit-tune", bundle, *words, *engine, "-o", tmp_path / "few.json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["file"] is None
    assert "so the table is not used" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": ("ddpm", 50)}, "teacher ddpm of 50 steps: it uses the learned variance"),
        ({"teacher": ("dpmpp-2m-sde", 20)}, "it draws noise in its steps"),
        ({"teacher": ("euler-ancestral", 20)}, "it draws noise in its steps"),
        ({"teacher": ("ddim", STEPS)}, "the teacher has 4; expected fewer than it has"),
        ({"teacher": ("ddim", 2000)}, "2000 steps: expected 1 to 1000"),
        ({"teacher": ("dopri5", 20)}, "is adaptive"),
        ({"teacher": ("heun", 20)}, "sampler heun with a model of prediction type 'epsilon'"),
        ({"pictures": 1}, "1 pictures to fit a table: expected 4 to 4096; half of them are held out"),
        ({"pictures": 4096, "teacher": ("ddim", 1000)}, "their latents take 4004 MiB, expected at most 1024"),
        ({"labels": ()}, "no labels: expected at least one"),
        ({"labels": (11,)}, "11"),
        ({"guidance": ()}, "no guidance scale"),
        ({"guidance": (-1.0,)}, "guidance -1.0"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance interval"),
        ({"batch_size": 0}, "a batch of 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(own_pipe: Pipeline, settings: dict[str, object], message: str) -> None:
    with pytest.raises(SamplingError) as caught:
        tune(own_pipe, STEPS, **{**SETTINGS, **settings})
    assert message in str(caught.value)


def test_a_teacher_that_is_not_finite_is_named(own_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of a broken engine: the message of sampling, and nothing is kept."""
    monkeypatch.setattr(host_loop, "state_from_latents", lambda latents: np.full((8, 3, 4, 8, 8), np.nan, np.float32))
    request = TuneRequest(2, **{**SETTINGS, "seed": 99}, batch_size=8)
    before = set(own_pipe.bundle.engines.glob("tune/*"))
    with pytest.raises(SamplingError, match="latents are not finite after step 1 of 24"):
        tuning.fit_table(own_pipe, request)
    assert set(own_pipe.bundle.engines.glob("tune/*")) == before


def test_a_network_that_is_not_finite_is_named(
    own_pipe: Pipeline, tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image of several, while the teacher's latents are known already: said where it comes from."""
    request = TuneRequest(1, **{**SETTINGS, "seed": 3})
    tuning.fit_table(own_pipe, request)
    run = host_loop.HostLoop._run

    def spoil(self: host_loop.HostLoop, *arguments: np.ndarray) -> object:
        result = run(self, *arguments)
        result.state[1] = np.nan
        return result

    monkeypatch.setattr(host_loop.HostLoop, "_run", spoil)
    with pytest.raises(SamplingError, match="latents are not finite"):
        tuning.fit_table(own_pipe, request)


def test_the_command(bundle: Path, tuned: Tuned, tmp_path: Path) -> None:
    """Fits, prints every named sampler beside the table, and writes a table that dit-sample takes."""
    output = tmp_path / "few.json"
    words = ("--steps", "4", "--teacher", "ddim:24", "--pictures", "8", "--guidance", "1.5", "--engine", "onnxruntime")
    done = run_command("dit-tune", bundle, *words, "-o", output, "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(" dB (") == len(tuned.judgement.named)
    np.testing.assert_array_equal(read_table(output).coefficients, tuned.schedule.coefficients)
    sampled = run_command(
        *("dit-sample", bundle, "--labels", "1", "--sampler", output, "--guidance", "2", "--engine", "onnxruntime"),
        *("-o", tmp_path / "image.png", "--threads", "1"),
    )
    assert sampled.returncode == 0
    assert sampled.stderr.count("is used with guidance 2") == 1
    assert "few-4 4 steps" in sampled.stdout
    again = run_command(
        *("dit-sample", bundle, "--from-image", tmp_path / "image.png", "--sampler", output, "-o", tmp_path / "b.png"),
        *("--engine", "onnxruntime"),
    )
    assert "the same as" in again.stdout


def test_the_command_as_json_until_a_level(bundle: Path, tmp_path: Path) -> None:
    words = ("--until", "20dB", "--teacher", "ddim:24", "--pictures", "8", "--guidance", "1.5", "--json")
    done = run_command(
        "dit-tune", bundle, *words, "--engine", "onnxruntime", "--threads", "1", "-o", tmp_path / "few.json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["table"]["psnr_db"] >= 20
    assert found["steps"] == read_table(tmp_path / "few.json").steps == len(found["timesteps"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", "4", "--until", "40dB"), "not allowed with argument"),
        (("--steps", "0"), "expected a whole number from 1"),
        (("--until", "200dB"), "expected a PSNR above 0 and below 100"),
        (("--steps", "4", "--teacher", "ddim"), "expected SAMPLER:STEPS, such as ddim:200"),
        (("--steps", "4", "--pictures", "1"), "1 pictures to fit a table"),
        (("--steps", "4", "-o", "/dev/null/few.json"), "cannot be written to; choose another --output"),
        (("--steps", "4", "--size", "64x64"), "64x64"),
        (("--steps", "4", "-o", "few"), "expected a file NAME.json, which --sampler takes"),
        (("--steps", "4", "-o", "/"), "/: is a folder; expected a file NAME.json"),
    ],
)
def test_the_command_refuses(bundle: Path, words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run_command("dit-tune", bundle, "--engine", "onnxruntime", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_table(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything was computed; the table cannot be written: one line, and nothing half-written."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replacing.os, "fsync", full)
    words = ("--steps", "4", "--teacher", "ddim:24", "--pictures", "8", "--guidance", "1.5", "--engine", "onnxruntime")
    done = run_command("dit-tune", bundle, *words, "-o", tmp_path / "few.json", "--threads", "1")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_dit_verify_replays_a_table(bundle: Path, table: Path, bundles: dict[str, Path]) -> None:
    """Both rungs on the engine that fitted it; JSON has them too; another bundle's table is refused."""
    words = ("--sampler", table, "--engine", "onnxruntime")
    done = run_command("dit-verify", bundle, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[2:]] == [
        "few-4 teacher-forced",
        "few-4 free-running",
    ]
    found = json.loads(run_command("dit-verify", bundle, *words, "--json").stdout)
    assert found["passed"]
    assert len(found["rungs"]) == 2
    assert "was fitted to bundle" in run_command("dit-verify", bundles["fp16"], *words).stderr
    assert "--sampler takes" in run_command("dit-verify", bundle, *words, "--quick").stderr


def test_dit_verify_sees_a_loop_that_loses_a_past_output(
    bundle: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slot s₂, which only the last of the four numbers reads, is a thousandth off."""
    run = host_loop.HostLoop._run

    def lose(self: host_loop.HostLoop, *arguments: np.ndarray) -> object:
        result = run(self, *arguments)
        result.state[:, 2] *= np.float32(0.999)
        return result

    monkeypatch.setattr(host_loop.HostLoop, "_run", lose)
    done = run_command("dit-verify", bundle, "--sampler", table, "--engine", "onnxruntime")
    assert done.returncode == 1
    assert "few-4 teacher-forced fails on onnxruntime" in done.stderr
