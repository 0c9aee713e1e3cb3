"""Recipes: which shapes an engine is built for, and the same build as trtexec's commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_command

from dit_engines.recipe import profiles_of, recipe_for
from dit_engines.trtexec import trtexec_commands
from dit_runtime.backends.profiles import Profile
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import BuildError


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp16"])


def profiles(bundle: Bundle, graph: str, *arguments: Any, **options: Any) -> list[Profile]:
    recipe = recipe_for(*arguments, **options)
    return profiles_of(bundle.manifest.graphs[graph], recipe, bundle.manifest)


def test_a_profile_for_each_branch_count(bundle: Bundle) -> None:
    """Two narrow profiles for G=1 and G=2; the decoder's takes a tile where it decodes in tiles."""
    first, second = profiles(bundle, "step", "rtx", "12.0", 8, (2, 1), 500)
    assert first["rows"] == ((1, 1), (1, 1), (1, 8))
    assert second["guidance"] == ((2, 1, 4), (2, 1, 4), (2, 8, 4))
    assert second["modulation"] == ((1, 14, 64), (100, 14, 64), (500, 14, 64))
    (decoder,) = profiles(bundle, "decoder", "rtx", "12.0", 8, (2, 1), 500, decode_tile=4)
    assert decoder["latents"] == ((1, 4, 4, 4), (1, 4, 4, 4), (8, 4, 4, 4))  # a tile, not the 8×8 latents
    (conditioner,) = profiles(bundle, "conditioner", "rtx", "12.0", (1, 8), (2, 1), 500)
    assert conditioner["labels"] == ((1,), (100,), (500,))


def test_a_profile_for_each_range_of_the_batch(bundle: Bundle) -> None:
    """1, 4, 8 are the ranges 1, 2 to 4 and 5 to 8, the larger ones fastest at their end, times the branch counts."""
    rows = [item["rows"] for item in profiles(bundle, "step", "rtx", "8.9", (8, 1, 4), (1, 2), 64)]
    assert rows == [
        ((1, 1), (1, 1), (1, 1)),
        ((2, 1), (2, 1), (2, 1)),
        ((1, 2), (1, 4), (1, 4)),
        ((2, 2), (2, 4), (2, 4)),
        ((1, 5), (1, 8), (1, 8)),
        ((2, 5), (2, 8), (2, 8)),
    ]
    decoder = profiles(bundle, "decoder", "rtx", "8.9", (1, 4), (1, 2), 64)
    assert [(item["latents"][0][0], item["latents"][2][0]) for item in decoder] == [(1, 1), (2, 4)]


def test_jetpack_6_has_one_profile(bundle: Bundle) -> None:
    """TensorRT 10.3: the batch is fixed and G alone varies; several batches are refused with what to do."""
    (step,) = profiles(bundle, "step", "orin-nano", None, 2, (1, 2), 64)
    assert step["rows"] == ((1, 2), (2, 2), (2, 2))
    assert step["state"] == ((2, 3, 4, 8, 8),) * 3
    assert len(profiles(bundle, "step", "orin-nano", None, 2, (1, 2), 64, version=(10, 16, 2))) == 2
    with pytest.raises(BuildError, match=r"batches 1,4: TensorRT 10\.3 .* one optimization profile only .*--batch 1"):
        recipe_for("orin-nano", None, (1, 4), (1, 2), 64)
    with pytest.raises(BuildError, match=r"branches 1,2: TensorRT 10\.3 .*--batch 1 --branches 2"):
        recipe_for("orin-nano", None, 1, (1, 2), 64, static=True)
    assert recipe_for("orin-nano", None, 1, (2,), 64, static=True).static


def test_static_engines(bundle: Bundle) -> None:
    """``--static`` builds for the numbers named alone; the length of the table stays free, which no kernel sees."""
    found = profiles(bundle, "step", "rtx", "8.9", (1, 4), (2,), 64, static=True)
    assert [item["rows"] for item in found] == [((2, 1),) * 3, ((2, 4),) * 3]
    assert [item["state"][2][0] for item in found] == [1, 4]
    assert found[0]["modulation"] == ((1, 14, 64), (64, 14, 64), (64, 14, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("orin", "8.7", 1, (1,), 2), "target 'orin' is not supported; choose one of orin-nano"),
        (("rtx", "9.0", 1, (1,), 2), "compute capability '9.0': these graphs build with TensorRT-RTX for 8.0"),
        (("rtx", "7.5", 1, (1,), 2), "compute capability '7.5': these graphs build with TensorRT-RTX for 8.0"),
        (("rtx", None, 1, (1,), 2), "target rtx: name the GPU with --compute-capability"),
        (("rtx-40", "8.6", 1, (1,), 2), "target rtx-40 has compute capability 8.9, got 8.6"),
        (("rtx", "8.9", 1, (0,), 2), "branches"),
        (("rtx", "8.9", 1, (1, 1), 2), "branches"),
        (("rtx", "8.9", 1, (), 2), "branches"),
        (("rtx", "8.9", 0, (1,), 2), "batches"),
        (("rtx", "8.9", (4, 4), (1,), 2), "batches"),
        (("rtx", "8.9", 1, (1,), 1), "1 rows"),
    ],
)
def test_impossible_recipes(arguments: tuple[Any, ...], message: str) -> None:
    """What cannot be built is refused with what can."""
    with pytest.raises(BuildError, match=message):
        recipe_for(*arguments)


def test_trtexec_builds_the_same(bundle: Bundle, tmp_path: Path) -> None:
    """Read back, each command has the profiles of the recipe, precision from the graph, and whole paths."""
    recipe = recipe_for("l4", None, (1, 4), (1, 2), 64, version=(10, 16), auxiliary_streams=0)
    folder = tmp_path / "a folder"
    commands = dict(zip(("conditioner", "step", "decoder"), trtexec_commands(bundle, recipe, folder), strict=True))
    for graph, command in commands.items():
        program, *options = shlex.split(command)
        assert program == "trtexec"
        assert f"--onnx={bundle.path / bundle.manifest.graphs[graph].file}" in options
        assert f"--saveEngine={folder / graph}.plan" in options
        assert {"--stronglyTyped", "--noTF32", "--memPoolSize=workspace:3072", "--maxAuxStreams=0"} < set(options)
        assert not [option for option in options if option in ("--fp16", "--best")]
        found: list[dict[str, list[tuple[int, ...]]]] = []
        for option in options:
            name, _, value = option.partition("=")
            if name == "--profile":
                assert int(value) == len(found)
                found.append({})
            elif name.endswith("Shapes"):
                if not found:
                    found.append({})
                for item in value.split(","):
                    tensor, _, sizes = item.partition(":")
                    found[-1].setdefault(tensor, []).append(tuple(map(int, sizes.split("x"))))
        expected = profiles_of(bundle.manifest.graphs[graph], recipe, bundle.manifest)
        assert found == [{name: list(points) for name, points in profile.items()} for profile in expected]


def test_trtexec_is_not_of_rtx(bundle: Bundle) -> None:
    """TensorRT-RTX's engines are another kind, so no command is printed that would build the wrong one."""
    with pytest.raises(BuildError, match="target rtx-40: trtexec builds engines of TensorRT, not of TensorRT-RTX;"):
        trtexec_commands(bundle, recipe_for("rtx-40", None, 1, (1,), 64))


def test_trtexec_from_the_command(bundle: Bundle) -> None:
    """``--print-trtexec`` needs neither the device nor its library; the version decides how many profiles there are."""
    common = ("dit-build", bundle.path, "--target", "orin-nano", "--batch", "1", "--print-trtexec")
    old, later = run_command(*common), run_command(*common, "--tensorrt-version", "10.16")
    assert (old.returncode, later.returncode) == (0, 0), old.stderr + later.stderr
    assert "--profile=" not in old.stdout
    assert "--profile=1 " in later.stdout
    assert "expected a version such as 10.3" in run_command(*common, "--tensorrt-version", "latest").stderr
