"""Sampler tables as files, and a custom one run by the pipeline and by the documented row formula in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.optional import diffusers, torch
from support.schedules import AVERAGE, DIFFUSION, FIXED, LEARNED, PAIRED, assert_same

from dit_runtime import SAMPLERS, Bundle, Pipeline, open_bundle, read_table, schedule_for, write_table
from dit_runtime.core.errors import SamplingError

# Relative to the largest of the reference's value.
CUSTOM_LIMIT = 5e-6  # measured: 1.4e-6

FLOW = replace(DIFFUSION, betas=(), prediction_type="velocity", guidance_channels=3, path="gvp")
Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_table_is_read_as_it_was_written(tmp_path: Path, sampler: str) -> None:
    """Fails if a file changes a table by as much as a bit, for any sampler: seeds would give other images."""
    kind = (FIXED, FLOW) if sampler in ("euler", "heun", "sde-euler", "sde-heun") else (LEARNED, DIFFUSION)
    kind = (PAIRED, AVERAGE) if sampler == "meanflow" else kind
    cases: list[dict[str, Any]] = [{}]
    if sampler == "ddim":
        cases = [{"eta": 0.7}, {"spacing": "trailing"}, {"spacing": "official-ddim"}]
    elif sampler in ("dpmpp-2m", "unipc"):
        cases += [{"spacing": "karras"}]
    for case in cases:
        schedule = schedule_for(sampler, *kind, 20, **case)
        write_table(schedule, tmp_path / "table.json")
        assert_same(read_table(tmp_path / "table.json"), schedule)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_table_of_timesteps_and_coefficients(tmp_path: Path) -> None:
    """Fails if a searched solver's table needs more than what it must have, or its defaults are not the documented."""
    coefficients = np.zeros((3, 17))
    coefficients[:, 2] = 1
    coefficients[1, 16] = 0.5
    path = tmp_path / "searched.json"
    path.write_text(json.dumps({"timesteps": [900, 500.5, 0], "coefficients": coefficients.tolist()}))
    found = read_table(path)
    assert (found.sampler, found.spacing, found.steps, len(found)) == ("searched", "custom", 3, 3)
    assert found.timesteps.tolist() == [900, 500.5, 0]
    assert found.rows.tolist() == [0, 1, 2]
    assert found.start.tolist() == [1]
    assert found.initial.tolist() == [[0, 1]] * 3
    assert found.draws_noise.tolist() == [False, True, False]
    assert found.completes_step.tolist() == [True] * 3


def put(name: str, index: Any, value: Any) -> Change:
    """A change that sets one entry of an array of the table."""

    def change(table: dict[str, Any]) -> None:
        array = np.array(table[name], object)
        array[index] = value
        table[name] = array.tolist()

    return change


def assign(**values: Any) -> Change:
    return lambda table: table.update(values)


BAD_TABLES: list[tuple[str, Change, str]] = [
    ("no coefficients", lambda table: table.pop("coefficients"), "coefficients: missing, expected a list"),
    ("no timesteps", lambda table: table.pop("timesteps"), "timesteps: missing, expected a list"),
    ("sixteen columns", assign(coefficients=[[0.0] * 16] * 5), "not a sampler table"),
    (
        "eighteen columns",
        assign(coefficients=[[0.0] * 18] * 5),
        r"has shape \[5, 18\], expected \[5, 17\], or \[5, 19\] with a clip\); .*\[T, 17\], or \[T, 19\] with a clip",
    ),
    ("one row flat", assign(coefficients=[0.0] * 17), "not a sampler table"),
    ("a long name", assign(sampler="x" * 256), "not a sampler table"),
    ("ragged", assign(coefficients=[[0.0] * 17] * 4 + [[0.0]]), "not a sampler table"),
    ("no rows", assign(coefficients=[], rows=[]), "not a sampler table"),
    ("words", assign(coefficients="many"), "coefficients: got 'many', expected a list"),
    ("a misspelt field", assign(draw_noise=[True] * 5), "draw_noise: unknown, expected only timesteps, coefficients"),
    ("six rows of five", assign(rows=[0] * 6), r"has shape \[5, 17\], expected \[6, 17\]"),
    ("NaN", put("coefficients", (2, 1), float("nan")), "it holds NaN, which is not a finite number"),
    ("an infinity", put("coefficients", (2, 11), float("inf")), "it holds Infinity, which is not a finite number"),
    ("a timestep that is none", put("timesteps", 1, float("nan")), "it holds NaN"),
    ("a start that is none", assign(start=[1e39]), "start holds a number"),
    ("a number beyond float32", put("coefficients", (2, 1), 1e300), "coefficients holds a number that is not finite"),
    ("a number near float32's end", put("coefficients", (2, 1), 1e38), "above"),
    ("a fraction of a row", put("rows", 3, 3.7), r"rows\[3\]: got 3.7, expected a whole number"),
    ("a row in words", put("rows", 3, "3"), r"rows\[3\]: got '3', expected a whole number"),
    ("draws in words", assign(draws_noise=["false"] * 5), r"draws_noise\[0\]: got 'false', expected true or false"),
    ("completions as numbers", assign(completes_step=[1] * 5), r"completes_step\[0\]: got 1, expected true or false"),
    ("no start", assign(start=[]), "at least one row and one start"),
    ("starts without end", assign(start=[1.0] * 17), "start has 17 values, expected at most 16"),
    ("rows without end", assign(rows=[0] * 20_001), "rows has 20001 values, expected at most 20000"),
    ("coefficients without end", assign(coefficients=[[]] * 20_001), "coefficients has 20001 values"),
    ("timesteps without end", assign(timesteps=[0] * 20_001), "timesteps has 20001 values"),
    ("a matrix of timesteps", assign(timesteps=[[1.0, 2.0, 3.0]] * 5), r"timesteps\[0\]: got \[1.0, 2.0, 3.0\], exp"),
    ("one of two times", assign(timesteps=[[1.0, 2.0]] * 4 + [[1.0]]), r"timesteps\[4\]: got \[1.0\], expected a list"),
    ("a pair among times", assign(timesteps=[1.0, [1.0, 2.0]]), r"timesteps\[1\]: got \[1.0, 2.0\], expected a finite"),
    ("a row beyond int32", put("rows", 3, 1 << 40), "not a sampler table"),
    ("a row beyond the timesteps", put("rows", 3, 5), "rows leave 0 to 4, the timesteps"),
    ("a row before the timesteps", put("rows", 3, -1), "rows leave 0 to 4"),
    ("initial of one column", assign(initial=[[1.0]] * 5), r"initial has shape \[5, 1\], expected \[5, 2\]"),
    ("a draw too few", assign(draws_noise=[True] * 4), r"draws_noise has shape \[4\], expected \[5\]"),
    ("a completion too many", assign(completes_step=[True] * 6), "completes_step has shape"),
    ("an end within a step", put("completes_step", 4, False), "a last row that completes a step"),
    ("g without noise", put("coefficients", (2, 14), 0.5), "g and h must be 0 where k is 0"),
    ("h without noise", put("coefficients", (2, 15), 0.5), "g and h must be 0 where k is 0"),
    ("noise that is not drawn", put("draws_noise", 1, False), "a row with k other than 0 must draw noise"),
    ("memory read at once", put("coefficients", (0, 3), 1.0), "row 0 reads slot 1 before any row wrote it"),
    ("memory never written", put("coefficients", (4, 4), 1.0), "row 4 reads slot 2 before any row wrote it"),
]


def table_dict() -> dict[str, Any]:
    """A table of five rows that is good: latents kept, noise in row 1, slot 1 written in row 2."""
    coefficients = np.zeros((5, 17))
    coefficients[:, [0, 2]] = 1
    coefficients[1, 16] = 0.5
    coefficients[2, 5] = 1
    return {
        "timesteps": [900.0, 700.0, 500.0, 300.0, 100.0],
        "rows": [0, 1, 2, 3, 4],
        "coefficients": coefficients.tolist(),
        "draws_noise": [False, True, False, False, False],
        "completes_step": [True] * 5,
    }


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(SamplingError, match=message) as refusal:
        read_table(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("change", "message"), [bad[1:] for bad in BAD_TABLES], ids=[bad[0] for bad in BAD_TABLES])
def test_bad_tables(tmp_path: Path, change: Change, message: str) -> None:
    """Fails if a table that the loop or the graph cannot run is read, or refused without the file and the reason."""
    path, table = tmp_path / "table.json", table_dict()
    path.write_text(json.dumps(table))
    assert len(read_table(path)) == 5
    change(table)
    path.write_text(json.dumps(table))
    assert_refused(path, message)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    """Fails if a missing file, a folder, or other text or bytes end in a traceback."""
    path = tmp_path / "table.json"
    assert_refused(path, "cannot read this sampler table .No such file")
    for content in (b"", b"{", b"[]", b"[1, 2]", b"null", b"7", b'"table"', b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        assert_refused(path, "not a sampler table")
    path.unlink()
    path.mkdir()
    assert_refused(path, "not a regular file")


def custom_table() -> dict[str, Any]:
    """Ten rows with two draws at the start, memory, noise by v and by k alone, inner rows, and a timestep twice."""
    random = np.random.default_rng(9)
    coefficients = np.zeros((10, 17))
    coefficients[:, 0] = random.uniform(0.5, 1.5, 10)
    coefficients[:, 1] = random.uniform(-1, 0, 10)
    matrix = random.uniform(-0.4, 0.4, (10, 3, 3))
    matrix[:, 0, 0] += 0.5
    matrix[0, :, 1:] = 0  # only the latents exist before the first row
    coefficients[:, 2:11] = matrix.reshape(10, 9)
    coefficients[:, 11:14] = random.uniform(-0.5, 0.5, (10, 3))
    coefficients[1, 14:] = -0.7, 0.4, 1.0
    coefficients[4, 14:] = 0.2, -0.3, 0.5
    coefficients[7, 14:] = 0.0, 0.0, 0.25
    return {
        "sampler": "ten-rows",
        "timesteps": [960.0, 700.25, 431.0, 20.0],
        "rows": [0, 1, 1, 2, 1, 2, 2, 3, 0, 3],
        "coefficients": coefficients.tolist(),
        "start": [0.8, 0.6],
        "draws_noise": [False, True, False, True, True, False, False, True, False, False],
        "completes_step": [True, True, False, True, False, False, True, True, True, True],
    }


def row_formula(transformer: Any, table: dict[str, Any], label: int, seed: int, guidance: float) -> list[np.ndarray]:
    """The documented row formula in float64: the latents after each completed row, then each denoised estimate."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> np.ndarray:
        return torch.randn(1, 4, 8, 8, generator=generator).double().numpy()

    slots = [sum(scale * draw() for scale in table["start"]), 0.0, 0.0]
    latents, estimates = [], []
    coefficients = np.array(table["coefficients"], np.float32).astype(np.float64)
    for index, numbers in enumerate(coefficients):
        t = torch.tensor([table["timesteps"][table["rows"][index]]])
        with torch.inference_mode():
            cond, null = (
                transformer(torch.from_numpy(slots[0]).float(), timestep=t, class_labels=torch.tensor([number]))
                .sample.double()
                .numpy()
                for number in (label, 10)
            )
        e, v = null[:, :4] + guidance * (cond[:, :4] - null[:, :4]), cond[:, 4:]
        a, b, (g, h, k) = numbers[0], numbers[1], numbers[14:]
        denoised = a * slots[0] + b * e
        slots = [sum(numbers[2 + 3 * i + j] * slots[j] for j in range(3)) + numbers[11 + i] * e for i in range(3)]
        if table["draws_noise"][index]:
            slots[0] = slots[0] + np.exp(g + h * v) * k * draw()
        if table["completes_step"][index]:
            latents.append(slots[0][0])
            estimates.append(denoised[0])
    return [np.array(latents), np.array(estimates)]


def test_a_custom_table_is_its_formula(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if any of a row's 17 numbers, the memory, the draws or the inner rows are not run as documented."""
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(checkpoint / "transformer").eval()
    path, table = tmp_path / "ten.json", custom_table()
    path.write_text(json.dumps(table))
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    found = list(pipe.trajectory([3, 7], [80, 81], sampler=read_table(path), guidance=[2.5, 0.5]))
    assert [index for index, _, _ in found] == list(range(7))
    for place, (label, seed, guidance) in enumerate([(3, 80, 2.5), (7, 81, 0.5)]):
        latents, estimates = row_formula(transformer, table, label, seed, guidance)
        for index, z, denoised in found:
            assert np.abs(z[place] - latents[index]).max() <= CUSTOM_LIMIT * np.abs(latents[index]).max()
            assert np.abs(denoised[place] - estimates[index]).max() <= CUSTOM_LIMIT * np.abs(estimates[index]).max()


@pytest.mark.parametrize("setting", [{"steps": 4}, {"eta": 0.5}, {"spacing": "leading"}])
def test_a_table_with_settings_that_are_in_it(bundles: dict[str, Path], setting: dict[str, Any]) -> None:
    """Fails if steps, eta or spacing beside a table are silently not used."""
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    schedule = schedule_for("ddim", LEARNED, DIFFUSION, 5)
    with pytest.raises(
        SamplingError, match=r"a sampler table of 5 steps with .*: a sampler table decides all of these"
    ):
        pipe.prepare([1], sampler=schedule, **setting)
    assert pipe.prepare([1], sampler=schedule, steps=5)[0].schedule is schedule


@pytest.mark.parametrize(
    ("changes", "spec", "model", "message"),
    [
        ({"timesteps": [1000.0]}, DIFFUSION, LEARNED, r"timesteps 1000 to 1000: this model's timesteps are 0 to 999"),
        ({"timesteps": [-1.0]}, DIFFUSION, LEARNED, r"timesteps -1 to -1: this model's timesteps are 0 to 999"),
        ({"timesteps": [500.0]}, FLOW, FIXED, r"timesteps 500 to 500: this model's timesteps are 0 to 1"),
        ({"timesteps": [500.0], "k": [0.0, 0.5, 1.0]}, DIFFUSION, FIXED, "uses the learned variance"),
    ],
    ids=["too late", "too early", "of a diffusion", "learned variance"],
)
def test_a_table_for_another_model(
    bundles: dict[str, Path], changes: dict[str, Any], spec: Any, model: Any, message: str
) -> None:
    """Fails if a model is sampled with a table of timesteps it never saw, or of a variance it does not give."""
    bundle = open_bundle(bundles["fp32"])
    manifest = replace(bundle.manifest, diffusion=spec, model=model)
    pipe = Pipeline(Bundle(bundle.path, manifest, bundle.digest), "onnxruntime")
    schedule = schedule_for("ddim", LEARNED, DIFFUSION, 1)
    coefficients = schedule.coefficients.copy()
    coefficients[0, 14:] = changes.get("k", 0)
    timesteps = np.array(changes["timesteps"], np.float32)
    table = replace(schedule, coefficients=coefficients, timesteps=timesteps, draws_noise=np.ones(1, bool))
    with pytest.raises(SamplingError, match=message):
        pipe.prepare([1], sampler=table)
