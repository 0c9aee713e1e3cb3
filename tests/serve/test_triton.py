"""``dit-triton`` and the model that it writes, with a double of Triton's module."""

from __future__ import annotations

import base64
import functools
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import triton_double
from support.commands import run_command
from support.cuda_double import Machine, stored_on
from support.server import expected, pixels
from support.triton_double import MetricFamily, Request, TritonError, TritonModelException
from support.waiting import SECONDS, await_true

from dit_engines.recipe import Recipe
from dit_runtime.backends.tensorrt import open as tensorrt_engine
from dit_runtime.backends.tensorrt.store import SIDECAR
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import SamplingError
from dit_serve import triton_files
from dit_serve.triton_files import INPUTS, MODEL_TEXT, TritonRequest, write_model
from dit_serve.triton_model import TritonPythonModel, body_from_tensors, visible_device


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TOKEN = re.compile(r'#.*|"(?:[^"\\]|\\.)*"|[\w.-]+|[{}\[\]:,]')


def config_of(text: str) -> dict[str, Any]:
    """What Triton passes to a model as ``model_config``, from the text that ``dit-triton`` writes."""
    tokens = [token for token in TOKEN.findall(text) if not token.startswith("#") and token not in (":", ",")]

    def value() -> Any:
        token = tokens.pop(0)
        if token == "{":
            return fields("}")
        if token == "[":
            found = []
            while tokens[0] != "]":
                found.append(value())
            tokens.pop(0)
            return found
        return json.loads(token) if token[0] in '"-0123456789' or token in ("true", "false") else token

    def fields(end: str) -> dict[str, Any]:
        found = {}
        while tokens and tokens[0] != end:
            name = tokens.pop(0)
            found[name] = value()
        if tokens:
            tokens.pop(0)
        return found

    config = fields("")
    return {**config, "parameters": {each["key"]: each["value"] for each in config["parameters"]}}


def test_the_command_writes_a_model(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The configuration says what was asked for, and the bundle is copied whole."""
    done = run_command(
        "dit-triton", bundles["fp32"], "-o", tmp_path, "--gpus", "4", "--name", "shoes", "--batch-size", 16
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{tmp_path / 'shoes'}: engine auto; tritonserver --model-repository {tmp_path}\n"
    files = files_in(tmp_path / "shoes")
    copied = {name.removeprefix("1/bundle/"): content for name, content in files.items() if "bundle/" in name}
    kept = {name: copied[name] for name in copied if not name.startswith("engines/")}
    manifest = open_bundle(bundles["fp32"]).manifest
    assert kept == {name: (bundles["fp32"] / name).read_bytes() for name in ("manifest.json", *manifest.files)}
    assert files["1/model.py"].decode() == MODEL_TEXT
    config = config_of(files["config.pbtxt"].decode())
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("shoes", "python", 0)
    assert config["instance_group"] == [{"kind": "KIND_GPU", "count": 1, "gpus": [0, 1, 2, 3]}]
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["dynamic_batching"] == {"default_queue_policy": {"max_queue_size": 64}}
    assert [each["name"] for each in config["input"]] == [name for name, _, _ in INPUTS]
    assert [each["name"] for each in config["input"] if not each.get("optional")] == ["labels"]
    images = next(each for each in config["output"] if each["name"] == "images")
    assert (images["data_type"], images["dims"]) == ("TYPE_UINT8", [-1, 32, 32, 3])
    assert config["parameters"]["batch_size"] == {"string_value": "16"}
    assert json.loads(config["parameters"]["class_names"]["string_value"]) == list(manifest.class_names)


def test_nothing_is_overwritten_without_force(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A model that dit-triton wrote is replaced with --force alone; anything else never; other models stay."""
    other = tmp_path / "other" / "1" / "model.py"
    other.parent.mkdir(parents=True)
    other.write_text("# by hand")
    command = ("dit-triton", bundles["fp32"], "-o", tmp_path, "--in-place", "--name")
    assert run_command(*command, "mine").returncode == 0
    before = files_in(tmp_path)
    for name, options, message in (
        ("mine", (), "exists; replace it with --force"),
        ("other", (), "dit-triton did not write it"),
        ("other", ("--force",), "dit-triton did not write it"),
        ("..", (), "choose another --name"),
        ("a/b", (), "choose another --name"),
    ):
        done = run_command(*command, name, *options)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
        assert message in done.stderr
        assert files_in(tmp_path) == before
    assert run_command(*command, "mine", "--force", "--gpus", 0, "--instances", 2).returncode == 0
    text = (tmp_path / "mine" / "config.pbtxt").read_text()
    assert "instance_group [ { kind: KIND_CPU, count: 2 } ]" in text
    assert json.dumps(str(bundles["fp32"].resolve())) in text
    assert not (tmp_path / "mine" / "1" / "bundle").exists()
    assert other.read_text() == "# by hand"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "many"), "expected a whole number from 0"),
        (("--instances", "0"), "expected a whole number from 1"),
        (("--engine", "fast"), "engine 'fast' is unknown"),
        (("--size", "1x1"), "has no graphs for images of 1x1"),
    ],
)
def test_what_is_wrong_is_one_line(
    options: tuple[str, ...], message: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    done = run_command("dit-triton", bundles["fp32"], "-o", tmp_path / "repository", *options)
    assert (done.returncode, done.stderr.count("\n"), message in done.stderr) == (1, 1, True), done
    assert not (tmp_path / "repository").exists()


def test_an_altered_bundle_is_not_written(bundles: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bundles["fp32"], tmp_path / "altered.bundle")
    with (tmp_path / "altered.bundle" / "graphs" / "step.weights").open("r+b") as file:
        file.write(b"\1\2\3")
    done = run_command("dit-triton", tmp_path / "altered.bundle", "-o", tmp_path / "repository")
    assert (done.returncode, "altered" in done.stderr) == (1, True)
    assert not [path for path in tmp_path.rglob("*") if "repository" in str(path) and path.is_file()]


class Opened:
    """A model that is loaded as Triton loads it, an instance on the CPU."""

    def __init__(self, bundle: Path, repository: Path, **settings: Any) -> None:
        request = TritonRequest(
            **{"bundle": bundle, "repository": repository, "name": "m", "gpus": 0, "in_place": True, "batch_size": 3}
            | {"engine": "onnxruntime", "threads": 1, **settings}
        )
        folder = write_model(request).folder
        self.config = config_of((folder / "config.pbtxt").read_text())
        self.args = {
            "model_config": json.dumps(self.config),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_instance_name": "m_0_0",
            "model_repository": str(folder),
            "model_version": "1",
            "model_name": "m",
        }
        self.model = TritonPythonModel()

    def __enter__(self) -> TritonPythonModel:
        self.model.initialize(self.args)
        return self.model

    def __exit__(self, *_: object) -> None:
        self.model.finalize()


@pytest.fixture(autouse=True)
def utils(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_double.as_module())
    monkeypatch.setattr(MetricFamily, "values", {})
    return


def answers_to(model: TritonPythonModel, **tensors: Any) -> list[Any]:
    request = Request(**tensors)
    model.execute([request])
    return list(iterate_answers(request))


def iterate_answers(request: Request) -> Iterator[Any]:
    final = False
    while not final:
        response, final = request.answers.get(timeout=SECONDS)
        yield response


def test_answers_are_the_images(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Each image an answer, or all images one; with previews; as pixels, or as PNG files with their record."""
    settings = {"steps": 4, "sampler": "dpmpp-2m", "guidance": 3.0}
    images = expected(bundles, [3, 4], [7, 9], **settings)
    with Opened(bundles["fp32"], tmp_path) as model:
        found = answers_to(model, labels=["3", "4"], seeds=[7, 9], previews=2, **settings)
        assert sorted((int(each.tensors["index"][0]), int(each.tensors["step"][0])) for each in found) == [
            *[(0, 2), (0, 4), (1, 2), (1, 4)]
        ]
        for each in found[2:]:
            assert np.array_equal(each.tensors["images"][0], images[int(each.tensors["index"][0])])
            assert each.tensors["seed"][0] == [7, 9][int(each.tensors["index"][0])]
        (found_png,) = answers_to(model, labels="3", seeds=7, format="png", **settings)
        png = base64.b64decode(found_png.tensors["png"][0])
        assert np.array_equal(pixels(png), images[0])
        assert b"dit.bundle" in png
    with Opened(bundles["fp32"], tmp_path / "whole", decoupled=False) as model:
        (whole,) = answers_to(model, labels=["3", "4"], seeds=[7, 9], **settings)
        assert np.array_equal(whole.tensors["images"], images)
        assert whole.tensors["index"].tolist() == [0, 1]
        assert whole.tensors["label"].tolist() == [b"class 3, kind 3", b"class 4, kind 4"]


def test_what_requests_get_wrong(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The request is told, and those after it are made."""
    with Opened(bundles["fp32"], tmp_path, decoupled=False) as model:
        for tensors, message in (
            ({"labels": "30"}, "label 30: expected 0 to 9"),
            ({"labels": "3", "steps": 0}, "steps: got 0"),
            ({"labels": "3", "format": "jpeg"}, "format 'jpeg': expected pixels or png"),
            ({"labels": "3", "previews": 1}, "without --whole"),
            ({"labels": ["3"] * 65}, "expected 1 to 64"),
            ({"seeds": 3}, "labels"),
        ):
            (answer,) = answers_to(model, **tensors)
            assert message in answer.error.text
            assert answer.error.code == TritonError.INVALID_ARG
        (late,) = answers_to(model, labels=["3", "4"], steps=1000, sampler="ddim", timeout=0.05)
        assert (late.error.code, "not finished after" in late.error.text) == (TritonError.UNAVAILABLE, True)
        (answer,) = answers_to(model, labels="3", steps=1)
        assert answer.error is None


def test_an_image_that_is_not_finite_fails_alone(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of the request; the request's other image comes."""
    opened = Opened(bundles["fp32"], tmp_path)
    with opened as model:
        decode = model._model.pipe.decode

        def spoiled(latents: Any) -> Any:
            if len(latents) > 1:
                raise SamplingError("decoded pixels are not finite")
            images = decode(latents)
            if np.array_equal(images[0], images_alone[1]):
                raise SamplingError("decoded pixels are not finite")
            return images

        images_alone = expected(bundles, [1, 2], 0, steps=2)
        monkeypatch.setattr(model._model.pipe, "decode", spoiled)
        found = answers_to(model, labels=["1", "2"], steps=2)
        assert np.array_equal(found[0].tensors["images"][0], images_alone[0])
        assert (found[1].error.code, "not finite" in found[1].error.text) == (TritonError.INTERNAL, True)


def test_who_hangs_up_frees_the_place(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if the instance takes more than its batch holds, or images that nobody waits for keep others out."""
    with Opened(bundles["fp32"], tmp_path) as model:
        gone = [Request(labels=str(index), steps=1000, sampler="ddim") for index in range(3)]
        model.execute(gone)
        await_true(lambda: model._batcher.load().running == 3)
        waiting = Request(labels="5", steps=2)
        thread = threading.Thread(target=model.execute, args=([waiting],))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        for request in gone:
            request.cancelled = True
        assert [response.error for response in iterate_answers(waiting)] == [None]
        thread.join(SECONDS)
        for request in gone:
            assert list(iterate_answers(request)) == [None]
        assert model._batcher.load().images == 1
    assert MetricFamily.values["dit_batch_size", "m_0_0"] == 3


def test_figures_go_on_after_a_process_was_killed(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Triton keeps its counters; they only rise."""
    opened = Opened(bundles["fp32"], tmp_path)
    for total in (2, 4):
        with opened as model:
            answers_to(model, labels=["1", "2"], steps=1)
            model._figures.write()
            assert MetricFamily.values["dit_images", "m_0_0"] == total
        opened.model = TritonPythonModel()


def test_a_model_that_cannot_be_opened_says_why(bundles: dict[str, Path], tmp_path: Path) -> None:
    """In one line, which Triton shows: no bundle, no engine for this library's version."""
    opened = Opened(bundles["fp32"], tmp_path)
    opened.config["parameters"]["bundle"]["string_value"] = str(tmp_path / "missing")
    opened.args["model_config"] = json.dumps(opened.config)
    with pytest.raises(TritonModelException, match=r"missing: .*dit-export"):
        opened.model.initialize(opened.args)


def test_another_tensorrt_is_said_when_the_model_is_loaded(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where plans were built, the model names TensorRT, and says both versions; it takes no slower engine unseen."""
    machine = Machine()
    stored = stored_on(
        machine, open_bundle(bundles["fp32"]), tmp_path / "plans", Recipe("this", "8.7", (1, 4), (1, 2), 64)
    )
    (stored.folder / SIDECAR).write_text("{}")
    stored = replace(stored, version="10.9.0")
    monkeypatch.setattr(triton_files, "read_engines", lambda bundle: [stored])
    monkeypatch.setattr(tensorrt_engine, "read_engines", lambda *_: [stored])
    opened_engine = functools.partial(
        tensorrt_engine.engine_from_store, cuda=machine.cuda, import_library=lambda name: machine.library
    )
    monkeypatch.setattr(tensorrt_engine, "engine_from_store", opened_engine)
    opened = Opened(bundles["fp32"], tmp_path / "repository", engine="auto")
    assert opened.config["parameters"]["engine"] == {"string_value": "tensorrt"}
    with pytest.raises(
        TritonModelException, match=r"with TensorRT 10\.9\.0, this is .* with TensorRT 10\.3\.0; run dit-build"
    ):
        opened.model.initialize(opened.args)
    machine.check_closed()


def test_tensors_become_a_body() -> None:
    """One value of a tensor of one, text from bytes; a seed for all or one for each."""
    text = np.array([b"Sneaker", "Bag"], np.object_)
    body, kind = body_from_tensors(
        {"labels": text, "seeds": np.array([5]), "guidance_interval": np.array([0.1, 0.9])}, decoupled=True
    )
    assert (body.labels, body.seeds, body.guidance_interval, kind) == (["Sneaker", "Bag"], 5, (0.1, 0.9), "pixels")
    body, _ = body_from_tensors({"labels": text, "seeds": np.array([5, 8])}, decoupled=True)
    assert body.seeds == [5, 8]


def test_an_instance_sees_its_own_gpu() -> None:
    """Triton counts the GPUs that it sees."""
    assert [visible_device(None, 2), visible_device("4, 7", 1), visible_device("GPU-a,GPU-b", 0)] == ["2", "7", "GPU-a"]
