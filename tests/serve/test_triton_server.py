"""What ``dit-triton`` writes, in a real Triton Inference Server on the CPU, with its HTTP and gRPC clients."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import run_command
from support.server import expected, pixels
from support.triton import Triton
from support.waiting import SECONDS, await_true

pytestmark = pytest.mark.slow  # each instance of a model is a process that takes two seconds to start

MODELS = {
    "many": ("--instances=2", "--batch-size=4"),
    "streamed": ("--batch-size=4",),
    "left": ("--batch-size=1",),
    "whole": ("--whole", "--batch-size=4"),
    "small": ("--batch-size=1", "--max-queue=2"),
}


@pytest.fixture(scope="module")
def triton(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("triton")
    for name, options in MODELS.items():
        done = run_command(
            *("dit-triton", bundles["fp32"], "-o", folder / "repository", f"--name={name}", "--gpus=0"),
            *("--engine=onnxruntime", "--threads=1", *options),
        )
        assert done.returncode == 0, done.stderr
    with Triton(folder, folder / "repository") as server:
        yield server


def test_many_callers_at_once(triton: Triton, bundles: dict[str, Path], tmp_path: Path) -> None:
    """24 by HTTP and 24 by gRPC, with other steps, samplers and guidance: each gets the image that it gets alone.

    Fails also if one of the two instances takes all requests.
    """
    settings = [
        {"steps": 3 + seed % 7, "sampler": ("ddim", "dpmpp-2m", "ddpm")[seed % 3], "guidance": 1.0 + seed % 2}
        for seed in range(24)
    ]
    alone = [expected(bundles, [seed % 10], [seed], **each)[0] for seed, each in enumerate(settings)]
    found: dict[int, Any] = {}

    def ask(seed: int) -> None:
        found[seed] = triton.generate("many", labels=[str(seed % 10)], seeds=[seed], **settings[seed])

    streams = [
        {
            "by": "stream",
            "model": "many",
            "tensors": {"labels": [f"{seed % 10}"], "seeds": [seed]} | {key: [value] for key, value in each.items()},
        }
        for seed, each in enumerate(settings)
    ]
    with triton.loaded("many"):
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        answers = triton.run_client(streams, tmp_path)
        await_true(lambda: sum(figures_of(triton, "many")) == 48)
        assert min(figures_of(triton, "many")) >= 5
    for seed, image in enumerate(alone):
        assert (found[seed][0], found[seed][1].get("seed")) == (200, seed)
        assert np.array_equal(pixels(found[seed][1]["png"]), image)
        (answer,) = answers[seed]["answers"]
        assert np.array_equal(answer["images"][0], image)


def test_a_stream_has_previews_and_each_image_when_it_is_finished(
    triton: Triton, bundles: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {"labels": ["3", "class 4, kind 4"], "seeds": [7], "steps": [6], "previews": [2]}
    with triton.loaded("streamed"):
        ((streamed, refused)) = triton.run_client(
            [
                {"by": "stream", "model": "streamed", "tensors": tensors},
                {"by": "stream", "model": "streamed", "tensors": {"labels": ["30"]}},
            ],
            tmp_path,
        )
    images = expected(bundles, [3, 4], 7, steps=6)
    assert [int(answer["step"][0]) for answer in streamed["answers"]] == [2, 2, 4, 4, 6, 6]
    for answer in streamed["answers"][4:]:
        assert np.array_equal(answer["images"][0], images[int(answer["index"][0])])
    (answer,) = refused["answers"]
    assert "label 30: expected 0 to 9" in answer["error"]


def test_one_answer_to_a_request(triton: Triton, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Clients that do not read streams get all images of a request."""
    tensors = {"labels": ["3", "4"], "seeds": [7], "steps": [4]}
    wrong = {"labels": ["3", "30"]}
    with triton.loaded("whole"):
        by_http, by_grpc, http_error, grpc_error = triton.run_client(
            [
                {"by": "http", "model": "whole", "tensors": tensors},
                {"by": "grpc", "model": "whole", "tensors": tensors},
                {"by": "http", "model": "whole", "tensors": wrong},
                {"by": "grpc", "model": "whole", "tensors": wrong},
            ],
            tmp_path,
        )
    images = expected(bundles, [3, 4], 7, steps=4)
    for each in (by_http, by_grpc):
        assert np.array_equal(each["answers"][0]["images"], images)
        assert each["answers"][0]["label"].tolist() == [b"class 3, kind 3", b"class 4, kind 4"]
    assert by_grpc["answers"][0]["seed"].tolist() == [7, 8]
    assert [each["answers"][0]["status"] for each in (http_error, grpc_error)] == ["400", "StatusCode.INVALID_ARGUMENT"]


def test_a_full_queue_refuses(triton: Triton) -> None:
    """At once, with a status that says to come again; those that were taken are made."""
    found: list[int] = []
    with triton.loaded("small"):
        threads = [
            threading.Thread(target=lambda: found.append(triton.generate("small", labels=["1"], steps=100)[0]))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert sorted(set(found)) == [200, 503]
    assert 2 <= found.count(200) <= 6


def test_who_hangs_up_frees_the_place(triton: Triton, tmp_path: Path) -> None:
    """The instance has one place, which a long image had that nobody waits for."""
    long = {"labels": ["1"], "steps": [1000], "sampler": ["ddim"]}
    with triton.loaded("left"):
        triton.run_client([{"by": "stream", "model": "left", "tensors": long, "cancel_after": 0.05}], tmp_path)
        assert triton.generate("left", labels=["1"], steps=1)[0] == 200
        await_true(lambda: figures_of(triton, "left") == [1])


def test_unloading_finishes_what_was_taken(triton: Triton, bundles: dict[str, Path]) -> None:
    """And after loading again the images are the same."""
    found: list[Any] = []
    with triton.loaded("small"):
        thread = threading.Thread(
            target=lambda: found.append(triton.generate("small", labels=["1"], seeds=[3], steps=250, sampler="ddim"))
        )
        thread.start()
        time.sleep(0.2)
    thread.join(SECONDS)
    image = expected(bundles, [1], [3], steps=250, sampler="ddim")[0]
    assert found[0][0] == 200
    assert np.array_equal(pixels(found[0][1]["png"]), image)
    status, answer = triton.generate("small", labels=["1"])
    assert (status, "no available versions" in answer["error"]) == (404, True)
    with triton.loaded("small"):
        status, answer = triton.generate("small", labels=["1"], seeds=[3], steps=250, sampler="ddim")
        assert np.array_equal(pixels(answer["png"]), image)


def test_a_killed_stub(triton: Triton, tmp_path: Path) -> None:
    """As the page says: no answer, then refusals, while Triton says ready; unloading and loading repairs it.

    The server is one of its own, which now and then ends with the stub: that is what the page says too.
    """
    with Triton(tmp_path, triton.repository) as triton:
        assert triton.load("small") == (200, "")
        (stub,) = stubs_of(triton, "small")
        timed_out: list[bool] = []

        def wait() -> None:
            try:
                triton.generate("small", timeout=3, labels=["1"], steps=1000, sampler="ddim")
                timed_out.append(False)
            except OSError:  # no answer in time, or no connection any more
                timed_out.append(True)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        os.kill(stub, signal.SIGKILL)
        thread.join(SECONDS)
        assert timed_out == [True]
        if triton.has_ended():
            assert b"lock_exception" in triton.log.read_bytes()
            return
        status, answer = triton.generate("small", labels=["1"], steps=1)
        assert (status, "is not healthy" in answer["error"]) == (400, True)
        assert triton.ask("/v2/models/small/ready")[0] == 200
        triton.unload("small")
        assert triton.load("small") == (200, "")
        assert triton.generate("small", labels=["1"], steps=1)[0] == 200


def test_an_altered_bundle_is_refused_in_one_line(triton: Triton, bundles: dict[str, Path]) -> None:
    """Triton shows the model's message to whoever loads it."""
    folder = triton.repository
    assert run_command("dit-triton", bundles["fp32"], "-o", folder, "--name=altered", "--gpus=0").returncode == 0
    with (folder / "altered" / "1" / "bundle" / "graphs" / "step.weights").open("r+b") as file:
        file.write(b"\1\2\3")
    status, message = triton.load("altered")
    assert (status, "step.weights: altered (SHA-256" in message, "Traceback" in message) == (400, True, False), message


def stubs_of(triton: Triton, model: str) -> list[int]:
    """The processes of a model's instances."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            own = os.getsid(int(path.parent.name)) == triton._process.pid
            command = path.read_bytes().split(b"\0")
            if own and command[0].endswith(b"_stub") and f"/{model}/1/model.py".encode() in command[1]:
                found.append(int(path.parent.name))
    return found


def figures_of(triton: Triton, model: str) -> list[float]:
    """Images of each instance of a model."""
    return [count for name, count in triton.figures("dit_images").items() if name.startswith(f"{model}_")]
