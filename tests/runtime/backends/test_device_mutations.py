"""Each mistake that a device would punish late or in silence is seeded in the engine, and must be found by the double.

The scenario is one use of everything: sessions, a guided and an unguided run, a table that grows and one that is
dropped, continuous batching, an altered plan, memory that must not grow, and the end. It passes as the code is.
"""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.batches import ROW, mixed
from support.cuda_double import Machine, Misuse, stored_on

from dit_engines.recipe import Recipe
from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.base import RunInputs
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.core.errors import DiTError, EngineError

RUNTIME = Path(sys.modules["dit_runtime"].__file__ or "").parent
# In the order in which they import each other.
MODULES = ("device_memory", "device_session", "device_table", "device_graphs", "device_loop", "device")
RECIPE = Recipe("this", "8.7", (1, 4), (1, 2, 3), 64)
FIXED = Recipe("this", "8.7", (4,), (1, 2, 3), 64, several_profiles=False)


@dataclass(frozen=True)
class Mutation:
    """A mistake: in a module, ``before`` is replaced by ``after``, wherever it stands."""

    name: str
    module: str
    before: str
    after: str


MUTATIONS = [
    Mutation(
        "a session's result is read before it is waited for",
        "device_session",
        "        cuda.synchronize(stream)\n        sizes",
        "        sizes",
    ),
    Mutation(
        "latents are read before they are waited for",
        "device_loop",
        '            cuda.synchronize(stream)\n            return views["next_state"]',
        '            return views["next_state"]',
    ),
    Mutation(
        "captured without a run before",
        "device_graphs",
        "            engine.start(context)\n            cuda.synchronize(stream)\n            graph = ",
        "            graph = ",
    ),
    Mutation(
        "captured before the run was waited for",
        "device_graphs",
        "            cuda.synchronize(stream)\n            graph = ",
        "            graph = ",
    ),
    Mutation(
        "waited for within a capture",
        "device_graphs",
        "        size = np.dtype",
        "        engine.cuda.synchronize(engine.stream)\n        size = np.dtype",
    ),
    Mutation(
        "the graph does not copy the state",
        "device_graphs",
        '        engine.cuda.copy(self._at["state"], self._at["next_state"], size, engine.stream)\n',
        "",
    ),
    Mutation(
        "the graph copies the state the wrong way",
        "device_graphs",
        'self._at["state"], self._at["next_state"], size',
        'self._at["next_state"], self._at["state"], size',
    ),
    Mutation("one context for all graphs", "device_graphs", "loaded.new_context(", "loaded.context("),
    Mutation(
        "one graph for guided and unguided",
        "device_graphs",
        "        self._drop_stale()\n        if (batch, branches) in",
        "        branches = 1\n        self._drop_stale()\n        if (batch, branches) in",
    ),
    Mutation(
        "graphs stay when the activations moved",
        "device_graphs",
        "(self._engine.activations.moves, self._table.moves)",
        "(0, self._table.moves)",
    ),
    Mutation(
        "graphs stay when the table moved",
        "device_graphs",
        "(self._engine.activations.moves, self._table.moves)",
        "(self._engine.activations.moves, 0)",
    ),
    Mutation(
        "a graph is not destroyed",
        "device_graphs",
        "            self._engine.cuda.destroy_graph(step.graph)",
        "            pass",
    ),
    Mutation(
        "a graph is destroyed before its launch is done",
        "device_graphs",
        "        self._engine.cuda.synchronize(self._engine.stream)  # its last launch\n",
        "",
    ),
    Mutation("always the first profile, in the loop", "device_graphs", "new_context(fit.profile", "new_context(0"),
    Mutation(
        "always the first profile, in sessions", "device_session", "loaded.context(fit.profile", "loaded.context(0"
    ),
    Mutation(
        "the switch of the profile is not waited for",
        "device_session",
        "        cuda.synchronize(stream)  # the switch to the profile\n",
        "",
    ),
    Mutation(
        "too little memory is given for activations",
        "device",
        "self.activations.address, self.activations.size)",
        "self.activations.address, self.activations.size // 8)",
    ),
    Mutation("a buffer too small for the outputs", "device_session", "reserve(made.size)", "reserve(made.size // 2)"),
    Mutation(
        "a buffer too small for the plan", "device_loop", "self._planned.reserve(size)", "self._planned.reserve(9)"
    ),
    Mutation(
        "an output is not bound",
        "device_graphs",
        "        for name, tensor in loaded.tensors.items():\n",
        '        for name, tensor in loaded.tensors.items():\n            if name == "denoised":\n'
        "                continue\n",
    ),
    Mutation(
        "pinned memory is written while a copy still reads it",
        "device_memory",
        "        self._cuda.wait(event)\n",
        "",
    ),
    Mutation(
        "pinned memory is used again when all was queued, not done",
        "device_loop",
        "        engine.cuda.synchronize(engine.stream)  # the plan before\n",
        "",
    ),
    Mutation("a copy from memory that is not pinned", "device_loop", "views[...] = latents", "views = latents.copy()"),
    Mutation(
        "the conditioner is unloaded before it is done",
        "device",
        "        self.cuda.synchronize(self.stream)  # its last call\n",
        "",
    ),
    Mutation(
        "weights are loaded where they do not fit",
        "device",
        "            self._unload(held.pop(0))\n",
        "            break\n",
    ),
    Mutation(
        "graphs hold weights that were to make room",
        "device",
        "                steps.drop_graphs()\n",
        "                pass\n",
    ),
    Mutation(
        "the conditioner's context is bound anew before it is done",
        "device_table",
        "        cuda.synchronize(stream)  # rows before these use the same context, inputs and pinned memory\n",
        "",
    ),
    Mutation(
        "the conditioner stays during the loop",
        "device_table",
        'if self._engine.loads("conditioner") == 1:',
        "if False:",
    ),
    Mutation(
        "the table's rows do not go along when it grows",
        "device_table",
        "keep=min(first, room) * self._row",
        "keep=0",
    ),
    Mutation(
        "the table is always filled from its beginning",
        "device_table",
        "self.address + first * self._row",
        "self.address",
    ),
    Mutation(
        "the noise of a planned step is not uploaded",
        "device_loop",
        "                self._upload_noise(memory, noise, range(self._count))\n",
        "                pass\n",
    ),
    Mutation(
        "the noise of some images goes to others",
        "device_loop",
        'engine.cuda.upload(self._at["noise"] + place * size, view, engine.stream)',
        'engine.cuda.upload(self._at["noise"], view, engine.stream)',
    ),
    Mutation(
        "the inputs of the step before",
        "device_loop",
        "self._planned.address + row * self._widest.size",
        "self._planned.address + (row - 1) * self._widest.size",
    ),
    Mutation("the plan of the batch before", "device_loop", "if plan is not self._plan:", "if self._plan is None:"),
    Mutation(
        "who stays keeps the place of who left",
        "device_loop",
        "                if place != index:\n",
        "                if False:\n",
    ),
    Mutation(
        "who joins has the sampler's memory of who left",
        "device_loop",
        "            cuda.clear(first, count * 3 * size, stream)\n",
        "",
    ),
    Mutation(
        "fresh memory is not cleared",
        "device_loop",
        "            cuda.clear(self._buffers.address, buffers.size, stream)\n",
        "",
    ),
    Mutation("latents of a later step", "device_loop", "if number != self._number:", "if False:"),
    Mutation(
        "memory is freed while work still uses it",
        "device_memory",
        "            self._cuda.synchronize(self._stream)\n            self._cuda.free(self.address)",
        "            self._cuda.free(self.address)",
    ),
    Mutation(
        "memory is freed twice",
        "device_memory",
        "            self._cuda.free(self.address)\n            self.address = self.size = 0",
        "            self._cuda.free(self.address)\n            self.size = 0",
    ),
    Mutation(
        "memory is not freed when it grows",
        "device_memory",
        "        if not keep:\n            self.free()",
        "        if not keep:\n            self.address = 0",
    ),
    Mutation("pinned memory is not freed", "device_memory", "self._cuda.free_pinned(self._memory)", "pass"),
    Mutation("events are not destroyed", "device_memory", "self._cuda.destroy_event(event)", "pass"),
    Mutation("a batch does not give its loop back", "device_loop", "self._engine.give_back(self)", "pass"),
    Mutation("the stream is not destroyed", "device", "self.cuda.destroy_stream(self.stream)", "pass"),
    Mutation(
        "a plan is not checked",
        "device",
        "self.stored.check_plan(graph, hashlib.sha256(content).hexdigest())",
        "pass",
    ),
    Mutation(
        "a plan for another GPU is tried",
        "device",
        "        stored.check_device(library.name, library.version, facts.compute_capability, facts.name)\n",
        "",
    ),
]


def engine_of(mutation: Mutation | None, patch: pytest.MonkeyPatch) -> Any:
    """``TensorRtEngine`` from modules of its own, with one mistake in them."""
    sources = {name: (RUNTIME / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    if mutation is not None:
        assert mutation.before in sources[mutation.module], f"{mutation.name}: the code is not there any more"
        sources[mutation.module] = sources[mutation.module].replace(mutation.before, mutation.after)
    for name in MODULES:
        module = types.ModuleType(f"dit_runtime.{name}")
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(sources[name], f"{name}.py", "exec"), module.__dict__)
    return module.TensorRtEngine


@pytest.fixture(scope="module")
def expected(bundles: dict[str, Path]) -> dict[str, Any]:
    """What ONNX Runtime makes in the scenario."""
    bundle = open_bundle(bundles["fp32"])
    pipe = Pipeline(bundle, OnnxRuntimeEngine(bundle, threads=1))
    return made(pipe)


def made(pipe: Pipeline, between: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Everything that the scenario makes; ``between`` is told what was made last."""
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        found[name] = value
        between(name)

    note("ddpm", pipe([3], 4, sampler="ddpm", steps=9, guidance=2.0, guidance_interval=(0.4, 1.0)))
    note("ddim", pipe([1, 2], 3, sampler="ddim", steps=6, guidance=1.5))
    note("again", pipe([1, 2], 5, sampler="ddpm", steps=9, guidance=1.0))
    note("three", pipe([4, 5, 6], 6, sampler="dpmpp-3m", steps=8, guidance=3.0))
    images = mixed(pipe)
    note("stream", dict(pipe.stream(images, 3)))
    note(
        "read", [value for each in pipe.trajectory([7], 8, sampler="ddpm", steps=4, guidance=2.0) for value in each[1:]]
    )
    rng = np.random.default_rng(3)
    inputs = {
        "state": rng.standard_normal((3, 3, 4, 8, 8), np.float32),
        "noise": rng.standard_normal((3, 4, 8, 8), np.float32),
        "coefficients": rng.standard_normal((3, 17), np.float32) / 4,
        "guidance": rng.standard_normal((2, 3, 4), np.float32),
        "rows": rng.integers(0, 5, (2, 3)).astype(np.int32),
        "modulation": rng.standard_normal((5, 14, 64), np.float32),
    }
    note("session", pipe.engine.session("step").run(inputs, ["next_state", "denoised"]))
    note("decoded", pipe.engine.session("decoder").run({"latents": inputs["noise"][:1]}, ["decoded", "images"]))
    return found


def scenario(engine_type: Any, path: Path, folder: Path, expected: dict[str, Any]) -> None:
    """Raises for whatever is not as it should be."""
    machine, bundle = Machine(), open_bundle(path)
    stored = stored_on(machine, bundle, folder, RECIPE)
    refusals(engine_type, machine, bundle, stored)
    fixed = stored_on(machine, bundle, folder / "fixed", FIXED)
    for plans, use in ((stored, used), (stored, moved), (stored, crowded), (fixed, padded)):
        engine = engine_type(bundle, plans, machine.library, machine.cuda)
        try:
            use(engine, machine, Pipeline(bundle, engine), expected)
            engine.close()
        finally:
            engine.stream = 0  # what is broken is not closed once more
        del engine
        gc.collect()
        machine.check_closed()


def used(engine: Any, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """Everything made thrice and compared, the last time within the memory of before; then a table that is dropped."""

    def after(name: str) -> None:
        if name == "ddpm":
            assert not machine.weights["conditioner"], "the conditioner was not unloaded"

    compare(made(pipe, after), expected)
    compare(made(pipe), expected)
    before = (machine.used, len(machine.pinned), len(machine.graphs), len(machine.events))
    compare(made(pipe), expected)
    assert (machine.used, len(machine.pinned), len(machine.graphs), len(machine.events)) == before, "memory grew"
    read_late(pipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_runtime.sampling.batch.LIMITS", TableLimits(ROW * 12, ROW * 4))
        small = pipe([1, 2], 3, sampler="ddim", steps=6, guidance=1.5)
    # Rows computed in other chunks are rounded differently.
    assert np.abs(small.astype(int) - expected["ddim"].astype(int)).max() <= 1, "a small table differs"

    steps_alone(engine, pipe)


def moved(engine: Any, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """The activations' memory moves, and then a graph makes room for the next, while launches wait."""
    before = pipe([3], 4, sampler="ddim", steps=6, guidance=2.0)
    pipe([3, 3], 4, sampler="ddim", steps=6, guidance=2.0)  # the same rows of the table
    assert np.array_equal(pipe([3], 4, sampler="ddim", steps=6, guidance=2.0), before), "after a larger batch: differs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["dit_runtime.backends.tensorrt.graphs"], "MOST_GRAPHS", 1)
        found = pipe([3], 4, sampler="ddpm", steps=9, guidance=2.0, guidance_interval=(0.4, 1.0))
    assert np.array_equal(found, expected["ddpm"]), "with one graph: differs"


def crowded(engine: Any, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """The conditioner does not fit beside the step when other labels need it."""
    settings: dict[str, Any] = {"sampler": "ddim", "steps": 6, "guidance": 1.5}
    pipe.sample_latents(pipe.prepare([3, 4], 3, **settings))
    facts = machine.facts
    machine.facts = replace(facts, memory_bytes=machine.used + 95_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.load.__func__.__globals__, "SMALL_BYTES", 0)
        latents = pipe.sample_latents(pipe.prepare([1, 2], 3, **settings))
    machine.facts = facts
    assert np.array_equal(pipe.decode(latents), expected["ddim"]), "in little memory: differs"


def padded(engine: Any, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """A batch that is fixed takes a single image too."""
    found = pipe([3], 4, sampler="ddpm", steps=9, guidance=2.0, guidance_interval=(0.4, 1.0))
    assert np.array_equal(found, expected["ddpm"]), "in a fixed batch: differs"


def steps_alone(engine: Any, pipe: Pipeline) -> None:
    """Two plans, one right after the other, with every coefficient in use: as on the host."""
    host = HostLoop(OnnxRuntimeEngine(pipe.bundle, threads=1), pipe.manifest, ROW * 64, ROW * 64)
    device = engine.steps(ROW * 64, ROW * 64)
    rng = np.random.default_rng(4)
    plans = []
    for _ in range(2):
        coefficients = rng.standard_normal((5, 2, 17)).astype(np.float32) / 4
        weights = rng.standard_normal((5, 2, 2, 4)).astype(np.float32)
        rows = rng.integers(0, 4, (5, 2, 2)).astype(np.int32)
        plans.append(RunInputs(coefficients, weights, rows, [2, 1, 2, 2, 1], [False, True, True, False, False]))
    noises = rng.standard_normal((len(plans), 5, 2, 4, 8, 8)).astype(np.float32)
    latents = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    results = []
    for steps in (host, device):
        conditions = [(float(time), 1) for time in (10, 20, 30, 40)]
        steps.table.prepare(conditions, lambda: iter(()))
        assert [steps.table[condition] for condition in conditions] == [0, 1, 2, 3] or steps is device
        places = np.array([steps.table[condition] for condition in conditions], np.int32)
        for _ in range(2):  # the second images take the places of the first
            steps.join(latents)
            # A plan is there as soon as one step of that before is queued, and stays for five.
            for count, plan, noise in zip((1, 5), plans, noises, strict=True):
                own = plan._replace(rows=places[plan.rows])
                for row in range(count):
                    outcome = steps.run_planned(own, row, noise[row] if plan.draws[row] else None)
            results.append(outcome.state)
            steps.leave([])
        steps.close()
    assert all(np.isfinite(state).all() for state in results)
    for index in range(2):
        assert np.array_equal(results[index], results[index + 2]), "steps alone differ"


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in found.items():
        other = expected[name]
        pairs = (
            [(value[index], other[index]) for index in other]
            if isinstance(other, dict)
            else zip(value, other, strict=True)
        )
        for one, same in pairs:
            assert np.array_equal(one, same), f"{name} differs"


def read_late(pipe: Pipeline) -> None:
    """Latents that are read when the next step has begun are refused."""
    from dit_runtime.core.errors import SamplingError
    from dit_runtime.sampling.batch import Batch

    with Batch(pipe.engine, pipe.manifest) as batch:
        batch.add(list(enumerate(pipe.prepare([1], steps=3, sampler="ddim", guidance=1.0))))
        first = batch.advance()
        batch.advance()
        with pytest.raises(SamplingError):
            _ = first.latents


def refusals(engine_type: Any, machine: Machine, bundle: Any, stored: Any) -> None:
    """An altered plan is not deserialized, and one for another GPU not even read."""
    plan = stored.folder / "step.plan"
    content = plan.read_bytes()
    altered = content.replace(b", ", b" ,", 1)  # of the same size, and still a plan to the double
    assert altered != content
    plan.write_bytes(altered)
    engine = engine_type(bundle, stored, machine.library, machine.cuda)
    try:
        with pytest.raises(EngineError):
            Pipeline(bundle, engine)([1], steps=2)
        engine.close()
    finally:
        engine.stream = 0
    plan.write_bytes(content)
    with pytest.raises(EngineError):
        engine_type(bundle, replace(stored, compute_capability="8.9"), machine.library, machine.cuda)


@pytest.fixture(scope="module")
def found() -> Iterator[list[tuple[str, str]]]:
    """What was found of each mistake; printed at the end."""
    table: list[tuple[str, str]] = []
    yield table
    width = max((len(name) for name, _ in table), default=0)
    print("\n" + "\n".join(f"{name:<{width}}  {how}" for name, how in table))


def test_without_a_mistake(bundles: dict[str, Path], expected: dict[str, Any], tmp_path: Path) -> None:
    """The scenario passes on the code as it is: what the mistakes below are told by is the mistakes."""
    with pytest.MonkeyPatch.context() as patch:
        scenario(engine_of(None, patch), bundles["fp32"], tmp_path, expected)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_mistake_is_found(
    mutation: Mutation,
    bundles: dict[str, Path],
    expected: dict[str, Any],
    found: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    """The double, or a comparison with the host, finds the mistake."""
    with pytest.MonkeyPatch.context() as patch:
        engine_type = engine_of(mutation, patch)
        with pytest.raises((Misuse, AssertionError, DiTError, pytest.fail.Exception)) as failure:
            scenario(engine_type, bundles["fp32"], tmp_path, expected)
    found.append((mutation.name, f"{type(failure.value).__name__}: {str(failure.value).splitlines()[0][:90]}"))
