"""Engines from a bundle: each graph compiled in a process of its own, audited, and stored only when it passes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_engines.audit import Audit, ProfileAudit, problems
from dit_engines.external_data import check_external_data
from dit_engines.recipe import Recipe, profiles_of
from dit_runtime.bundle import ENCODER, ENGINES, Bundle
from dit_runtime.errors import BuildError
from dit_runtime.files import check_writable, replaced_folder, sha256_of
from dit_runtime.progress import Progress

BUILT_GRAPHS = ("conditioner", "step", "decoder", ENCODER)  # the probe is for ONNX Runtime and OpenVINO only
SIDECAR = "engine.json"


@dataclass(frozen=True)
class BuiltGraph:
    """A compiled graph: its plan's size and hash, the audit, and the seconds it took."""

    graph: str
    plan: str
    plan_bytes: int
    plan_sha256: str
    seconds: float
    audit: Audit


@dataclass(frozen=True)
class BuiltEngine:
    """What a folder of the engine store holds."""

    folder: Path
    bundle: str
    builder: str
    recipe: Recipe
    graphs: tuple[BuiltGraph, ...]
    reused: bool


def engine_from_bundle(bundle: Bundle, recipe: Recipe, store: Path | None = None) -> BuiltEngine:
    """Compile a bundle's graphs, or find them compiled.

    The key covers the bundle's digest, the recipe and the library's version; a stored engine is reused when its plans
    still have their hashes.

    Raises:
        BuildError: the library is missing, a graph cannot be built, or the audit found less than was asked for.
        BundleError: a file of the bundle is missing or altered.
        OutputError: the store cannot be written.
    """
    builder = _builder_version()
    identity = json.dumps([bundle.digest, bundle.manifest.image_size, recipe.as_json(), builder], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    name = f"{recipe.target}-sm{recipe.compute_capability.replace('.', '')}-{key}"
    folder = (store or bundle.path / ENGINES) / name
    if (stored := _stored(folder, bundle, recipe, builder)) is not None:
        return stored
    check_writable(folder)
    graphs: list[BuiltGraph] = []
    with replaced_folder(folder) as temporary:
        wanted = [graph for graph in BUILT_GRAPHS if graph in bundle.manifest.graphs]
        with Progress("building", 100 * len(wanted)) as bar:
            for graph in wanted:
                bar.describe(f"building {graph} for {recipe.target} {recipe.compute_capability}")
                graphs.append(_built(bundle, recipe, graph, temporary, bar))
        model, precision = bundle.manifest.model, bundle.manifest.precision
        found = [problem for built in graphs for problem in problems(built.audit, built.graph, model, precision)]
        if found:
            raise BuildError(
                f"{bundle.path}: the engine is not the {precision.name} that was asked for: {'; '.join(found)}; "
                "nothing was stored; export the bundle again"
            )
        sidecar = {
            "bundle": bundle.digest,
            "image_size": bundle.manifest.image_size,
            "builder": builder,
            "recipe": recipe.as_json(),
            "tf32": False,
            "graphs": [asdict(built) for built in graphs],
        }
        (temporary / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    return BuiltEngine(folder, bundle.digest, builder, recipe, tuple(graphs), reused=False)


def _builder_version() -> str:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise BuildError("TensorRT-RTX is not installed; pip install 'dit-export[rtx]'")
    for name in ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "tensorrt-rtx"


def _built(bundle: Bundle, recipe: Recipe, graph: str, folder: Path, bar: Progress) -> BuiltGraph:
    onnx = bundle.graph(graph)
    check_external_data(onnx)
    plan = folder / f"{graph}.plan"
    request = {
        "onnx": os.fspath(onnx),
        "plan": os.fspath(plan),
        "compute_capability": recipe.compute_capability,
        "profiles": profiles_of(bundle.manifest.graphs[graph], recipe, bundle.manifest),
    }
    start = time.monotonic()
    result: dict[str, Any] = {}
    advanced = 0
    with subprocess.Popen(
        [sys.executable, "-m", "dit_engines.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    done, total = message["progress"]
                    share = min(100, 100 * done // max(total, 1))
                    bar.advance(max(0, share - advanced))
                    advanced = max(share, advanced)
                else:
                    result = message
        except BaseException:
            process.kill()
            raise
    if "error" in result:
        raise BuildError(f"{onnx}: {result['error']}; report it with dit-build --version and the bundle's manifest")
    if "result" not in result:
        raise BuildError(f"{onnx}: the builder process ended with {process.returncode}; most likely memory ran out")
    bar.advance(100 - advanced)
    built = result["result"]
    if built["tf32"]:
        raise BuildError(f"{onnx}: the builder kept TF32 on, which FP32 parity does not allow")
    profiles = [ProfileAudit(**profile) for profile in built["audit"]["profiles"]]
    return BuiltGraph(
        graph=graph,
        plan=plan.name,
        plan_bytes=built["plan_bytes"],
        plan_sha256=sha256_of(plan),
        seconds=round(time.monotonic() - start, 1),
        audit=Audit(built["audit"]["weights_bytes"], profiles),
    )


def _stored(folder: Path, bundle: Bundle, recipe: Recipe, builder: str) -> BuiltEngine | None:
    """The engine in ``folder`` when it is whole and what is wanted."""
    try:
        sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        if (sidecar["bundle"], sidecar["builder"], sidecar["recipe"]["target"]) != (
            bundle.digest,
            builder,
            recipe.target,
        ):
            return None
        graphs = []
        for stored in sidecar["graphs"]:
            audit = Audit(
                stored["audit"]["weights_bytes"], [ProfileAudit(**item) for item in stored["audit"]["profiles"]]
            )
            built = BuiltGraph(**{**stored, "audit": audit})
            if Path(built.plan).name != built.plan or sha256_of(folder / built.plan) != built.plan_sha256:
                return None
            graphs.append(built)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return BuiltEngine(folder, bundle.digest, builder, recipe, tuple(graphs), reused=True)
