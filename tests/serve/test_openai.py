"""OpenAI's own client against a running server: its calls, its types, and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="pip install 'dit-export[serve]'")
pytest.importorskip("openai", reason="pip install openai")

import openai
from support.server import TOKEN, Running, expected, pixels


@pytest.fixture(scope="module")
def running(bundles: dict[str, Path]) -> Iterator[Running]:
    with Running(bundles["fp32"], token=TOKEN) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


def test_images_of_a_class(client: Any, bundles: dict[str, Path]) -> None:
    """A prompt is a class by its name; other settings go into the extra body."""
    found = client.images.generate(
        model="tiny",
        prompt="class 4, kind 4",
        n=2,
        size="32x32",
        response_format="b64_json",
        extra_body={"seed": 9, "steps": 3, "guidance": 2.0, "sampler": "dpmpp-2m"},
    )
    images = expected(bundles, [4, 4], 9, steps=3, guidance=2.0, sampler="dpmpp-2m")
    assert found.created > 0
    for each, image in zip(found.data, images, strict=True):
        assert np.array_equal(pixels(each.b64_json), image)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_stream(client: Any, bundles: dict[str, Path]) -> None:
    """Its events have the client's types, the last one the image."""
    stream = client.images.generate(
        prompt="4", stream=True, partial_images=2, size="auto", extra_body={"seed": 9, "steps": 6, "sampler": "ddim"}
    )
    events = list(stream)
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    assert np.array_equal(pixels(events[-1].b64_json), expected(bundles, [4], 9, steps=6, sampler="ddim")[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "a cat in space"}, "a cat in space"),
        ({"prompt": "4", "size": "1024x1024"}, "this server makes 32x32"),
        ({"prompt": "4", "response_format": "url"}, "response_format"),
        ({"prompt": "4", "n": 65}, "n: got 65"),
        ({"prompt": "4", "quality": "hd"}, "quality"),
    ],
)
def test_what_the_client_is_told_to_change(client: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**settings)
    assert message in caught.value.body["message"]
    assert caught.value.type == "invalid_request_error"


def test_a_wrong_token(running: Running) -> None:
    address = f"http://127.0.0.1:{running.port}/v1"
    with openai.OpenAI(base_url=address, api_key="other") as client, pytest.raises(openai.AuthenticationError):
        client.images.generate(prompt="4")


def test_a_full_queue(client: Any) -> None:
    """The server takes eight images that wait; the client knows when to come again."""
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="4", n=20)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.type == "rate_limit_error"


def test_too_late(client: Any) -> None:
    """A server that is too slow is an error of the client's own class."""
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="4", extra_body={"steps": 1000, "sampler": "ddim", "timeout": 0.05})
    assert caught.value.status_code == 504
