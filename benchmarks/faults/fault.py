"""A fault, and what the verification says of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from faulty_engine import Alter, Edit, FaultyEngine, Spoil

from dit_runtime.backends.base import Engine
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import BundleError
from dit_runtime.verify import verification as verify
from dit_runtime.verify.effort import FULL, QUICK
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung

BELOW = "below FP16's own error"
NOT_THERE = "no fault in FP16"
IN_FP16_ONLY = "no fault in FP32"
PASSES = "passes"
REFUSED = "refused"  # in place of a rung: the bundle is not read
NONE = (BELOW, NOT_THERE, IN_FP16_ONLY, PASSES)
Patch = tuple[Any, str, Any]  # a module or class of the runtime, a name in it, and its replacement


@dataclass(frozen=True)
class Fault:
    """A mistake, and the first rung that fails with it.

    Attributes:
        name: the mistake in words.
        rung: the first rung that fails in FP32, or ``PASSES``, and in FP16 unless ``fp16`` names another.
        where: a part of the rung's detail, which points at the mistake.
        inputs: by graph, a function that changes the inputs.
        outputs: by graph, a function that changes the outputs.
        edits: by graph, a function that edits the graph.
        description: a function that changes the manifest.
        patches: replacements in the runtime.
        fp16: ``BELOW``, ``NOT_THERE``, or the rung that fails in FP16; empty for ``rung``.
        fp32: ``IN_FP16_ONLY``, or empty for ``rung``.
        files: a function that changes the files of a copy of the bundle, in its folder.
        graph: the graph that the mistake is in. A bundle without it, such as without an encoder, has no such fault.
        int8: whether the mistake is one of quantization, which only an INT8 bundle has; no other fault is seeded there.
        remembering: makes ``outputs`` that remember calls, for each engine.
        why: of a fault that passes, why it may.
        quick: whether the quick relations catch it, for a fault at inputs that no record has.
    """

    name: str
    rung: str
    where: str = ""
    inputs: Mapping[str, Alter] = field(default_factory=dict)
    outputs: Mapping[str, Spoil] = field(default_factory=dict)
    edits: Mapping[str, Edit] = field(default_factory=dict)
    description: Callable[[Bundle], Bundle] | None = None
    patches: Sequence[Patch] = ()
    fp16: str = ""
    fp32: str = ""
    graph: str = "step"
    files: Callable[[Path], None] | None = None
    int8: bool = False
    quick: bool = True
    remembering: Callable[[], Mapping[str, Spoil]] | None = None
    why: str = ""

    def is_in(self, bundle: Bundle) -> bool:
        """Whether a bundle is of the kind that this fault is seeded into."""
        manifest = bundle.manifest
        return self.graph in manifest.graphs and self.int8 == (manifest.precision.name == Precision.INT8)

    def expected(self, precision: str) -> str:
        """The name of the rung that should fail in a precision, or the reason why none does."""
        return self.fp32 or self.rung if precision == "fp32" else self.fp16 or self.rung

    @contextlib.contextmanager
    def seeded(self, bundle: Bundle, sound: Engine | None = None) -> Iterator[tuple[Bundle, FaultyEngine]]:
        """The bundle and an engine with this fault, while the runtime has it too."""
        with contextlib.ExitStack() as stack, np.errstate(all="ignore"):
            if self.files is not None:
                bundle = _change_files(bundle, self.files, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            if self.description is not None:
                bundle = self.description(bundle)
            outputs = self.remembering() if self.remembering else self.outputs
            engine = FaultyEngine(
                sound or OnnxRuntimeEngine(bundle, threads=1), bundle, self.inputs, outputs, self.edits
            )
            for patch in self.patches:
                stack.enter_context(mock.patch.object(*patch))
            yield bundle, engine

    def first_failure(self, bundle: Bundle, sound: Engine | None = None) -> Rung | None:
        """The first rung that fails with this fault, or one named ``REFUSED`` if the bundle is not read."""
        try:
            with self.seeded(bundle, sound) as (changed, engine):
                return next((rung for rung in verify.verify(changed, engine) if not rung.passed), None)
        except BundleError as error:
            return Rung(REFUSED, math.inf, 0.0, "relative", str(error))

    def first_broken_relation(self, bundle: Bundle, sound: Engine | None = None) -> Rung | None:
        """The first relation that does not hold with this fault, without the rungs of the records before them."""
        with self.seeded(bundle, sound) as (changed, engine):
            rungs = verify.relations(Replay(changed, engine), QUICK if self.quick else FULL)
            return next((rung for rung in rungs if not rung.passed), None)


def _change_files(bundle: Bundle, change: Callable[[Path], None], folder: Path) -> Bundle:
    """A copy of a bundle in ``folder`` with changed files, as if it had been exported so."""
    path = Path(shutil.copytree(bundle.path, folder / bundle.path.name))
    change(path)
    file = path / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    for name, spec in manifest["files"].items():
        content = (path / name).read_bytes()
        spec.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    file.write_text(json.dumps(manifest), encoding="utf-8")
    return open_bundle(path)
