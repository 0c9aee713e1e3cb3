"""Everything around TensorRT, checked on a GPU that has torch and no TensorRT, in five minutes.

    python tests/support/cuda_check.py --json build/cuda-check.json     # DIT_BUNDLE=my.bundle, or models exported here
    python tests/support/cuda_check.py --double                         # the same checks without a GPU
    python tests/support/cuda_check.py --shape build/dit-xl.hollow      # a step at that shape too, with other weights

``torch_trt`` computes in TensorRT's place. Each check says PASS, FAIL or SKIP with its seconds and figures, and the
JSON is written after each. A check that is left out for want of time is a failure; one without its library is not.
Needed: torch with CUDA, cuda-bindings, onnx, onnxruntime, numpy, Pillow and filelock; no network.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "engines"))
    sys.path.insert(0, str(Path(__file__).parents[2] / "runtime"))
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from dit_engines.recipe import Recipe
from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.tensorrt.api import TensorRT
from dit_runtime.backends.tensorrt.cuda import CudaRuntime
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.core.errors import EngineError
from dit_runtime.samplers.by_name import DIFFUSION_SAMPLERS, FLOW_SAMPLERS
from dit_runtime.verify.verification import trajectories_of, verification_of
from support.batches import mixed
from support.cuda_double import ALIGNMENT, VERSION, Machine, Misuse, plans_for
from support.device import SessionsOnly, latents_of, time_steps
from support.hollow import fill
from support.torch_trt import CudaPlace, DoublePlace, memory_given_back, module

EXPORTS = Path(__file__).with_name("exports.py")
PACKAGES = ("torch", "cuda-bindings", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")
# Another order of sums in a batch of another size; not measured on a GPU.
SIZE_LIMITS = {"fp32": 1e-5, "fp16": 1e-2}
LOOPS = 200
KEPT_BYTES = 8 << 20  # of a card, by 200 engines; on the double nothing


class Skip(Exception):
    """What a check needs is not there."""


class Device:
    """A GPU or the double, with a bundle and plans for it.

    Attributes:
        deadline: of the check that runs, on ``time.monotonic``.
    """

    def __init__(self, path: Path, folder: Path, double: bool) -> None:
        self.machine = Machine() if double else None
        self.cuda: Any = CudaRuntime() if self.machine is None else self.machine.cuda
        place = CudaPlace() if self.machine is None else DoublePlace(self.machine)
        self.library = TensorRT(module(place), "tensorrt", VERSION)
        self.bundle = open_bundle(path)
        self.facts = self.cuda.read_device()
        recipe = Recipe("this", self.facts.compute_capability, (1, 4), (1, 2, 3), 512)
        self.stored = plans_for(self.bundle, folder, recipe, self.library, self.facts)
        self.sampler = trajectories_of(self.bundle.manifest.diffusion)
        self.deadline = time.monotonic()

    def engine(self, **options: Any) -> TensorRtEngine:
        return TensorRtEngine(self.bundle, self.stored, self.library, self.cuda, **options)

    def pipe(self, engine: Any) -> Pipeline:
        return Pipeline(self.bundle, engine)

    @property
    def free(self) -> int:
        return self.cuda.read_device().free_bytes

    @property
    def in_time(self) -> bool:
        return time.monotonic() < self.deadline


def check_cuda(device: Device) -> dict[str, Any]:
    """Every method of ``Cuda`` once, and what it is there for."""
    cuda, size = device.cuda, 1 << 20
    stream, event = cuda.create_stream(), cuda.create_event()
    given, back = cuda.allocate_pinned(size), cuda.allocate_pinned(size)
    one, other = cuda.allocate(size), cuda.allocate(size)
    try:
        assert one % ALIGNMENT == other % ALIGNMENT == 0
        pattern = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        given[:] = pattern

        def at(address: int) -> np.ndarray:
            cuda.download(back, address, stream)
            cuda.synchronize(stream)
            return back.copy()

        cuda.wait(event)  # never recorded
        cuda.upload(one, given, stream)
        cuda.copy(other, one, size, stream)
        cuda.clear(one, size // 2, stream)
        cuda.record(event, stream)
        cuda.wait(event)
        assert np.array_equal(at(other), pattern)
        assert not at(one)[: size // 2].any()
        assert np.array_equal(at(one)[size // 2 :], pattern[size // 2 :])

        gc.disable()
        cuda.begin_capture(stream)
        cuda.copy(one, other, size, stream)
        cuda.clear(other, size // 4, stream)
        graph = cuda.end_capture(stream)
        assert np.array_equal(at(other), pattern), "captured work was done"
        cuda.launch(graph, stream)
        assert np.array_equal(at(one), pattern)
        cuda.launch(graph, stream)
        assert not at(one)[: size // 4].any()
        cuda.destroy_graph(graph)

        cuda.upload(other, given, stream)
        cuda.begin_capture(stream)
        cuda.clear(other, size, stream)
        cuda.abandon_capture(stream)
        assert np.array_equal(at(other), pattern), "abandoned work was done"
        cuda.begin_capture(stream)
        try:
            cuda.free(cuda.allocate(size))  # what may not be done in a capture ends it
            allowed = True
        except (EngineError, Misuse):
            allowed = False
        cuda.abandon_capture(stream)
        gc.enable()
        assert np.array_equal(at(other), pattern), "a stream is lost after a capture that failed"

        said = ""
        try:
            cuda.allocate(device.facts.memory_bytes * 4)
        except EngineError as error:
            said = str(error)
        assert "cudaErrorMemoryAllocation" in said, "more memory than there is was given"
        cuda.free(cuda.allocate(ALIGNMENT))
    finally:
        gc.enable()
        cuda.synchronize(stream)
        cuda.free(one)
        cuda.free(other)
        cuda.free_pinned(given)
        cuda.free_pinned(back)
        cuda.destroy_event(event)
        cuda.destroy_stream(stream)
    return {"allocating in a capture": "allowed" if allowed else "refused"}


def check_networks(device: Device) -> dict[str, Any]:
    """Each graph against ONNX Runtime on the CPU, which has FP32 arithmetic: largest difference over largest value."""
    host, found = OnnxRuntimeEngine(device.bundle, threads=1), {}
    rng = np.random.default_rng(0)
    model = device.bundle.manifest.model
    latents = rng.standard_normal((2, model.latent_channels, *model.latent_size), np.float32)
    with device.engine() as engine:
        pairs = {"timesteps": np.array([900, 500, 1], np.float32), "labels": np.array([0, 1, 2], np.int32)}
        name = device.bundle.manifest.table.name
        table = host.session("conditioner").run(pairs, [name])[0]
        step = {
            "state": np.stack([latents] * 3, 1),
            "noise": latents,
            "coefficients": rng.standard_normal((2, 17), np.float32) / 4,
            "guidance": rng.standard_normal((2, 2, model.latent_channels), np.float32),
            "rows": np.array([[0, 1], [2, 2]], np.int32),
            name: table,
        }
        for graph, inputs, outputs in (
            ("conditioner", pairs, [name]),
            ("step", step, ["denoised", "next_state"]),
            ("decoder", {"latents": latents}, ["decoded"]),
        ):
            expected = host.session(graph).run(inputs, outputs)
            for output, one, other in zip(outputs, engine.session(graph).run(inputs, outputs), expected, strict=True):
                found[output] = float(f"{_difference(one, other):.2g}")
        decoded = [engine.session("decoder").run({"latents": latents}, ["decoded"])[0] for _ in range(4)]
    assert all(np.array_equal(decoded[0], other) for other in decoded), (
        "the decoder's graph differs from its first call"
    )
    limit = SIZE_LIMITS[device.bundle.manifest.precision.name]
    assert max(found.values()) <= limit, found
    return found


def check_equality(device: Device) -> dict[str, Any]:
    """Captured steps, queued steps and single calls give the same bits, for every sampler, branch count and batch."""
    flow = device.bundle.manifest.diffusion.path is not None
    samplers = FLOW_SAMPLERS if flow else DIFFUSION_SAMPLERS
    guided = [({"guidance": 1.0}, False), ({"guidance": 2.0}, False), ({"guidance": 2.0}, True)]
    compared, wrong = 0, []
    with device.engine() as engine, device.engine(captured=False) as plain:
        pipes = [device.pipe(each) for each in (engine, plain, SessionsOnly(engine))]
        for batch in (1, 4):
            for branches, (settings, composed) in enumerate(guided, 1):
                labels: list[Any] = [{0: 0.7, 1: 0.3} if composed else index % 3 for index in range(batch)]
                for sampler in samplers:
                    if not device.in_time:
                        raise TimeoutError(f"after {compared} of {6 * len(samplers)}")
                    # Rows of the conditioning table that are computed beside others may be rounded differently.
                    for loop in (*engine._loops, *plain._loops):
                        loop.table._rows.clear()
                        loop.table._end = 0
                    first, *others = (latents_of(pipe, labels, sampler=sampler, steps=4, **settings) for pipe in pipes)
                    compared += 1
                    for name, other in zip(("queued", "single calls"), others, strict=True):
                        most = max(_difference(a, b) for a, b in zip(first, other, strict=True))
                        if most:
                            wrong.append(f"{name}, {sampler}, {batch} images, {branches} branches: {most:.2g}")
        captured = [step.graph is not None for step in engine._loops[0]._graphs._prepared.values()]
    assert not wrong, f"{len(wrong)} of {2 * compared} differ: {'; '.join(wrong[:6])}"
    assert captured, "no step was captured"
    assert all(captured), "a step was not captured"
    return {"compared": compared}


def check_records(device: Device) -> dict[str, Any]:
    """``dit-verify``: the engine matches the PyTorch reference by the bundle's own records."""
    with device.engine() as engine:
        rungs = verification_of(device.bundle, engine).rungs
    figures = {rung.name: [rung.text(rung.value), rung.ratio and round(rung.ratio, 3)] for rung in rungs}
    failed = [rung.name for rung in rungs if not rung.passed]
    assert not failed, f"{failed}: {figures}"
    return figures


def check_batching(device: Device) -> dict[str, Any]:
    """Images that join and leave a batch are the same captured and queued, and those of single calls."""
    with device.engine() as engine, device.engine(captured=False) as plain:
        images = mixed(device.pipe(engine))
        found, queued, called = (
            dict(device.pipe(each).stream(images, 3)) for each in (engine, plain, SessionsOnly(engine))
        )
    assert all(np.array_equal(found[index], queued[index]) for index in found)
    most = max(_difference(found[index], called[index]) for index in found)
    assert most <= SIZE_LIMITS[device.bundle.manifest.precision.name], most
    return {"images": len(found), "from single calls": most}


def check_look_ahead(device: Device) -> dict[str, Any]:
    """A run without reading its latents ends as one that is read at each step, and a second run as the first."""
    settings = {"sampler": device.sampler[1], "steps": 12, "guidance": 2.0, "guidance_interval": (0.4, 1.0)}
    with device.engine() as engine:
        pipe = device.pipe(engine)
        read = latents_of(pipe, [0, 1, 2], **settings)[-2]
        for _ in range(3):
            assert np.array_equal(pipe.sample_latents(pipe.prepare([0, 1, 2], 5, **settings)), read)
    return {}


def check_threads(device: Device) -> dict[str, Any]:
    """Batches in four threads, on one engine and on one each, are those made alone."""
    settings = {"sampler": device.sampler[1], "steps": 6, "guidance": 2.0}
    errors: list[BaseException] = []
    with device.engine() as engine:
        expected = {seed: device.pipe(engine)([seed % 3], seed, **settings) for seed in range(4)}

        def sample(seed: int, own: bool) -> None:
            try:
                mine = device.engine() if own else engine
                for _ in range(3):
                    assert np.array_equal(device.pipe(mine)([seed % 3], seed, **settings), expected[seed])
                if own:
                    mine.close()
            except BaseException as error:  # noqa: BLE001  # raised below
                errors.append(error)

        # The double's streams are not made for several threads, engines are on one stream each.
        for own in (False,) if device.machine else (False, True):
            threads = [threading.Thread(target=sample, args=(seed, own)) for seed in expected]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if errors:
                raise errors[0]
    return {"threads": len(expected)}


def check_collection(device: Device) -> dict[str, Any]:
    """Engines that nobody closed are collected wherever Python likes to, around a capture too."""
    settings = {"sampler": device.sampler[0], "steps": 3, "guidance": 2.0}
    before = gc.get_threshold()
    with device.engine() as engine:
        expected = device.pipe(engine)([0], **settings)
    try:
        for _ in range(4):
            dropped = device.engine()
            device.pipe(dropped)([0], **settings)
            dropped.itself = dropped  # type: ignore[attr-defined]  # only a collection finds it
            del dropped
            with device.engine() as engine:
                gc.set_threshold(1)
                assert np.array_equal(device.pipe(engine)([0], **settings), expected)
                gc.set_threshold(*before)
    finally:
        gc.set_threshold(*before)
    return {}


def check_memory(device: Device) -> dict[str, Any]:
    """Engines that are opened and closed again leave nothing on the device."""
    settings = {"sampler": device.sampler[0], "steps": 2, "guidance": 2.0}

    def use() -> None:
        with device.engine() as engine:
            device.pipe(engine)([0, 1], **settings)

    gc.collect()
    for _ in range(3):
        with memory_given_back():
            use()
    before, done = device.free, 0
    while done < (LOOPS if device.machine is None else 5) and device.in_time:
        with memory_given_back():
            use()
        done += 1
    after = device.free
    figures = {"loops": done, "free before": before, "free after": after}
    assert done
    assert before - after <= (0 if device.machine else KEPT_BYTES), figures
    if device.machine:
        device.machine.check_closed()
    return figures


def check_speed(device: Device) -> dict[str, Any]:
    """A step of the stand-in, captured and queued. Not TensorRT's: what it shows is the loop's own cost."""
    found = {}
    for name, options in (("captured", {}), ("queued", {"captured": False})):
        with device.engine(**options) as engine:
            for batch in (1, 4):
                for guidance in (1.0, 4.0):
                    steps = 50 if device.machine is None else 4
                    times = time_steps(engine, batch, steps, sampler=device.sampler[0], guidance=guidance)
                    found[f"{name}, batch {batch}, {'guided' if guidance > 1 else 'plain'}"] = times
    return found


def check_sanitizer(device: Device) -> dict[str, Any]:
    """Every method of ``Cuda`` under compute-sanitizer: no access beside what was allocated, nothing left."""
    tool = shutil.which("compute-sanitizer")
    if device.machine is not None or tool is None:
        raise Skip("compute-sanitizer of the CUDA toolkit is not here, or there is no GPU")
    command = [sys.executable, __file__, "--only", "cuda", "--seconds", "60"]
    left = max(1.0, device.deadline - time.monotonic())
    found = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", *command],
        env={**os.environ, "DIT_BUNDLE": str(device.bundle.path)},
        capture_output=True,
        text=True,
        timeout=left,
        check=False,
    )
    said = (found.stdout + found.stderr).splitlines()
    assert found.returncode == 0, f"exit code {found.returncode}: {said[-20:]}"
    return {"summary": next((line for line in said if "ERROR SUMMARY" in line), "none")}


def check_onnxruntime(device: Device) -> dict[str, Any]:
    """ONNX Runtime's CUDA provider by the bundle's records, and what its step takes."""
    try:
        engine = OnnxRuntimeEngine(device.bundle, provider="cuda")
    except EngineError as error:
        raise Skip(str(error)) from error
    rungs = verification_of(device.bundle, engine).rungs
    failed = [f"{rung.name} {rung.text(rung.value)}" for rung in rungs if not rung.passed]
    assert not failed, failed
    pipe, steps = device.pipe(engine), 50
    images = pipe.prepare([0], steps=steps, guidance=4.0, sampler=device.sampler[0])
    pipe.sample_latents(images)
    start = time.perf_counter()
    pipe.sample_latents(images)
    taken = (time.perf_counter() - start) / steps
    engine.close()
    return {"step_ms": round(taken * 1e3, 4), "rungs": len(rungs)}


# Each check and the share of the time that it may take. What is likeliest to fail, and cheapest, is first.
CHECKS: dict[str, tuple[Callable[[Device], dict[str, Any]], float]] = {
    "cuda": (check_cuda, 0.1),
    "networks": (check_networks, 0.2),
    "look-ahead": (check_look_ahead, 0.2),
    "records": (check_records, 0.3),
    "equality": (check_equality, 0.4),
    "batching": (check_batching, 0.2),
    "collection": (check_collection, 0.2),
    "threads": (check_threads, 0.2),
    "speed": (check_speed, 0.3),
    "memory": (check_memory, 0.3),
    "sanitizer": (check_sanitizer, 0.2),
    "onnxruntime-cuda": (check_onnxruntime, 0.3),
}


def describe(double: bool) -> dict[str, Any]:
    """What the figures are of. No name of the machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine(), "packages": versions}
    if not double:
        facts = CudaRuntime().read_device()
        found |= {"gpu": vars(facts), "torch's CUDA": torch.version.cuda}
    return found


def run_checks(
    bundles: list[Path],
    seconds: float,
    double: bool,
    report: Callable[[dict[str, Any]], None],
    shape: Path | None = None,
) -> bool:
    """Run all checks on each bundle, and report after each. Returns whether none failed.

    ``shape`` is a hollow bundle (``hollow.py``), which is filled and timed.
    """
    end = time.monotonic() + seconds
    results: dict[str, Any] = {"environment": {}, "checks": []}

    def attempt(name: str, bundle: str, check: Callable[[], dict[str, Any]]) -> bool:
        start = time.monotonic()
        entry: dict[str, Any] = {"check": name, "bundle": bundle, "result": "PASS"}
        try:
            if start >= end:
                raise TimeoutError("no time left")
            entry["figures"] = check()
        except Skip as reason:
            entry |= {"result": "SKIP", "reason": str(reason)}
        except Exception as error:  # noqa: BLE001  # each check stands for itself
            text = f"{type(error).__name__}: {error}"
            entry |= {"result": "FAIL", "reason": text, "traceback": traceback.format_exc()}
        entry["seconds"] = round(time.monotonic() - start, 2)
        results["checks"].append(entry)
        report(results)
        return entry["result"] != "FAIL"

    def environment() -> dict[str, Any]:
        results["environment"] = describe(double)
        return results["environment"]

    passed = attempt("environment", "", environment)
    with tempfile.TemporaryDirectory() as scratch:
        devices: list[Device] = []
        for index, path in enumerate(bundles):

            def make(index: int = index, path: Path = path) -> dict[str, Any]:
                devices.append(Device(path, Path(scratch, str(index)), double))
                return {}

            passed &= attempt("opening", path.name, make)
        if shape is not None:

            def make_shape() -> dict[str, Any]:
                devices.append(Device(fill(shape, Path(scratch, shape.name)), Path(scratch, "shape"), double))
                return {}

            passed &= attempt("filling", shape.name, make_shape)
        for name, (check, share) in CHECKS.items():
            for device in devices:
                if shape is not None and device.bundle.path.name == shape.name and name != "speed":
                    continue
                if name == "cuda" and device is not devices[0]:
                    continue
                device.deadline = min(end, time.monotonic() + share * seconds / len(devices))
                gc.collect()
                passed &= attempt(name, device.bundle.path.name, lambda check=check, device=device: check(device))
    return passed


def show(results: dict[str, Any], file: Path | None) -> None:
    """Print the last check, and write all."""
    entry = results["checks"][-1]
    told = entry.get("reason") or json.dumps(entry["figures"])
    print(f"{entry['result']}  {entry['seconds']:7.2f} s  {entry['check']} {entry['bundle']}  {told}", flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".half")
        half.write_text(json.dumps(results, indent=1, default=str) + "\n")
        half.replace(file)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference over the largest value. NaN differs from NaN."""
    if np.array_equal(one, other):
        return 0.0
    return float(np.abs(one.astype(np.float64) - other).max() / max(np.abs(other.astype(np.float64)).max(), 1e-30))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="for everything (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the results are written after each check")
    parser.add_argument("--double", action="store_true", help="on the double, without a GPU")
    parser.add_argument("--shape", type=Path, help="a bundle without weights (hollow.py), whose step is timed too")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="these checks")
    asked = parser.parse_args(arguments)
    for name in CHECKS.keys() - set(asked.only):
        del CHECKS[name]
    if asked.double:
        torch.set_num_threads(1)  # threads take longer to meet than these tensors to be computed
    faulthandler.dump_traceback_later(asked.seconds + 60, exit=True)  # what never ends is ended; the JSON is there
    with tempfile.TemporaryDirectory() as made:
        if "DIT_BUNDLE" in os.environ:
            bundles = [Path(os.environ["DIT_BUNDLE"])]
        else:
            subprocess.run([sys.executable, EXPORTS, made, "fp32", "fp16"], check=True)
            bundles = [Path(made, f"{precision}.bundle") for precision in ("fp32", "fp16")]
        passed = run_checks(
            bundles, asked.seconds, asked.double, lambda results: show(results, asked.json), asked.shape
        )
    faulthandler.cancel_dump_traceback_later()
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
