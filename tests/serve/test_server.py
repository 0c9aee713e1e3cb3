"""The server as its callers see it: over HTTP, on a port that the system chooses."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dit_runtime import Pipeline
from dit_runtime.core.errors import SamplingError
from dit_runtime.output.images import read_png
from dit_runtime.output.provenance import entries_from_text

pytest.importorskip("uvicorn", reason="pip install 'dit-export[serve]'")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from support.server import TOKEN, Running, expected, pixels
from support.waiting import SECONDS, await_true

from dit_serve.bodies import BODY_BYTES
from dit_serve.model import Model
from dit_serve.request import ServeRequest
from dit_serve.serving import open_models


@pytest.fixture(scope="module")
def running(bundles: dict[str, Path]) -> Iterator[Running]:
    with Running(bundles["fp32"]) as server:
        yield server


def test_an_image_is_the_pipelines_with_its_record(running: Running, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if a setting is lost between the request and the image, or the image cannot be made again."""
    settings = {"steps": 4, "guidance": 3.0, "sampler": "dpmpp-2m", "spacing": "karras"}
    status, headers, content = running.ask("/generate", {"labels": 3, "seeds": 11, **settings})
    assert (status, headers["content-type"]) == (200, "image/png")
    assert np.array_equal(pixels(content), expected(bundles, [3], [11], **settings)[0])
    (tmp_path / "image.png").write_bytes(content)
    (entry,) = entries_from_text(tmp_path / "image.png", read_png(tmp_path / "image.png")[1])
    assert (entry["seed"], entry["steps"], entry["spacing"], entry["label"]) == (11, 4, "karras", {"3": 1.0})
    assert entry["batch"] == [1, 0, [[2, 4]]]
    assert entry["batches"] == [1, 1]


def test_several_images_come_as_json(running: Running, bundles: dict[str, Path]) -> None:
    body = {"labels": [1, "2", "3:0.5+4:0.5"], "seeds": [5, 6, 7], "steps": 3, "eta": 0.5, "sampler": "ddim"}
    found = running.ask_json("/generate", body)["images"]
    images = expected(bundles, [1, 2, "3:0.5+4:0.5"], [5, 6, 7], steps=3, eta=0.5, sampler="ddim")
    assert [(each["index"], each["seed"]) for each in found] == [(0, 5), (1, 6), (2, 7)]
    for each, image in zip(found, images, strict=True):
        assert np.array_equal(pixels(each["image"]), image)


def test_a_servers_table_is_a_sampler(bundles: dict[str, Path]) -> None:
    """By its name, with its own steps; a table of another bundle is refused before anything is served."""
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    (image,) = pipe.prepare([1], 0, steps=3, sampler="dpmpp-2m")
    table = replace(image.schedule, sampler="few-3", spacing="custom")
    with Running(bundles["fp32"], {"few": table}) as server:
        status, _, content = server.ask("/generate", {"labels": 4, "seeds": 2, "sampler": "few"})
        assert status == 200
        assert np.array_equal(pixels(content), expected(bundles, [4], 2, steps=3, sampler="dpmpp-2m")[0])
        (found,) = server.ask_json("/info")["models"]
        assert (found["samplers"][-1], found["tables"]) == ("few", {"few": 3})
        status, _, content = server.ask("/generate", {"labels": 4, "sampler": "few", "steps": 5})
        assert (status, "a sampler table of 3 steps with steps 5" in content.decode()) == (400, True)
    other = replace(table, timesteps=table.timesteps + 5000)
    with pytest.raises(SamplingError, match="timesteps"):
        Model("tiny", pipe, 1, 1, {"other": other})


def test_events_while_images_are_made(running: Running, bundles: dict[str, Path]) -> None:
    body = {"labels": [1, 2], "seeds": 5, "steps": 4, "sampler": "ddim", "stream": True, "previews": 2}
    events = running.events("/generate", body)
    images = expected(bundles, [1, 2], 5, steps=4, sampler="ddim")
    for index in (0, 1):
        own = [(name, data) for name, data in events if data.get("index") == index]
        assert [name for name, _ in own] == ["started", "preview", "picture"]
        assert (own[1][1]["step"], own[1][1]["steps"]) == (2, 4)
        assert np.array_equal(pixels(own[2][1]["image"]), images[index])
    assert events[-1] == ("done", {})


def test_callers_at_once_get_their_own_images(running: Running, bundles: dict[str, Path]) -> None:
    """Eight callers with other steps, samplers and guidance; four places in the batch."""
    asked = [
        {"labels": seed, "seeds": seed, "steps": 2 + seed, "guidance": 1.0 + seed % 3, "sampler": sampler}
        for seed, sampler in enumerate(("ddim", "ddpm", "dpmpp-2m", "unipc") * 2)
    ]
    found: dict[int, Any] = {}

    def ask(index: int) -> None:
        found[index] = running.ask("/generate", asked[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for index, body in enumerate(asked):
        settings = {key: value for key, value in body.items() if key not in ("labels", "seeds")}
        assert found[index][0] == 200
        assert np.array_equal(pixels(found[index][2]), expected(bundles, [index], [index], **settings)[0])


def test_openais_endpoint(running: Running, bundles: dict[str, Path]) -> None:
    """The fields that its client sends and reads; a prompt is a class."""
    body = {"model": "dall-e-3", "prompt": "4", "n": 2, "size": "32x32", "steps": 3, "seed": 9}
    found = running.ask_json("/v1/images/generations", {**body, "response_format": "b64_json"})
    images = expected(bundles, [4, 4], 9, steps=3)
    assert found["created"] > 0
    for each, image in zip(found["data"], images, strict=True):
        assert np.array_equal(pixels(each["b64_json"]), image)
    events = running.events("/v1/images/generations", {**body, "n": 1, "stream": True, "partial_images": 2})
    assert [name for name, _ in events] == [
        *["image_generation.partial_image"] * (len(events) - 1),
        "image_generation.completed",
    ]
    assert {data["type"] for name, data in events} == {name for name, _ in events}
    assert [data["partial_image_index"] for _, data in events[:-1]] == list(range(len(events) - 1))
    assert np.array_equal(pixels(events[-1][1]["b64_json"]), images[0])


def test_several_sizes(sized_bundle: Path) -> None:
    """A request names one; each has a batch of its own, and an image is the one of its size's pipeline."""
    models = open_models(
        ServeRequest((sized_bundle,), engine="onnxruntime", threads=1, sizes=((32, 32), (32, 48)), batch_size=2)
    )
    assert [model.name for model in models] == ["sized", "sized-32x48"]
    with Running(sized_bundle, models=models) as server:
        for path, size in (("/generate", "32x48"), ("/v1/images/generations", "48x32")):
            body = {"size": size, "steps": 2, **({"labels": 3} if path == "/generate" else {"prompt": "3"})}
            found = server.ask_json(path, body)
            content = found["images"][0]["image"] if path == "/generate" else found["data"][0]["b64_json"]
            wide = Pipeline(sized_bundle, "onnxruntime", threads=1, size=(32, 48))
            assert np.array_equal(pixels(content), wide([3], 0, steps=2)[0])
            assert pixels(content).shape == (32, 48, 3)
        assert pixels(server.ask("/generate", {"labels": 3, "steps": 2})[2]).shape == (32, 32, 3)
        for size, message in (("48x48", "this server makes 32x32, 32x48"), ("big", "expected HEIGHTxWIDTH")):
            status, _, content = server.ask("/generate", {"labels": 3, "size": size})
            assert (status, message in content.decode()) == (400, True)


def test_what_is_served(running: Running) -> None:
    assert [each["id"] for each in running.ask_json("/v1/models")["data"]] == ["tiny"]
    (model,) = running.ask_json("/info")["models"]
    assert (model["name"], model["classes"], model["image_size"]) == ("tiny", 10, [32, 32])
    assert model["engine"].startswith("onnxruntime")
    assert running.ask_json("/health") == {"status": "ok"}
    _, headers, content = running.ask("/metrics")
    assert headers["content-type"].startswith("text/plain")
    text = content.decode()
    assert 'dit_batch_size{model="tiny"} 4.0' in text
    assert 'dit_answers_total{path="/health",status="200"}' in text


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the request's body"),
        (b"[1]", 400, "the request's body"),
        (b'{"labels": 1, "labels": 2}', 400, "labels"),
        ({}, 400, "labels"),
        ({"labels": 1, "path": "/etc/passwd"}, 400, "path"),
        ({"labels": 1, "sampler": "few.json"}, 400, "sampler 'few.json' is unknown"),
        ({"labels": 99}, 400, "label 99: expected 0 to 9"),
        ({"labels": []}, 400, "0 labels: expected 1 to 64"),
        ({"labels": [1] * 65}, 400, "65 labels: expected 1 to 64"),
        ({"labels": 1, "steps": 0}, 400, "steps"),
        ({"labels": 1, "steps": 10**9}, 400, "steps"),
        ({"labels": 1, "seeds": 2**64}, 400, "beyond 64 bits"),
        ({"labels": 1, "guidance": "high"}, 400, "guidance"),
        ({"labels": 1, "timeout": -1}, 400, "timeout"),
        ({"labels": 1, "steps": 1000, "timeout": 0.05}, 504, "not finished after"),
        ({"labels": [1] * 20}, 429, "would exceed 8; try again later"),
        (b"x" * (BODY_BYTES + 1), 400, f"more than {BODY_BYTES} bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(running: Running, body: Any, status: int, message: str) -> None:
    """One clear line as JSON, with the status that tells whose fault it is."""
    found, headers, content = running.ask("/generate", body)
    error = json.loads(content)["error"]
    assert (found, message in error["message"]) == (status, True), error
    assert ("retry-after" in headers) == (status == 429)
    assert "\n" not in error["message"]


def test_an_image_that_is_not_finite_is_no_fault_of_the_request(bundles: dict[str, Path]) -> None:
    """Fails if the caller is told that the request was wrong."""
    with Running(bundles["fp32"]) as server:
        session = server.model.pipe.engine.session("decoder")

        def spoiled(inputs: Any, outputs: Any) -> Any:
            images, decoded = session.run(inputs, outputs)
            return [images, np.full_like(decoded, np.nan)]

        engine = server.model.pipe.engine
        original = engine.session
        engine.session = lambda graph: SimpleNamespace(run=spoiled) if graph == "decoder" else original(graph)
        status, _, content = server.ask("/generate", {"labels": 1, "steps": 1})
        assert (status, "decoded pixels are not finite" in content.decode()) == (500, True)
        events = server.events("/generate", {"labels": 1, "steps": 1, "stream": True})
        assert [(name, data.get("status")) for name, data in events[1:]] == [("error", 500), ("done", None)]


def test_a_bundle_that_is_altered_while_it_is_served(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Engines map weights: an image that was being made, and all later ones, fail, and the probe says so.

    A whole bundle that takes the place of this one alters nothing that is mapped.
    """
    bundle = tmp_path / "tiny.bundle"
    shutil.copytree(bundles["fp32"], bundle)
    body = {"labels": 1, "seeds": 2, "steps": 2}
    with Running(bundle) as server:
        assert server.ask("/generate", body)[0] == 200
        shutil.copytree(bundle, tmp_path / "other")
        bundle.rename(tmp_path / "old")
        (tmp_path / "other").rename(bundle)
        status, _, content = server.ask("/generate", body)
        assert status == 200
        assert np.array_equal(pixels(content), expected(bundles, [1], 2, steps=2)[0])
        bundle.rename(tmp_path / "other")
        (tmp_path / "old").rename(bundle)
        found: list[Any] = []
        long = {"labels": 1, "steps": 1000, "sampler": "ddim"}
        thread = threading.Thread(target=lambda: found.append(server.ask("/generate", long)))
        thread.start()
        await_true(lambda: server.model.batcher.load().running == 1)
        with (bundle / "graphs" / "step.weights").open("r+b") as file:
            content = file.read(8)
            file.seek(0)
            file.write(content)
        thread.join(SECONDS)
        for status, _, content in (*found, server.ask("/generate", body), server.ask("/health")):
            assert (status, "step.weights: was altered while the bundle is served" in content.decode()) == (500, True)


def test_other_hosts_types_and_paths_are_refused(running: Running) -> None:
    """A page of another site that a browser was led to has its own host, or cannot send JSON."""
    body = {"labels": 1, "steps": 1}
    assert running.ask("/generate", body, Host="evil.example")[0] == 403
    assert running.ask("/info", Host=f"evil.example:{running.port}")[0] == 403
    assert running.ask("/info", Host=f"localhost:{running.port}")[0] == 200
    assert running.ask("/info", Host="[::1]:1")[0] == 200
    assert running.ask("/generate", body, Content_Type="text/plain")[0] == 415
    assert running.ask("/../etc/passwd")[0] == 404
    assert running.ask("/generate")[0] == 405


def test_a_token_is_asked_for(bundles: dict[str, Path]) -> None:
    with Running(bundles["fp32"], token=TOKEN) as server:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": TOKEN}):
            assert server.ask("/info", **headers)[0] == 401
            assert server.ask("/generate", {"labels": 1, "steps": 1}, **headers)[0] == 401
        assert server.ask("/info", Authorization=f"Bearer {TOKEN}")[0] == 200
        assert server.ask("/health")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_place(running: Running, stream: bool) -> None:
    """Within a step: a batch of images that nobody waits for does not go on."""
    batcher = running.model.batcher
    before = batcher.load()
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=SECONDS)
    body = json.dumps({"labels": [1, 2, 3], "steps": 1000, "sampler": "ddim", "stream": stream})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    await_true(lambda: batcher.load().running == 3)
    assert connection.sock is not None
    connection.sock.close() if not stream else connection.close()
    await_true(lambda: not batcher.load().running)
    after = batcher.load()
    assert after.steps - before.steps < 1000
    assert (after.images, after.failures) == (before.images, before.failures)
