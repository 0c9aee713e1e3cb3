"""Continuous batching and the conditioning table: nothing that is shared between images shows in any of them."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import ROW, marked, mixed
from support.engines import info_of
from support.guidance import Wanted, constant, recorded, reference_latents, relative, within
from support.optional import torch
from support.schedules import LEARNED

from dit_runtime import Bundle, Pipeline, Schedule, open_bundle
from dit_runtime.backends.base import Array
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.manifest import Manifest, ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.sampling.batch import LIMITS, Batch
from dit_runtime.sampling.requests import ImageRequest

# Relative to the largest latent. Measured: 0 on ONNX Runtime with one thread, where no product depends on the batch.
ALONE_LIMIT = 1e-5
REFERENCE_LIMIT = 2e-5  # measured: 6.1e-6

NULL = 10
XL = replace(LEARNED, width=1152, depth=28, heads=16, mlp_width=4608, classes=1000)
XL_ROW = 4 * (6 * 28 + 2) * 1152


@contextmanager
def conditioned(pipe: Pipeline) -> Iterator[list[tuple[float, int]]]:
    """(timestep, label) of each row that the conditioner computes while the block runs."""
    session, pairs = pipe.engine.session("conditioner"), []
    original = session.run

    def run(inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
        pairs.extend(zip(inputs["timesteps"].tolist(), inputs["labels"].tolist(), strict=True))
        return original(inputs, outputs)

    session.run = run
    try:
        yield pairs
    finally:
        del session.run


def batch_sizes(lengths: Sequence[int], most: int) -> list[int]:
    """How many images each call has, if a free position is filled at once."""
    waiting, running, sizes = list(lengths), [], []
    while waiting or running:
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
        sizes.append(len(running))
        running = [left - 1 for left in running if left > 1]
    return sizes


def test_images_of_a_stream_are_those_made_alone(pipe: Pipeline) -> None:
    """Fails if an image takes rows, noise, memory or guidance of its neighbours, or of an earlier image there."""
    images = mixed(pipe)
    alone = []
    for image in images:
        ((index, latents),) = pipe.stream([image], 1)
        assert index == 0
        alone.append(latents)
    with recorded(pipe) as calls:
        finished = list(pipe.stream(images, 3))
    assert sorted(index for index, _ in finished) == list(range(9))
    assert [size for _, size in calls] == batch_sizes([len(image.schedule) for image in images], 3)
    for index, latents in finished:
        assert latents.shape == (4, 8, 8)
        assert relative(latents, alone[index]) <= ALONE_LIMIT, f"image {index}"
    distinct = {latents.tobytes() for latents in alone}
    assert len(distinct) == 9


def test_a_stream_is_the_reference(pipe: Pipeline, transformer: Any) -> None:
    """Fails if images that join a running batch differ from diffusers' modules, whatever they are alone."""
    asked = [
        (Wanted({3: 1.0}, 70, constant(1.0)), {"sampler": "ddim", "steps": 7}),
        (Wanted({0: 1.0}, 71, constant(2.5)), {"sampler": "ddpm", "steps": 5}),
        (Wanted({9: 1.0}, 72, within(0.2, 0.8, constant(4.0))), {"sampler": "ddim", "steps": 10}),
        (Wanted({3: 0.7, 5: 0.3}, 73, constant(2.0)), {"sampler": "ddpm", "steps": 4}),
        (Wanted({6: 1.0}, 74, constant(2.5)), {"sampler": "ddim", "steps": 6, "eta": 0.7}),
    ]
    guidance = [1.0, 2.5, 4.0, 2.0, 2.5]
    images = [
        pipe.prepare(
            [dict(wanted.labels)],
            [wanted.seed],
            guidance=scale,
            guidance_interval=(0.2, 0.8) if wanted.seed == 72 else (0.0, 1.0),
            **sampling,
        )[0]
        for (wanted, sampling), scale in zip(asked, guidance, strict=True)
    ]
    for index, latents in pipe.stream(images, 2):
        wanted, sampling = asked[index]
        assert relative(latents[None], reference_latents(transformer, [wanted], **sampling)) <= REFERENCE_LIMIT


def test_a_generator_of_images_is_not_drained(pipe: Pipeline) -> None:
    """Fails if a stream takes more images than its batch has positions: a million would fill the memory."""
    taken, finished = 0, 0

    def images() -> Iterator[ImageRequest]:
        nonlocal taken
        for seed in range(7):
            taken += 1
            assert taken - finished <= 3
            yield from pipe.prepare([seed], seed, sampler="ddim", steps=2 + seed % 3, guidance=1.0)

    stream = pipe.stream(images(), 3)
    assert taken == 0
    for _ in stream:
        finished += 1
    assert taken == finished == 7
    assert list(pipe.stream(iter([]), 3)) == []


def test_a_batch_larger_than_the_engines(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a stream asks an engine for more images than it takes."""
    monkeypatch.setattr(pipe.engine, "info", replace(pipe.engine.info, max_batch=2))
    images = pipe.prepare([1, 2, 3], steps=2, sampler="ddim", guidance=1.0)
    with pytest.raises(SamplingError, match=r"a batch of 3: .* takes at most 2"):
        next(pipe.stream(images, 3))
    assert len(list(pipe.stream(images, 2))) == 3


@pytest.mark.parametrize("rows", [7, 9, 40])
def test_a_small_table_changes_nothing(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Fails if a table that has to be dropped and filled again gives another row, or grows beyond its bound."""
    images = mixed(pipe)
    whole = {index: latents.tobytes() for index, latents in pipe.stream(images, 3)}
    monkeypatch.setattr("dit_runtime.sampling.batch.LIMITS", TableLimits(ROW * rows))
    step, sizes = pipe.engine.session("step"), []
    original = step.run
    step.run = lambda inputs, outputs: sizes.append(inputs["modulation"].nbytes) or original(inputs, outputs)
    try:
        pieces = {index: latents.tobytes() for index, latents in pipe.stream(images, 3)}
    finally:
        del step.run
    assert pieces == whole
    assert max(sizes) <= ROW * rows


def test_a_batch_that_needs_more_rows_than_fit(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a batch whose one call needs more rows than the bound allows is not refused with both numbers."""
    monkeypatch.setattr("dit_runtime.sampling.batch.LIMITS", TableLimits(3 * ROW + ROW // 2))
    with pytest.raises(SamplingError, match=r"needs 4 rows .* and 3 fit in .*; use a smaller batch"):
        next(pipe.trajectory([1, 2, 3], steps=3, guidance=2.0, sampler="ddim"))
    assert len(list(pipe.trajectory([1, 2], steps=3, guidance=2.0, sampler="ddim"))) == 3


def test_each_condition_is_computed_once(pipe: Pipeline) -> None:
    """Fails if a (timestep, label) that a stream needs is computed twice, or one that it does not need at all."""
    interval: dict[str, Any] = {"steps": 5, "sampler": "ddim", "guidance": 2.0, "guidance_interval": (0.3, 1.0)}
    images = [
        *pipe.prepare([3, 3, 4, 4], **interval),
        *pipe.prepare([3, 5], steps=10, sampler="ddim", guidance=1.0),
        *pipe.prepare([8], steps=2, sampler="ddim", guidance=0.0),
    ]
    with conditioned(pipe) as pairs:
        list(pipe.stream(images, 2))
    fifth, tenth = range(0, 1000, 200), range(0, 1000, 100)
    expected = {(t, label) for t in fifth for label in (3, 4)} | {(t, NULL) for t in fifth if t / 999 >= 0.3}
    expected |= {(t, label) for t in tenth for label in (3, 5)} | {(t, NULL) for t in (0, 500)}
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected


class FakeEngine:
    """Conditioning rows that say which they are, and a step that only notes what it was given.

    ``seen`` holds, for each image of each call, its coefficients a and b, and the conditions of its branches.
    """

    info = info_of("fake")

    def __init__(self, manifest: Manifest) -> None:
        model, self.manifest = manifest.model, manifest
        self.shape = (6 * model.depth + 2, model.width)
        self.seen: list[tuple[float, float, list[tuple[float, int]]]] = []
        self.most_rows, self.most_bytes = 0, 0

    def session(self, graph: str) -> Any:
        return SimpleNamespace(run=self.condition if graph == "conditioner" else self.step)

    def release(self, graph: str) -> None:
        pass

    def open_loop(self, limits: TableLimits) -> HostLoop:
        return HostLoop(self, self.manifest, limits)

    def close(self) -> None:
        pass

    def condition(self, inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
        t, labels = inputs["timesteps"], inputs["labels"]
        assert (t.dtype, labels.dtype) == (np.float32, np.int32)
        self.most_rows = max(self.most_rows, len(t))
        return [np.broadcast_to((t * 2000 + labels)[:, None, None].astype(np.float32), (len(t), *self.shape))]

    def step(self, inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
        self.most_bytes = max(self.most_bytes, inputs["modulation"].nbytes)
        # A branch without a weight reads some row too: it must be there.
        codes = inputs["modulation"][inputs["rows"], 0, 0]  # (G, B)
        for image, (a, b, *_) in enumerate(inputs["coefficients"].tolist()):
            used = inputs["guidance"][:, image].any(axis=1)
            self.seen.append((a, b, [divmod(code, 2000) for code in codes[used, image].tolist()]))
        return [inputs["state"].copy(), inputs["state"][:, 0].copy()]


def faked(bundles: dict[str, Path], model: ModelSpec) -> tuple[Pipeline, FakeEngine]:
    bundle = open_bundle(bundles["fp32"])
    graphs, table = bundle.manifest.graphs, bundle.manifest.table
    wide = replace(graphs["conditioner"], outputs=(replace(table, shape=("rows", 6 * model.depth + 2, model.width)),))
    manifest = replace(bundle.manifest, model=model, graphs={**graphs, "conditioner": wide})
    engine = FakeEngine(manifest)
    return Pipeline(Bundle(bundle.path, manifest, bundle.digest), engine), engine


@given(
    asked=st.lists(
        st.tuples(
            st.lists(st.integers(0, 7), min_size=1, max_size=9),
            st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True),
            st.sampled_from([1.0, 2.0]),
        ),
        min_size=1,
        max_size=8,
    ),
    batch_size=st.integers(1, 4),
    spare=st.integers(0, 12),
    chunk=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_the_table_always_has_what_is_needed(
    bundles: dict[str, Path],
    asked: list[tuple[list[int], list[int], float]],
    batch_size: int,
    spare: int,
    chunk: int,
) -> None:
    """Fails if dropping, filling again or computing in chunks ever puts one row where another belongs."""
    pipe, engine = faked(bundles, LEARNED)
    images, expected = [], []
    for number, (times, labels, guidance) in enumerate(asked):
        weights, schedule = {label: 1 / len(labels) for label in labels}, marked(number, times)
        images += pipe.prepare([weights], sampler=schedule, guidance=guidance)
        used = [*labels, NULL] if guidance != 1 else labels
        expected += [(t, number, [(t, label) for label in used]) for t in times]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_runtime.sampling.batch.LIMITS", TableLimits((3 * batch_size + spare) * ROW, chunk * ROW))
        assert len(list(pipe.stream(images, batch_size))) == len(images)
    # Images overlap: each one's own calls are in order.
    assert sorted(engine.seen, key=lambda seen: seen[1]) == expected
    assert engine.most_bytes <= (3 * batch_size + spare) * ROW
    assert engine.most_rows <= chunk


def noisy(rows: Sequence[int]) -> Schedule:
    """A table that adds a draw to the latents at these of its five rows, and does nothing else."""
    schedule = marked(0, [900, 700, 500, 300, 100])
    coefficients, draws = schedule.coefficients.copy(), schedule.draws_noise.copy()
    coefficients[list(rows), 16], draws[list(rows)] = 1, True
    return replace(schedule, coefficients=coefficients, draws_noise=draws)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_image_draws_where_its_table_says(pipe: Pipeline, dtype: str) -> None:
    """Fails if an image's draws are not its seed's next ones, because its neighbours draw at other rows."""
    drawing = [(0, 2), (), (1, 3), (2, 3, 4)]
    images = [pipe.prepare([1], 300 + i, sampler=noisy(rows), noise_dtype=dtype)[0] for i, rows in enumerate(drawing)]
    for index, latents in pipe.stream(images, 4):
        generator, expected = torch.Generator().manual_seed(300 + index), torch.zeros(4, 8, 8)
        for _ in range(1 + len(drawing[index])):
            expected += torch.randn(1, 4, 8, 8, generator=generator, dtype=getattr(torch, dtype))[0].float()
        error = np.abs(latents - expected.numpy())
        # float16 rounds to another last place where float32's difference crosses a boundary: 4 of 100 000 values.
        assert (error <= 5e-6).mean() >= (1 if dtype == "float32" else 0.98)  # measured: 9.5e-7
        assert error.max() <= 0.01


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_images_of_given_noise(pipe: Pipeline, transformer: Any, sampler: str) -> None:
    """Fails if given noise is not each image's start, or the draws after it are not its seed's from the first."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(80))
    wanted = [Wanted({label: 1.0}, 81 + i, constant(2.0), noise=noise[i : i + 1]) for i, label in enumerate((3, 7))]
    sampling: dict[str, Any] = {"steps": 6, "sampler": sampler, "eta": 0.7 if sampler == "ddim" else 0.0}
    *_, (_, found, _) = pipe.trajectory([3, 7], [81, 82], guidance=2.0, noise=noise.numpy(), **sampling)
    assert relative(found, reference_latents(transformer, wanted, **sampling)) <= REFERENCE_LIMIT


def test_the_seeds_of_a_cuda_device(pipe: Pipeline) -> None:
    """Fails if ``noise_device`` does not choose the generator: the first values of seed 0 as others published them."""
    ((_, latents),) = pipe.stream(pipe.prepare([1], 0, sampler=noisy(()), noise_device="cuda"), 1)
    published = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    assert np.abs(latents[0, 0, :6] - published).max() <= 1e-6


def test_a_thousand_steps_of_xl_stay_within_the_bound(bundles: dict[str, Path]) -> None:
    """Fails if DiT-XL/2's table of 64 labels and 1000 steps, 51 GB whole, is ever more than its bound of memory.

    Of the thousand steps the first twelve are run: each takes 51 MB of rows, and the table is filled three times.
    """
    pipe, engine = faked(bundles, XL)
    times = np.arange(999.0, -1, -1)
    tracemalloc.start()
    try:
        steps = pipe.trajectory(range(64), sampler=marked(0, times), guidance=4.0)
        assert len(list(islice(steps, 12))) == 12
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    expected = [(t, 0, [(t, label), (t, 1000)]) for t in times[:12] for label in range(64)]
    assert engine.seen == expected
    assert 0.9 * LIMITS.table_bytes <= engine.most_bytes <= LIMITS.table_bytes  # the bound is also used
    assert engine.most_rows * XL_ROW <= 32 << 20
    assert peak <= 1.1 * LIMITS.table_bytes  # measured: 1.03


class SpoilingEngine(OnnxRuntimeEngine):
    """Spoils the state that one call of the step gives."""

    spoil: Callable[[np.ndarray], None]
    call: int

    def session(self, graph: str) -> Any:
        session = super().session(graph)
        if graph != "step":
            return session
        outer, count = self, 0

        class Spoiling:
            def run(self, inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
                nonlocal count
                count += 1
                state, denoised = (result.copy() for result in session.run(inputs, outputs))
                if count == outer.call:
                    outer.spoil(state)
                return [state, denoised]

        return Spoiling()


def spoiled(bundles: dict[str, Path], call: int, spoil: Callable[[np.ndarray], None]) -> Pipeline:
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    pipe.engine = SpoilingEngine(pipe.bundle, threads=1)
    pipe.engine.call, pipe.engine.spoil = call, spoil
    return pipe


def test_what_was_finished_before_a_failure_stands(bundles: dict[str, Path]) -> None:
    """Fails if latents that are not numbers go on, or the error names another step, engine or image."""

    def spoil(state: np.ndarray) -> None:
        state[1, 2, 3, 4, 5] = np.nan  # the memory of one image

    pipe = spoiled(bundles, 4, spoil)
    images = [
        *pipe.prepare([1], 100, steps=2, sampler="ddim", guidance=1.0),
        *pipe.prepare([1, 2], [101, 102], steps=10, sampler="dpmpp-3m", guidance=1.0),
    ]
    finished: list[int] = []
    with pytest.raises(SamplingError) as failure:
        note(pipe.stream(images, 2), finished)
    # The first image made room after two calls; of the two others the second is then in its second step.
    message = r"latents are not finite after step 2 of 10 on onnxruntime \S+ CPU \(seed 102\); run dit-verify"
    assert failure.match(message)
    assert "\n" not in str(failure.value)
    assert finished == [0]


def note(stream: Iterator[tuple[int, Array]], finished: list[int]) -> None:
    """Put each index into ``finished`` as it comes."""
    for index, _ in stream:
        finished.append(index)


def test_the_others_go_on_without_an_image_that_fails(bundles: dict[str, Path]) -> None:
    """Fails if an image's failure ends, delays or changes its neighbours, or is not told by its key."""

    def spoil(state: np.ndarray) -> None:
        state[1, 1, 2, 3, 4] = np.inf

    pipe = spoiled(bundles, 2, spoil)
    images = pipe.prepare([1, 2, 3], [7, 8, 9], steps=4, sampler="dpmpp-2m")
    finished, failed = {}, {}
    with Batch(pipe.engine, pipe.manifest, goes_on=True) as batch:
        batch.add(list(enumerate(images, 50)))
        calls = 0
        while len(batch):
            step = batch.advance()
            calls += 1
            failed |= step.failed
            finished |= {step.keys[index]: step.latents[index].copy() for index in np.flatnonzero(step.finished)}
    assert (calls, sorted(finished), list(failed), batch.failure) == (4, [50, 52], [51], None)
    assert re.search(r"not finite after step 2 of 4 on .* \(seed 8\)", str(failed[51]))
    sound = dict(Pipeline(bundles["fp32"], "onnxruntime", threads=1).stream(images, 1))
    assert np.array_equal(finished[50], sound[0])
    assert np.array_equal(finished[52], sound[2])


def test_images_leave_a_batch_before_they_are_finished(pipe: Pipeline) -> None:
    """Fails if one that leaves changes the others, of its schedule or another, or a key that has left is an error."""
    images = [
        *pipe.prepare([1, 2], [7, 8], steps=5, sampler="dpmpp-2m"),
        *pipe.prepare([3, 4], [9, 10], steps=6, sampler="ddpm", guidance=2.0),
    ]
    finished = {}
    with Batch(pipe.engine, pipe.manifest) as batch:
        batch.add(list(enumerate(images[:3])))
        batch.advance()
        batch.remove({1, 99})
        assert len(batch) == 2
        batch.advance()
        batch.add([(3, images[3])])
        batch.remove([1])
        while len(batch):
            step = batch.advance()
            finished |= {step.keys[index]: step.latents[index].copy() for index in np.flatnonzero(step.finished)}
    alone = dict(pipe.stream(images, 1))
    assert sorted(finished) == [0, 2, 3]
    assert all(np.array_equal(latents, alone[key]) for key, latents in finished.items())
    with Batch(pipe.engine, pipe.manifest) as batch:
        batch.add(list(enumerate(images)))
        batch.advance()
        batch.remove(range(4))
        assert len(batch) == 0


def test_requests_that_are_alike_share_a_schedule(pipe: Pipeline) -> None:
    """Fails if one is made again for each request, is another's, or can be changed by whoever holds it."""
    (first,), (second,) = (pipe.prepare([1], seed, steps=9, sampler="unipc") for seed in (1, 2))
    assert first.schedule is second.schedule
    for other in ({"steps": 8}, {"spacing": "karras"}, {"sampler": "dpmpp-2m"}):
        (image,) = pipe.prepare([1], **{"steps": 9, "sampler": "unipc", **other})
        assert image.schedule is not first.schedule
    with pytest.raises(ValueError, match="read-only"):
        first.schedule.coefficients[0, 0] = 1
    for wrong in ({"sampler": ["ddim"]}, {"sampler": "ddim", "spacing": ["leading"]}):
        with pytest.raises(SamplingError):
            pipe.prepare([1], **wrong)


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]], ids=str)
def test_every_kind_of_not_finite_is_found(bundles: dict[str, Path], values: list[float]) -> None:
    """Fails if an infinity passes as a number, or both together put numpy's warning before the one clear line."""

    def spoil(state: np.ndarray) -> None:
        state[0, 0, 0, 0, : len(values)] = values

    with pytest.raises(SamplingError, match="not finite after step 3 of 5"):
        list(spoiled(bundles, 3, spoil).trajectory([1], steps=5, sampler="ddim", guidance=1.0))


def test_a_failure_beside_an_image_that_finishes(bundles: dict[str, Path]) -> None:
    """Fails if an image is lost, or given with what is no number, because its neighbour fails in its last call."""

    def spoil(state: np.ndarray) -> None:
        state[1, 0, 0, 0, 0] = np.nan

    for lengths, step in (([3, 5], "3 of 5"), ([3, 3], "3 of 3")):
        pipe = spoiled(bundles, 3, spoil)
        images = [
            image
            for seed, steps in enumerate(lengths)
            for image in pipe.prepare([1], 200 + seed, steps=steps, sampler="ddim", guidance=1.0)
        ]
        finished: list[int] = []
        with pytest.raises(SamplingError, match=rf"not finite after step {step} on .* \(seed 201\)"):
            note(pipe.stream(images, 2), finished)
        assert finished == [0]


def test_steps_are_counted_as_a_viewer_counts_them(bundles: dict[str, Path]) -> None:
    """Fails if a failure in a step of two evaluations is told by the evaluation's number."""

    def spoil(state: np.ndarray) -> None:
        state[0, 1, 0, 0, 0] = np.nan

    two = replace(marked(0, [900, 900, 500, 500, 100, 100]), completes_step=np.array([False, True] * 3))
    with pytest.raises(SamplingError, match="not finite after step 2 of 3"):
        list(spoiled(bundles, 3, spoil).trajectory([1], sampler=two, guidance=1.0))
