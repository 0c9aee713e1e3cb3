"""Each mistake that a device would punish late or in silence is seeded in the engine, and must be found by the double.

The scenario is one use of everything: sessions, a guided and an unguided run, batches in turns, a table that grows and
one that is dropped, continuous batching, an altered plan, memory that must not grow, and the end. It passes as the code
is.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.batches import ROW, mixed
from support.cuda_double import Cuda, Machine, Misuse, stored_on
from support.mistakes import Call, Seeder

from dit_engines.recipe import Recipe
from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.base import RunInputs
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.profiles import Fit, Profiles
from dit_runtime.backends.tensorrt import buffers, device, graphs, loop, session
from dit_runtime.backends.tensorrt.buffers import DeviceBuffer, PinnedBuffer, Staging
from dit_runtime.backends.tensorrt.conditioning import DeviceTable
from dit_runtime.backends.tensorrt.context import Context
from dit_runtime.backends.tensorrt.device import Device, LoadedPlan
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.graphs import Graphs, StepGraphs
from dit_runtime.backends.tensorrt.loop import DeviceLoop
from dit_runtime.backends.tensorrt.session import TensorRtSession
from dit_runtime.backends.tensorrt.store import StoredEngine
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import DiTError, EngineError, SamplingError
from dit_runtime.sampling.batch import Batch

RECIPE = Recipe("this", "8.7", (1, 4), (1, 2, 3), 64)
FIXED = Recipe("this", "8.7", (4,), (2, 3), 64, several_profiles=False)  # guided, so both axes are filled up
FOUND = (Misuse, AssertionError, DiTError, pytest.fail.Exception)


@dataclass(frozen=True)
class Mutation:
    """A mistake, what seeds it, and what it may raise."""

    name: str
    seed: Callable[[Seeder], None]
    raises: tuple[type[BaseException], ...] = FOUND


def last_queued(call: Call) -> str:
    """What was queued last on the stream that a call of the double's waits for."""
    queue = call.args[0]._machine.queues[call.args[1]]
    return queue[-1].name if queue else "nothing"


def wait_before(call: Call) -> Any:
    """A call of the double's, after a wait for its stream, which comes last in its arguments."""
    call.args[0].synchronize(call.args[-1])
    return call.made()


class OneGraph(OrderedDict[tuple[int, int], Any]):
    """Steps by (batch, branches) that take no notice of the branches."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_guided(key))

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return super().__getitem__(_guided(key))

    def __setitem__(self, key: tuple[int, int], value: Any) -> None:
        super().__setitem__(_guided(key), value)

    def move_to_end(self, key: tuple[int, int], last: bool = True) -> None:
        super().move_to_end(_guided(key), last)


def _guided(key: Any) -> tuple[int, int]:
    return key[0], 1


def share_graphs(call: Call) -> None:
    call.made()
    call.args[0]._prepared = OneGraph()


def launch_any(call: Call) -> None:
    """Take no notice of the shapes that a decoder's graph is for."""
    own, key, *rest = call.args
    call.original(own, "any" if own._name == "decoder" else key, *rest)


def keep_shape(call: Call) -> None:
    """Bind an input with the shape that it had first."""
    own, name, address, *shape = call.args
    first = vars(own).setdefault("first", {})
    call.original(own, name, address, *(first.setdefault(name, each) for each in shape))


def keep_address(call: Call) -> None:
    """Free a buffer that does not notice."""
    buffer = call.args[0]
    address = buffer.address
    call.made()
    buffer.address = address


def forget_address(call: Call) -> None:
    """Have a buffer believe that it was freed."""
    call.args[0].address = 0


def keep_plan(call: Call) -> None:
    """Unload a plan that stays loaded."""
    own, graph = call.args
    plan = own._loaded.get(graph)
    call.made()
    if plan is not None:
        own._loaded[graph] = plan


def put_without_zeros(call: Call) -> None:
    target, values = call.args
    target[tuple(map(slice, values.shape))] = values


def lend_again(call: Call) -> Any:
    """A loop that is lent and stays among those that are idle."""
    lent = call.made()
    call.args[0]._idle.append(lent)
    return lent


def lend_any(call: Call) -> Any:
    """An idle loop, whatever its limits."""
    engine = call.args[0]
    return engine._idle.pop() if engine._idle else call.made()


def give_back_again(call: Call) -> None:
    engine, own = call.args
    engine._idle.append(own)


def free_all(call: Call) -> Any:
    engine = call.args[0]
    engine._idle = list(engine._loops)
    return call.made()


def most_padding(call: Call) -> Fit | None:
    profiles, shapes, *_ = call.args
    return max(profiles.find_fits(shapes, ("batch", "branches", "rows")), key=lambda fit: fit.volume, default=None)


def first_profile(call: Call) -> Fit | None:
    found = call.made()
    return found and found._replace(profile=0)


def unlocked(owner: type, name: str, at: Callable[[Any], Any] = lambda own: own._device) -> Callable[[Seeder], None]:
    """A method that does not take the device's lock."""
    return lambda seeder: seeder.lie(owner, name, at, "lock", contextlib.nullcontext())


MUTATIONS = [
    Mutation(
        "a session's result is read before it is waited for",
        lambda seeder: seeder.drop(
            Cuda, "synchronize", TensorRtSession._run, lambda call: last_queued(call) == "download"
        ),
    ),
    Mutation(
        "latents are read before they are waited for",
        lambda seeder: seeder.drop(Cuda, "synchronize", DeviceLoop.read),
    ),
    Mutation("captured without a run before", lambda seeder: seeder.drop(Device, "start", Graphs._prepare)),
    Mutation(
        "captured before the run was waited for",
        lambda seeder: seeder.drop(Cuda, "synchronize", Graphs._prepare),
    ),
    Mutation(
        "waited for within a capture",
        lambda seeder: seeder.replace(Cuda, "copy", wait_before, StepGraphs._queue),
    ),
    Mutation("the graph does not copy the state", lambda seeder: seeder.drop(Cuda, "copy", StepGraphs._queue)),
    Mutation(
        "the graph copies the state the wrong way",
        lambda seeder: seeder.alter(Cuda, "copy", lambda call: {1: call.args[2], 2: call.args[1]}, StepGraphs._queue),
    ),
    Mutation(
        "one context for all graphs",
        lambda seeder: seeder.replace(
            Device, "make_context", lambda call: call.args[0].context_for(*call.args[1:]), Graphs._prepare
        ),
    ),
    Mutation(
        "one graph for guided and unguided",
        lambda seeder: seeder.replace(StepGraphs, "__init__", share_graphs),
    ),
    Mutation(
        "graphs stay when the activations moved",
        lambda seeder: seeder.lie(StepGraphs, "_count_moves", lambda own: own._device.activations, "moves", 0),
    ),
    Mutation(
        "graphs stay when the table moved",
        lambda seeder: seeder.lie(StepGraphs, "_count_moves", lambda own: own._table._memory, "moves", 0),
    ),
    Mutation(
        "the decoder's graph stays when the activations moved",
        lambda seeder: seeder.lie(TensorRtSession, "_count_moves", lambda own: own._device.activations, "moves", 0),
    ),
    Mutation(
        "the decoder's graph stays when inputs and outputs moved",
        lambda seeder: seeder.replace(
            TensorRtSession, "_count_moves", lambda call: call.args[0]._device.activations.moves
        ),
    ),
    Mutation(
        "the decoder's graph outlives its weights",
        lambda seeder: seeder.drop(Graphs, "free", TensorRtSession.free),
    ),
    Mutation("one graph for all the decoder's batches", lambda seeder: seeder.replace(Graphs, "launch", launch_any)),
    Mutation(
        "a context keeps the memory that it had first",
        lambda seeder: seeder.drop(Context, "give_memory", when=lambda call: call.args[0]._memory is not None),
    ),
    Mutation(
        "a context keeps a tensor's first address",
        lambda seeder: seeder.drop(Context, "bind", when=lambda call: call.args[1] in call.args[0]._bound),
    ),
    Mutation(
        "a context keeps a tensor's first shape",
        lambda seeder: seeder.replace(Context, "bind", keep_shape),
    ),
    Mutation("a graph is not destroyed", lambda seeder: seeder.drop(Cuda, "destroy_graph", Graphs._forget)),
    Mutation(
        "a graph is destroyed before its launch is done",
        lambda seeder: seeder.drop(Cuda, "synchronize", Graphs._forget),
    ),
    Mutation(
        "always the first profile, in the loop",
        lambda seeder: seeder.alter(Device, "make_context", lambda call: {2: 0}, Graphs._prepare),
    ),
    Mutation(
        "always the first profile, in sessions",
        lambda seeder: seeder.alter(Device, "context_for", lambda call: {2: 0}, TensorRtSession._run),
    ),
    Mutation(
        "the switch of the profile is not waited for",
        lambda seeder: seeder.drop(Cuda, "synchronize", LoadedPlan.make_context),
    ),
    Mutation(
        "too little memory is given for activations",
        lambda seeder: seeder.alter(
            Context, "give_memory", lambda call: {2: call.args[2] // 8}, Device.give_activations
        ),
    ),
    Mutation(
        "a buffer too small for the outputs",
        lambda seeder: seeder.alter(
            DeviceBuffer,
            "reserve",
            lambda call: {1: call.args[1] // 2},
            TensorRtSession._bind,
            lambda call: call.args[0] is call.by._outputs,
        ),
    ),
    Mutation(
        "a buffer too small for a run's inputs",
        lambda seeder: seeder.alter(DeviceBuffer, "reserve", lambda call: {1: 9}, DeviceLoop._upload),
    ),
    Mutation(
        "an output is not bound",
        lambda seeder: seeder.drop(Context, "bind", Graphs._prepare, lambda call: call.args[1] == "denoised"),
    ),
    Mutation(
        "pinned memory is written while a copy still reads it",
        lambda seeder: seeder.drop(Cuda, "wait", Staging.take),
    ),
    Mutation(
        "pinned memory is used again when all was queued, not done",
        lambda seeder: seeder.drop(Cuda, "synchronize", DeviceLoop._upload),
    ),
    Mutation(
        "a copy from memory that is not pinned",
        lambda seeder: seeder.alter(Cuda, "upload", lambda call: {2: call.args[2].copy()}, DeviceLoop.add),
    ),
    Mutation(
        "the conditioner is unloaded before it is done",
        lambda seeder: seeder.drop(Cuda, "synchronize", Device.unload),
    ),
    Mutation(
        "weights are loaded where they do not fit",
        lambda seeder: seeder.alter(Device, "make_room", lambda call: {1: 0}, Device.load),
    ),
    Mutation(
        "graphs hold weights that were to make room",
        lambda seeder: seeder.drop(DeviceLoop, "drop_graphs"),
    ),
    Mutation(
        "the conditioner's context is bound anew before it is done",
        lambda seeder: seeder.drop(Cuda, "synchronize", DeviceTable._compute),
    ),
    Mutation(
        "the conditioner stays during the loop",
        lambda seeder: seeder.drop(Device, "unload", DeviceTable.settle),
    ),
    Mutation(
        "the table's rows do not go along when it grows",
        lambda seeder: seeder.replace(
            DeviceBuffer, "reserve", lambda call: call.original(*call.args, keep=0), DeviceTable.fill
        ),
    ),
    Mutation(
        "the table is always filled from its beginning",
        lambda seeder: seeder.alter(DeviceTable, "_compute", lambda call: {2: 0}, DeviceTable.fill),
    ),
    Mutation(
        "the noise of a row is not uploaded",
        lambda seeder: seeder.drop(DeviceLoop, "_upload_noise", DeviceLoop.run_row),
    ),
    Mutation(
        "the noise of some images goes to others",
        lambda seeder: seeder.alter(
            DeviceLoop,
            "_upload_noise",
            lambda call: {3: [0] * len(call.args[3])},
            DeviceLoop.run_step,
            lambda call: len(call.args[3]) < call.by._count,
        ),
    ),
    Mutation(
        "the inputs of the step before",
        lambda seeder: seeder.alter(
            Cuda,
            "copy",
            lambda call: {2: call.args[2] - call.by._widest.size},
            DeviceLoop.run_row,
            lambda call: call.args[2] > call.by._rows.address,
        ),
    ),
    Mutation(
        "the inputs of the run before",
        lambda seeder: seeder.drop(DeviceLoop, "_upload", DeviceLoop.run_row, lambda call: call.by._inputs is not None),
    ),
    Mutation(
        "an image that stays keeps the position of one that left",
        lambda seeder: seeder.drop(Cuda, "copy", DeviceLoop.keep),
    ),
    Mutation(
        "who joins has the sampler's memory of who left",
        lambda seeder: seeder.drop(Cuda, "clear", DeviceLoop.add, lambda call: call.args[1] != call.by._at["noise"]),
    ),
    Mutation("fresh memory is not cleared", lambda seeder: seeder.drop(Cuda, "clear", DeviceLoop.__init__)),
    Mutation(
        "latents of a later step",
        lambda seeder: seeder.alter(DeviceLoop, "read", lambda call: {2: call.args[0]._number}),
    ),
    Mutation(
        "memory is freed while work still uses it",
        lambda seeder: seeder.drop(Cuda, "synchronize", DeviceBuffer.free),
    ),
    Mutation("memory is freed twice", lambda seeder: seeder.replace(DeviceBuffer, "free", keep_address)),
    Mutation(
        "memory is not freed when it grows",
        lambda seeder: seeder.replace(DeviceBuffer, "free", forget_address, DeviceBuffer.reserve),
    ),
    Mutation("pinned memory is not freed", lambda seeder: seeder.drop(Cuda, "free_pinned", PinnedBuffer.free)),
    Mutation("staged memory is not freed", lambda seeder: seeder.drop(Cuda, "free_pinned", Staging.free)),
    Mutation("events are not destroyed", lambda seeder: seeder.drop(Cuda, "destroy_event", Staging.free)),
    Mutation("a batch does not give its loop back", lambda seeder: seeder.drop(TensorRtEngine, "_give_back")),
    Mutation("the stream is not destroyed", lambda seeder: seeder.drop(Cuda, "destroy_stream", Device.close)),
    Mutation("a plan is not checked", lambda seeder: seeder.drop(StoredEngine, "check_plan", Device._deserialize)),
    Mutation(
        "a plan for another GPU is tried",
        lambda seeder: seeder.drop(StoredEngine, "check_device", TensorRtEngine.__init__),
    ),
    # What the device, the engine's loops and the profiles could do besides.
    Mutation(
        "the graph that runs makes room",
        lambda seeder: seeder.lie(Device, "make_room", lambda own: own, "running", None),
    ),
    Mutation("a plan stays when it is unloaded", lambda seeder: seeder.replace(Device, "unload", keep_plan)),
    Mutation("nothing is dropped when weights are unloaded", lambda seeder: seeder.drop(TensorRtEngine, "_drop")),
    Mutation(
        "a session keeps its memory when its weights are unloaded",
        lambda seeder: seeder.drop(TensorRtSession, "free", TensorRtEngine._drop),
    ),
    Mutation("plans are not unloaded at the end", lambda seeder: seeder.drop(Device, "unload", Device.close)),
    Mutation("activations are not freed", lambda seeder: seeder.drop(DeviceBuffer, "free", Device.close)),
    Mutation("loops are not freed at the end", lambda seeder: seeder.drop(DeviceLoop, "free", TensorRtEngine.close)),
    Mutation(
        "idle loops outlive the step that is released",
        lambda seeder: seeder.drop(TensorRtEngine, "_free_idle", TensorRtEngine.release),
    ),
    Mutation(
        "a loop in use is freed with those that are idle",
        lambda seeder: seeder.replace(TensorRtEngine, "_free_idle", free_all),
        (*FOUND, IndexError),  # it has no pinned memory to take turns with any more
    ),
    Mutation("a loop in use is lent again", lambda seeder: seeder.replace(TensorRtEngine, "open_loop", lend_again)),
    Mutation(
        "a loop that is closed twice is lent twice",
        lambda seeder: seeder.replace(TensorRtEngine, "_give_back", give_back_again),
    ),
    Mutation("a loop with other limits is lent", lambda seeder: seeder.replace(TensorRtEngine, "open_loop", lend_any)),
    Mutation("a closed engine goes on", lambda seeder: seeder.drop(Device, "check_open", TensorRtEngine.open_loop)),
    Mutation("always the first profile", lambda seeder: seeder.replace(Profiles, "find_fit", first_profile)),
    Mutation(
        "nothing is filled up to a profile's least",
        lambda seeder: seeder.replace(Profiles, "find_fit", lambda call: call.original(*call.args, padded=())),
    ),
    Mutation("the profile with the most padding", lambda seeder: seeder.replace(Profiles, "find_fit", most_padding)),
    Mutation(
        "the shapes of a table that has grown since",
        lambda seeder: seeder.lie(DeviceLoop, "_find_fit", lambda own: own._memory._memory, "moves", 0),
    ),
    Mutation("padding is not zero in the loop", lambda seeder: seeder.replace(loop, "put", put_without_zeros)),
    Mutation("padding is not zero in sessions", lambda seeder: seeder.replace(session, "put", put_without_zeros)),
    Mutation(
        "padding is not cut off",
        lambda seeder: seeder.replace(TensorRtSession, "_cut", lambda call: call.args[2].copy()),
    ),
    Mutation("tensors are not aligned", lambda seeder: seeder.replace(buffers, "align", lambda call: call.args[0])),
    Mutation("a session without the lock", unlocked(TensorRtSession, "run")),
    Mutation("images join without the lock", unlocked(DeviceLoop, "add")),
    Mutation("images leave without the lock", unlocked(DeviceLoop, "keep")),
    Mutation("a row without the lock", unlocked(DeviceLoop, "run_row")),
    Mutation("a step without the lock", unlocked(DeviceLoop, "run_step")),
    Mutation("latents are read without the lock", unlocked(DeviceLoop, "read")),
    Mutation("a batch ends without the lock", unlocked(DeviceLoop, "close")),
    Mutation("the table is filled without the lock", unlocked(DeviceTable, "fill")),
    Mutation("a loop is made without the lock", unlocked(TensorRtEngine, "open_loop", lambda own: own.device)),
    Mutation("a graph is released without the lock", unlocked(TensorRtEngine, "release", lambda own: own.device)),
    Mutation("the engine is closed without the lock", unlocked(TensorRtEngine, "close", lambda own: own.device)),
]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[[str], Path]) -> Bundle:
    return open_bundle(tiny_bundle("fp32"))


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[str, Any]:
    """What ONNX Runtime makes in the scenario."""
    pipe = Pipeline(bundle, OnnxRuntimeEngine(bundle, threads=1))
    host = HostLoop(pipe.engine, bundle.manifest, TableLimits())
    return {
        **made(pipe),
        "turns": list(in_turns(pipe)),
        "unguided": call_step(pipe, 1),
        "alone": run_alone(host),
    }


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
    note("session", call_step(pipe, 2))
    latents = np.random.default_rng(3).standard_normal((1, 4, 8, 8), np.float32)
    note("decoded", pipe.engine.session("decoder").run({"latents": latents}, ["decoded", "images"]))
    return found


def call_step(pipe: Pipeline, branches: int) -> list[Any]:
    """A single call of the step for three images."""
    rng = np.random.default_rng(3)
    inputs = {
        "state": rng.standard_normal((3, 3, 4, 8, 8), np.float32),
        "noise": rng.standard_normal((3, 4, 8, 8), np.float32),
        "coefficients": rng.standard_normal((3, 17), np.float32) / 4,
        "guidance": rng.standard_normal((branches, 3, 4), np.float32),
        "rows": rng.integers(0, 5, (branches, 3)).astype(np.int32),
        "modulation": rng.standard_normal((5, 14, 64), np.float32),
    }
    return pipe.engine.session("step").run(inputs, ["next_state", "denoised"])


def in_turns(pipe: Pipeline) -> Iterator[Any]:
    """The latents of two batches side by side."""
    runs = [pipe.trajectory([label], label, sampler="ddpm", steps=4, guidance=2.0) for label in (3, 7)]
    for steps in zip(*runs, strict=True):
        yield from (latents for _, latents, _ in steps)


class Lock:
    """A lock for one thread. ``held`` is how often it was taken."""

    held = 0

    def __enter__(self) -> None:
        self.held += 1

    def __exit__(self, *_: object) -> None:
        self.held -= 1


Use = Callable[[TensorRtEngine, Machine, Pipeline, dict[str, Any]], None]


def scenario(bundle: Bundle, folder: Path, expected: dict[str, Any]) -> None:
    """Raises for whatever is not as it should be. What finds most mistakes in the least time comes first."""
    machine = Machine()
    plans = stored_on(machine, bundle, folder, RECIPE)
    fixed = stored_on(machine, bundle, folder / "fixed", FIXED)
    stages: list[tuple[StoredEngine, Use]] = [
        (plans, moved),
        (plans, decoded),
        (fixed, padded),
        (plans, lent),
        (plans, crowded),
        (plans, used),
    ]
    refusals(machine, bundle, plans)
    for stored, use in stages:
        with engine_on(machine, bundle, stored) as engine:
            use(engine, machine, Pipeline(bundle, engine), expected)
            engine.close()
            with pytest.raises(EngineError):
                engine.open_loop(TableLimits())
        machine.check_closed()


@contextlib.contextmanager
def engine_on(machine: Machine, bundle: Bundle, stored: StoredEngine) -> Iterator[TensorRtEngine]:
    """An engine that works with its device's lock alone, and is not closed once more where it is broken."""
    engine = TensorRtEngine(bundle, stored, machine.library, machine.cuda)
    engine.device.lock = lock = Lock()
    called = machine.called

    def called_locked(name: str, allowed_in_capture: bool = False) -> None:
        assert lock.held, f"{name} without the device's lock"
        called(name, allowed_in_capture)

    machine.called = called_locked
    try:
        yield engine
    finally:
        machine.called = called
        engine._opened = False


def used(engine: TensorRtEngine, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
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

    own = engine.open_loop(limits := TableLimits(ROW * 64, ROW * 64))
    assert own.limits == limits, "a loop with other limits"
    assert are_same(run_alone(own), expected["alone"]), "steps alone differ"


def moved(engine: TensorRtEngine, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """The activations' memory moves, and then a graph makes room for the next, while launches wait."""
    before = pipe([3], 4, sampler="ddim", steps=6, guidance=2.0)
    pipe([3, 3], 4, sampler="ddim", steps=6, guidance=2.0)  # the same rows of the table
    assert np.array_equal(pipe([3], 4, sampler="ddim", steps=6, guidance=2.0), before), "after a larger batch: differs"
    batches = {batch for each in engine._loops for batch, _ in each.graphs}
    assert batches == {1, 2}, f"filled up to {batches}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "MOST_GRAPHS", 1)
        patch.setattr(graphs, "OF_A_BATCH", 0)
        found = pipe([3], 4, sampler="ddpm", steps=9, guidance=2.0, guidance_interval=(0.4, 1.0))
    assert np.array_equal(found, expected["ddpm"]), "with one graph: differs"


def decoded(engine: TensorRtEngine, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """The decoder's graph, after the activations' memory has moved and after its own has."""
    latents = np.random.default_rng(3).standard_normal((4, 4, 8, 8), np.float32)

    def decode(count: int) -> None:
        found = engine.session("decoder").run({"latents": latents[:count]}, ["decoded", "images"])
        if count == 1:
            assert are_same(found, expected["decoded"]), "decoded again: differs"

    decode(1)
    decode(1)
    pipe.sample_latents(pipe.prepare([1, 2, 3, 4], 3, sampler="ddim", steps=2, guidance=1.0))
    for count in (1, 1, 4, 1, 4, 1, 2, 2, 3, 3, 1):
        decode(count)


def crowded(engine: TensorRtEngine, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """The conditioner does not fit beside the step when other labels need it."""
    settings: dict[str, Any] = {"sampler": "ddim", "steps": 6, "guidance": 1.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "SMALL_BYTES", 1 << 40)  # never as much as it should be
        pipe.sample_latents(pipe.prepare([3, 4], 3, **settings))
    facts = machine.facts
    machine.facts = replace(facts, memory_bytes=machine.used + 95_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "SMALL_BYTES", 0)
        latents = pipe.sample_latents(pipe.prepare([1, 2], 3, **settings))
    machine.facts = facts
    assert np.array_equal(pipe.decode(latents), expected["ddim"]), "in little memory: differs"


def padded(engine: TensorRtEngine, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """A batch that is fixed takes a single image too, and a step that is guided one without guidance."""
    found = pipe([3], 4, sampler="ddpm", steps=9, guidance=2.0, guidance_interval=(0.4, 1.0))
    assert np.array_equal(found, expected["ddpm"]), "in a fixed batch: differs"
    assert are_same(call_step(pipe, 1), expected["unguided"]), "a call with padding differs"


def lent(engine: TensorRtEngine, machine: Machine, pipe: Pipeline, expected: dict[str, Any]) -> None:
    """Batches side by side have loops of their own, though one was closed twice, and the step released in between."""
    own = engine.open_loop(TableLimits())
    own.close()
    own.close()
    assert are_same(in_turns(pipe), expected["turns"]), "in turns: differs"
    found = in_turns(pipe)
    results = [next(found)]
    engine.release("step")
    results += found
    assert are_same(results, expected["turns"]), "in turns, the step released: differs"
    for graph in engine.info.graphs:
        engine.release(graph)
    assert machine.used == engine.device.activations.size, "graphs that were released hold memory"


def run_alone(steps: HostLoop | DeviceLoop) -> list[Any]:
    """The states after two runs, one right after the other, with every coefficient in use; all of it twice."""
    rng = np.random.default_rng(4)
    runs = []
    for _ in range(2):
        coefficients = rng.standard_normal((5, 2, 17)).astype(np.float32) / 4
        weights = rng.standard_normal((5, 2, 2, 4)).astype(np.float32)
        rows = rng.integers(0, 4, (5, 2, 2)).astype(np.int32)
        runs.append(RunInputs(coefficients, weights, rows, [2, 1, 2, 2, 1], [False, True, True, False, False]))
    noises = rng.standard_normal((len(runs), 5, 2, 4, 8, 8)).astype(np.float32)
    latents = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    conditions = [(float(time), 1) for time in (10, 20, 30, 40)]
    steps.table.prepare(conditions, lambda: iter(()))
    indices = np.array([steps.table[condition] for condition in conditions], np.int32)
    results = []
    for _ in range(2):  # the second images take the positions of the first
        steps.add(latents)
        # A run is there as soon as one step of that before is queued, and stays for five.
        for count, run, noise in zip((1, 5), runs, noises, strict=True):
            inputs = run._replace(rows=indices[run.rows])
            for row in range(count):
                result = steps.run_row(inputs, row, noise[row] if run.draws[row] else None)
        results.append(result.state)
        steps.keep([])
    steps.close()
    assert all(np.isfinite(state).all() for state in results)
    return results


def are_same(found: Iterable[Any], expected: Iterable[Any]) -> bool:
    return all(np.array_equal(one, same) for one, same in zip(found, expected, strict=True))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in found.items():
        other = expected[name]
        if isinstance(other, dict):
            value, other = [value[index] for index in other], other.values()
        assert are_same(value, other), f"{name} differs"


def read_late(pipe: Pipeline) -> None:
    """Latents that are read when the next step has begun are refused."""
    with Batch(pipe.engine, pipe.manifest) as batch:
        batch.add(list(enumerate(pipe.prepare([1], steps=3, sampler="ddim", guidance=1.0))))
        first = batch.advance()
        batch.advance()
        with pytest.raises(SamplingError):
            _ = first.latents


def refusals(machine: Machine, bundle: Bundle, stored: StoredEngine) -> None:
    """An altered plan is not deserialized, and one for another GPU not even read."""
    plan = stored.folder / "step.plan"
    content = plan.read_bytes()
    altered = content.replace(b", ", b" ,", 1)  # of the same size, and still a plan to the double
    assert altered != content
    plan.write_bytes(altered)
    with engine_on(machine, bundle, stored) as engine:
        with pytest.raises(EngineError):
            Pipeline(bundle, engine)([1], steps=2)
        engine.close()
    plan.write_bytes(content)
    with pytest.raises(EngineError):
        TensorRtEngine(bundle, replace(stored, compute_capability="8.9"), machine.library, machine.cuda)


@pytest.fixture(scope="module")
def found() -> Iterator[list[tuple[str, str]]]:
    """What was found of each mistake; printed at the end."""
    table: list[tuple[str, str]] = []
    yield table
    width = max((len(name) for name, _ in table), default=0)
    print("\n" + "\n".join(f"{name:<{width}}  {how}" for name, how in table))


def test_without_a_mistake(bundle: Bundle, expected: dict[str, Any], tmp_path: Path) -> None:
    """The scenario passes on the code as it is: what the mistakes below are told by is the mistakes."""
    scenario(bundle, tmp_path, expected)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_mistake_is_found(
    mutation: Mutation,
    bundle: Bundle,
    expected: dict[str, Any],
    found: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    """The double, or a comparison with the host, finds the mistake."""
    failure: BaseException | None = None
    with pytest.MonkeyPatch.context() as patch:
        seeder = Seeder(patch)
        mutation.seed(seeder)
        try:
            scenario(bundle, tmp_path, expected)
        except mutation.raises as error:
            failure = error
    assert seeder.count, f"{mutation.name}: was never made, since nobody calls what it changes from where it says"
    assert failure is not None, f"{mutation.name}: was made {seeder.count} times, and not found"
    found.append((mutation.name, f"{type(failure).__name__}: {str(failure).splitlines()[0][:90]}"))


def test_a_mistake_that_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call from elsewhere is as it was and does not count, and what is not there cannot be changed."""
    seeder, machine = Seeder(monkeypatch), Machine()
    seeder.drop(Cuda, "create_stream", DeviceLoop.read)
    assert machine.cuda.create_stream()
    assert seeder.count == 0
    seeder.drop(Cuda, "create_stream")
    assert machine.cuda.create_stream() is None
    assert seeder.count == 1
    with pytest.raises(KeyError):
        seeder.drop(DeviceLoop, "gone")
