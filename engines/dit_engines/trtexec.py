"""The builds of a recipe as commands of NVIDIA's ``trtexec``, for those who build elsewhere."""

from __future__ import annotations

import shlex
from pathlib import Path

from dit_engines.build import graphs_of
from dit_engines.recipe import Recipe, profiles_of
from dit_engines.targets import TARGETS
from dit_runtime.backends.profiles import Profile
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import BuildError

MIB = 1 << 20


def trtexec_commands(bundle: Bundle, recipe: Recipe, folder: Path = Path()) -> list[str]:
    """A shell command for each graph, which writes ``folder/GRAPH.plan``.

    trtexec leaves axes dynamic that have one size in all profiles; ``dit-build`` makes them static, which may choose
    faster kernels.

    Raises:
        BuildError: a target of TensorRT-RTX, which trtexec does not build for.
    """
    if TARGETS[recipe.target].library != "tensorrt":
        raise BuildError(
            f"target {recipe.target}: trtexec builds TensorRT's engines, not TensorRT-RTX's; choose a target of "
            "TensorRT, such as l4, or leave --print-trtexec out"
        )
    return [_command(bundle, recipe, graph, folder) for graph in graphs_of(bundle)]


def _command(bundle: Bundle, recipe: Recipe, graph: str, folder: Path) -> str:
    spec = bundle.manifest.graphs[graph]
    words = [
        "trtexec",
        f"--onnx={bundle.path / spec.file}",
        f"--saveEngine={folder / f'{graph}.plan'}",
        "--stronglyTyped",  # ignored by TensorRT 11, which has no other kind
        "--noTF32",
        f"--memPoolSize=workspace:{recipe.workspace_bytes // MIB}",  # in MiB
        "--profilingVerbosity=detailed",
        f"--timingCacheFile={folder / 'timing.cache'}",
        "--skipInference",
    ]
    if recipe.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={recipe.optimization_level}")
    if recipe.auxiliary_streams is not None:
        words.append(f"--maxAuxStreams={recipe.auxiliary_streams}")
    profiles = profiles_of(spec, recipe, bundle.manifest)
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={index}")
        words += [f"--{kind}Shapes={_shapes(profile, point)}" for point, kind in enumerate(("min", "opt", "max"))]
    return shlex.join(words)


def _shapes(profile: Profile, point: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, points[point]))}" for name, points in profile.items())
