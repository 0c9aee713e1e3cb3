"""One decoder for all JSON files: a value of its declared type and range, or one line that says where and why not."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_runtime.bundle.manifest import (
    SCHEMA,
    AutoencoderSpec,
    DefaultsSpec,
    DiffusionSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    PrecisionSpec,
    SourceSpec,
    TensorSpec,
    manifest_from_json,
)
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.decode import (
    Amount,
    DecodeError,
    Natural,
    Positive,
    Range,
    decode,
    json_from_bytes,
    read_json,
    replace_controls,
    schema_of,
)
from dit_runtime.core.errors import BundleError
from dit_runtime.core.reading import MANIFEST_BYTES


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Point:
    x: float
    y: Annotated[float, Range(-1, 1)]


@dataclass(frozen=True)
class Drawing:
    name: str
    count: Positive
    closed: bool
    colour: Colour
    style: Literal["line", "dots"]
    size: tuple[Natural, Natural]
    points: tuple[Point, ...]
    notes: list[str]
    weights: dict[str, Amount]
    axis: int | str
    frame: Point | None
    extra: Any


GOOD: dict[str, Any] = {
    "name": "a",
    "count": 1,
    "closed": False,
    "colour": "red",
    "style": "dots",
    "size": [0, 2],
    "points": [{"x": 1, "y": -1.0}, {"x": -0.5, "y": 1}],
    "notes": ["n"],
    "weights": {"a/b": 0, "c": 2.5},
    "axis": "batch",
    "frame": None,
    "extra": {"anything": [None]},
}
DRAWING = Drawing(
    name="a",
    count=1,
    closed=False,
    colour=Colour.RED,
    style="dots",
    size=(0, 2),
    points=(Point(1.0, -1.0), Point(-0.5, 1.0)),
    notes=["n"],
    weights={"a/b": 0.0, "c": 2.5},
    axis="batch",
    frame=None,
    extra={"anything": [None]},
)


def test_every_kind_of_field() -> None:
    """Each declared type arrives as itself: lists as tuples, whole numbers as floats, text as an enum's member."""
    found = decode(Drawing, GOOD)
    assert found == DRAWING
    assert [type(point.x) for point in found.points] == [float, float]
    assert decode(Drawing, {**GOOD, "axis": 3, "frame": {"x": 0, "y": 0}}).frame == Point(0, 0)
    assert decode(tuple[Point, ...], GOOD["points"]) == DRAWING.points


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "name: got 3, expected text"),
        ({"name": None}, "name: got None, expected text"),
        ({"count": True}, "count: got True, expected a whole number from 1"),
        ({"count": 1.0}, "count: got 1.0, expected a whole number from 1"),
        ({"count": 0}, "count: got 0, expected a whole number from 1"),
        ({"closed": 0}, "closed: got 0, expected true or false"),
        ({"colour": "green"}, "colour: got 'green', expected one of 'red', 'blue'"),
        ({"colour": "RED"}, "colour: got 'RED', expected one of 'red', 'blue'"),
        ({"style": 1}, "style: got 1, expected one of 'line', 'dots'"),
        ({"size": [1]}, "size: got [1], expected a list of 2"),
        ({"size": [1, -2]}, "size[1]: got -2, expected a whole number from 0"),
        ({"size": "12"}, "size: got '12', expected a list of 2"),
        ({"points": {}}, "points: got {}, expected a list"),
        ({"points": [{"x": 1, "y": 0}, 7]}, "points[1]: got 7, expected an object"),
        ({"points": [{"x": 1, "y": 1.5}]}, "points[0].y: got 1.5, expected a finite number from -1 to 1"),
        ({"points": [{"x": 10**400, "y": 0}]}, "points[0].x: got 1000000"),
        ({"points": [{"x": True, "y": 0}]}, "points[0].x: got True, expected a finite number"),
        ({"points": [{"x": float("nan"), "y": 0}]}, "points[0].x: got nan, expected a finite number"),
        ({"points": [{"x": float("inf"), "y": 0}]}, "points[0].x: got inf, expected a finite number"),
        ({"points": [{"x": 1}]}, "points[0].y: missing, expected a finite number from -1 to 1"),
        ({"points": [{"x": 1, "y": 0, "z": 0}]}, "points[0].z: unknown, expected only x, y"),
        ({"notes": [""] * 2 + [None]}, "notes[2]: got None, expected text"),
        ({"weights": {"a/b": -1}}, "weights['a/b']: got -1, expected a finite number from 0"),
        ({"weights": {"c": "1"}}, "weights.c: got '1', expected a finite number from 0"),
        ({"weights": []}, "weights: got [], expected an object"),
        ({"axis": 1.5}, "axis: got 1.5, expected a whole number or text"),
        ({"frame": 1}, "frame: got 1, expected an object or null"),
        ({"frame": {"x": 0, "y": 7}}, "frame.y: got 7, expected a finite number from -1 to 1"),
        ({"more": 1}, "more: unknown, expected only name, count"),
    ],
)
def test_a_wrong_value(changes: dict[str, Any], message: str) -> None:
    """The place, what is there and what was expected, whatever is wrong."""
    with pytest.raises(DecodeError) as refused:
        decode(Drawing, {**GOOD, **changes})
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\0", "\x7f", "\x9b", "a\u2028b", "\u202eb"])
def test_text_for_terminals(text: str) -> None:
    """Text goes into messages and listings: none of it moves a cursor, ends a line or turns the writing round."""
    for changes in ({"name": text}, {"notes": [text]}, {"weights": {text: 1}}):
        with pytest.raises(DecodeError, match=r"expected text without control characters$"):
            decode(Drawing, {**GOOD, **changes})
    assert decode(Drawing, {**GOOD, "name": replace_controls(text)}).name.isprintable()
    assert decode(Drawing, {**GOOD, "name": "ده‌میلی 👩‍🚀 é　"}).name == "ده‌میلی 👩‍🚀 é　"


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_field(name: str) -> None:
    """No field has a default that would hide its absence."""
    with pytest.raises(DecodeError, match=f"^{name}: missing, expected "):
        decode(Drawing, {key: value for key, value in GOOD.items() if key != name})


def test_the_place_at_the_top() -> None:
    """A file that is no object at all is told without a place, or with the one that the caller names."""
    with pytest.raises(DecodeError, match=r"^got \[\], expected an object$"):
        decode(Drawing, [])
    with pytest.raises(DecodeError, match=r"^audit\.x: got 'a', expected"):
        decode(Point, {"x": "a", "y": 0}, "audit")


@pytest.mark.parametrize(
    "value", ["x" * 10_000, ["y" * 10_000] * 10_000, {"z" * 10_000: "z"}, "two\nlines\x1b", 10**4000]
)
def test_a_message_is_short(value: Any) -> None:
    """What a message shows of a value or a key is one line of a few hundred characters."""
    for changes in ({"closed": value}, {"weights": {str(value)[:20_000]: value}}):
        with pytest.raises(DecodeError) as refused:
            decode(Drawing, {**GOOD, **changes})
        assert len(str(refused.value)) < 400
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value"),
        (b"{", "not JSON: Expecting property name"),
        (b"\xff\xfe", "not JSON: 'utf-8' codec"),
        (b"[NaN]", "not JSON: it holds NaN, which is not a finite number"),
        (b"[-Infinity]", "not JSON: it holds -Infinity"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "not JSON: key 'c' is there twice"),
        (b"9" * 5000, "not JSON: it holds '9999"),
        (b"[18446744073709551616]", "not JSON: it holds '18446744073709551616', which is beyond 64 bits"),
        (b"[-9223372036854775809]", "not JSON: it holds '-9223372036854775809', which is beyond 64 bits"),
        (b"[1e999]", "not JSON: it holds '1e999', which is beyond every floating-point number"),
        (b'{"\\ud800": 1}', "not JSON: it holds half a surrogate pair"),
        (b'["\\udc00\\ud800"]', "not JSON: it holds half a surrogate pair"),
        (b'"\xed\xa0\x80"', "not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not JSON: nested 100000 levels deep, expected 32 at most"),
        (b'{"a":' * 100_000, "not JSON: nested 100000 levels deep"),
        (b"[" * 33 + b"]" * 33, "not JSON: nested 33 levels deep"),
        (b'["' + b"\\" * 4 + b'",' + b"[" * 33, "not JSON: nested 34 levels deep"),
        (b"[" + b"[]," * 3_000_000 + b"[]]", "not JSON: about 9000004 values"),
    ],
)
def test_text_that_is_not_json(tmp_path: Path, content: bytes, message: str) -> None:
    """One error for all: no text, cut short, other bytes, numbers that JSON lacks, a key twice, endless nesting."""
    path = tmp_path / "it.json"
    path.write_bytes(content)
    with pytest.raises(DecodeError) as refused:
        read_json(path, len(content))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    "value",
    [
        "[" * 100,
        '"' * 100,
        "\\" * 101,
        '\\"[' * 50,
        ["]" * 100, "}" * 100, {'{"': "[" * 100}],
        [[[[[[[[[[1]]]]]]]]]],
        "\ud83d\ude00",
        ["😀", -(2**63), 2**64 - 1, 5e-324, -1.7976931348623157e308],
    ],
)
def test_brackets_in_text_are_no_levels(value: Any) -> None:
    """What is counted before the text is parsed is what the parser would see."""
    for ascii_only in (True, False):
        with contextlib.suppress(UnicodeEncodeError):
            assert json_from_bytes(json.dumps(value, ensure_ascii=ascii_only).encode()) == json.loads(json.dumps(value))


@given(st.recursive(st.text(alphabet='[]{}",\\a', max_size=6), lambda inner: st.lists(inner, max_size=3), max_leaves=9))
def test_the_depth_of_any_document(value: Any) -> None:
    """Fails where quotes, escapes or brackets in text are taken for others: a sound document would be refused."""
    deep = value
    for _ in range(31 - str(value).count("[") if isinstance(value, list) else 31):
        deep = [deep]
    assert json_from_bytes(json.dumps(deep).encode()) == deep
    with pytest.raises(DecodeError, match="nested"):
        json_from_bytes(b"[" * 32 + json.dumps([value]).encode() + b"]" * 32)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, a pipe (which would wait) and too many bytes are the same error."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("1" * 11)
    for path, message in (
        (tmp_path / "none", r"cannot be read \(No such file or directory\)"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "large", "larger than 10 bytes"),
    ):
        with pytest.raises(DecodeError, match=message):
            read_json(path, 10)
    assert read_json(tmp_path / "large", 11) == 11111111111


@pytest.mark.parametrize("raw", [[], None, 5, {}, {"schema": "5"}, {"schema": True}, {"schema": None}])
def test_no_schema(raw: Any) -> None:
    """A file without a number under ``schema`` is none of ours, whatever it is."""
    with pytest.raises(DecodeError, match=r"^schema: (missing|got .*), expected a whole number$"):
        schema_of(raw)


def manifest() -> Manifest:
    """A manifest of a small model: all graphs, a further size, floors and magnitudes."""
    table = TensorSpec("modulation", "float32", ("rows", 14, 64))

    def graph(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> GraphSpec:
        return GraphSpec(f"graphs/{name}.onnx", f"graphs/{name.partition('-')[0]}.weights", inputs, outputs)

    graphs = {
        "conditioner": graph(
            "conditioner",
            (TensorSpec("timesteps", "float32", ("rows",)), TensorSpec("labels", "int32", ("rows",))),
            (table,),
        ),
        "decoder": graph(
            "decoder",
            (TensorSpec("latents", "float32", ("batch", 4, "height", "width")),),
            (
                TensorSpec("images", "uint8", ("batch", "4*height", "4*width", 3)),
                TensorSpec("decoded", "float32", ("batch", 3, "4*height", "4*width")),
            ),
        ),
    }
    for suffix, size in (("", (8, 8)), ("-8x12", (8, 12))):
        latents, state = ("batch", 4, *size), ("batch", 3, 4, *size)
        inputs = (
            TensorSpec("state", "float32", state),
            TensorSpec("noise", "float32", latents),
            TensorSpec("coefficients", "float32", ("batch", 17)),
            TensorSpec("guidance", "float32", ("branches", "batch", 4)),
            TensorSpec("rows", "int32", ("branches", "batch")),
            table,
        )
        outputs = (TensorSpec("next_state", "float32", state), TensorSpec("denoised", "float32", latents))
        tokens = ("branches*batch", size[0] * size[1] // 4, 64)
        blocks = tuple(TensorSpec(f"blocks.{index}", "float32", tokens) for index in range(2))
        graphs[f"step{suffix}"] = graph(f"step{suffix}", inputs, outputs)
        graphs[f"probe{suffix}"] = graph(f"probe{suffix}", inputs, (*outputs, *blocks))
    names = {name for each in graphs.values() for name in (each.file, each.weights)}
    return Manifest(
        schema=SCHEMA,
        producer={"dit-export": "0.1.0"},
        source=SourceSpec("tiny", None, "the reference", "a" * 64),
        model=ModelSpec("adaln-zero", 4, (8, 8), 2, 64, 2, 2, 256, 3, True),
        sizes=((8, 8), (8, 12)),
        diffusion=DiffusionSpec((0.1, 0.5, 1.0), "epsilon", 3, "leading", 0, True),
        autoencoder=AutoencoderSpec("AutoencoderKL", 0.18215, 0.0, 4),
        precision=PrecisionSpec("fp16", ("patch_embed", "final")),
        defaults=DefaultsSpec("ddim", 50, 4.0),
        class_names=("bag", "boot", "coat"),
        graphs=graphs,
        tolerances={"fp16": {"forward": 0.01}},
        thresholds={"fp16": {"forward": 2.0}},
        floors={"fp16": {"blocks": (0.001, 0.002)}},
        magnitudes={"blocks.0": 12.5},
        files={name: FileSpec(100_000, "b" * 64) for name in sorted(names)},
    )


MANIFEST = json.loads(manifest().to_json())
# One of each kind that JSON has, and those that a check might let through.
VALUES = st.one_of(
    *map(
        st.just, (None, True, False, 0, 1, -1, 2**200, 0.5, -1e-9, 1e308, "", "fp16", "..", "a\nb", [], {}, [1], [[]])
    ),
    st.just({"": None}),
    st.text(max_size=5),
)


def places(raw: Any, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every value of a JSON document by the keys and indices that lead to it."""
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        yield (*here, key)
        yield from places(value, (*here, key))


def opened(folder: Path, raw: Any) -> Bundle | BundleError:
    """The bundle of a manifest, or the one error that it may end in."""
    (folder / "manifest.json").write_text(json.dumps(raw))
    try:
        return open_bundle(folder)
    except BundleError as error:
        refused = error
    assert str(refused).startswith(f"{folder / 'manifest.json'}: ")
    assert "\n" not in str(refused)
    assert str(refused).endswith(("copy or export the bundle again", "install the dit-export that wrote it"))
    return refused


# Fields that a manifest leaves out where they have these values.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "model": {
        "qk_norm": "none",
        "norm": "layer",
        "mlp": "gelu",
        "rotary": False,
        "times": 1,
        "clips": False,
        "observation": 0,
        "time_width": 0,
    },
    "diffusion": {"time": "noise-at-0", "time_shift": 1.0, "second_time": None, "guidance_inside": False},
    "autoencoder": {"latents_mean": [], "latents_std": []},
    "precision": {"keep_fp16": []},
}


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    """The manifest that the next tests change is a sound one, and nothing of it is lost."""
    found = opened(tmp_path, MANIFEST)
    assert isinstance(found, Bundle)
    assert found.manifest == manifest()
    written = json.loads(json.dumps(asdict(manifest())))
    assert written["model"].pop("has_null")  # left out where it is true
    assert not any(written["diffusion"].pop("options").values())  # left out where nothing is stated
    for part, defaults in LEFT_OUT.items():
        assert {key: written[part].pop(key) for key in defaults} == defaults
    assert written.pop("calibration") is None  # of an INT8 bundle alone
    assert json.loads(found.manifest.to_json()) == written
    written["model"]["has_null"] = False
    assert json.loads(manifest_from_json(written).to_json()) == written


PLACES = sorted(places(MANIFEST), key=str)


@given(st.sampled_from(PLACES), VALUES)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_manifest(tmp_path: Path, place: tuple[str | int, ...], value: Any) -> None:
    """Whatever replaces one value of a manifest, the result is a manifest that says it, or one error."""
    raw = copy.deepcopy(MANIFEST)
    *above, last = place
    inner = raw
    for key in above:
        inner = inner[key]
    inner[last] = value
    found = opened(tmp_path, raw)
    if isinstance(found, Bundle):
        assert json.loads(found.manifest.to_json()) == raw


@given(st.sampled_from([place for place in PLACES if isinstance(place[-1], str)]))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_manifest_without_one_of_its_fields(tmp_path: Path, place: tuple[str | int, ...]) -> None:
    """A field that is gone is one error that says so; only a table's own entries may be fewer."""
    raw = copy.deepcopy(MANIFEST)
    *above, last = place
    inner = raw
    for key in above:
        inner = inner[key]
    del inner[last]
    found = opened(tmp_path, raw)
    if isinstance(found, Bundle):
        assert above[:1] in (["producer"], ["tolerances"], ["thresholds"], ["floors"], ["magnitudes"])
    elif above[:1] not in (["graphs"], ["files"], ["tolerances"], ["thresholds"]):
        assert f"{last}: missing, expected" in str(found)


def test_a_manifest_beyond_its_size(tmp_path: Path) -> None:
    """A file that is larger than any manifest is not read into memory."""
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match=f"not a manifest .*larger than {MANIFEST_BYTES} bytes"):
        open_bundle(tmp_path)


def test_json_is_utf_8() -> None:
    """Text beyond ASCII is read in the encoding that is written."""
    assert json_from_bytes('{"é": "½"}'.encode()) == {"é": "½"}
