"""A fault, and what the verification says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from faulty_engine import Alter, Edit, FaultyEngine, Spoil

from dit_runtime.backends.base import Engine
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle
from dit_runtime.verify import verification as verify
from dit_runtime.verify.effort import FULL, QUICK
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung

BELOW = "below FP16's own error"
NOT_THERE = "no fault in FP16"
IN_FP16_ONLY = "no fault in FP32"
PASSES = "passes"
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
        graph: the graph that the mistake is in. A bundle without it, such as without an encoder, has no such fault.
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
    quick: bool = True
    remembering: Callable[[], Mapping[str, Spoil]] | None = None
    why: str = ""

    def expected(self, precision: str) -> str:
        """The name of the rung that should fail in a precision, or the reason why none does."""
        return self.fp32 or self.rung if precision == "fp32" else self.fp16 or self.rung

    @contextlib.contextmanager
    def seeded(self, bundle: Bundle, sound: Engine | None = None) -> Iterator[tuple[Bundle, FaultyEngine]]:
        """The bundle and an engine with this fault, while the runtime has it too."""
        if self.description is not None:
            bundle = self.description(bundle)
        outputs = self.remembering() if self.remembering else self.outputs
        sound = sound or OnnxRuntimeEngine(bundle, threads=1)
        engine = FaultyEngine(sound, bundle, self.inputs, outputs, self.edits)
        with contextlib.ExitStack() as stack, np.errstate(all="ignore"):
            for patch in self.patches:
                stack.enter_context(mock.patch.object(*patch))
            yield bundle, engine

    def first_failure(self, bundle: Bundle, sound: Engine | None = None) -> Rung | None:
        """The first rung that fails with this fault."""
        with self.seeded(bundle, sound) as (changed, engine):
            return next((rung for rung in verify.verify(changed, engine) if not rung.passed), None)

    def first_broken_relation(self, bundle: Bundle, sound: Engine | None = None) -> Rung | None:
        """The first relation that does not hold with this fault, without the rungs of the records before them."""
        with self.seeded(bundle, sound) as (changed, engine):
            rungs = verify.relations(Replay(changed, engine), QUICK if self.quick else FULL)
            return next((rung for rung in rungs if not rung.passed), None)
