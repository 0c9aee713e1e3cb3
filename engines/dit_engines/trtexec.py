"""The builds of a recipe as commands of NVIDIA's ``trtexec``, to build on a machine without this tool."""

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

    trtexec leaves an axis dynamic that has one size in all profiles; ``dit-build`` makes it static, so that the builder
    may choose faster kernels.

    Raises:
        BuildError: a target of TensorRT-RTX, which trtexec does not build for.
        BundleError: a graph is missing, altered or damaged.
    """
    if TARGETS[recipe.target].library != "tensorrt":
        raise BuildError(
            f"target {recipe.target}: trtexec builds engines of TensorRT, not of TensorRT-RTX; choose a target of "
            "TensorRT, such as l4, or leave --print-trtexec out"
        )
    return [_command_for(bundle, recipe, graph, folder) for graph in graphs_of(bundle)]


def _command_for(bundle: Bundle, recipe: Recipe, graph: str, folder: Path) -> str:
    spec = bundle.manifest.graphs[graph]
    words = [
        "trtexec",
        f"--onnx={bundle.graph(graph)}",
        f"--saveEngine={folder / f'{graph}.plan'}",
        "--stronglyTyped",  # TensorRT 11 ignores it: it has no other kind
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
        words += [f"--{kind}Shapes={_shapes_text(profile, point)}" for point, kind in enumerate(("min", "opt", "max"))]
    return shlex.join(words)


def _shapes_text(profile: Profile, point: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, points[point]))}" for name, points in profile.items())
