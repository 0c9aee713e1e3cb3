"""The first run on a GPU: a small engine built and verified, then every test that needs a GPU and the time of a step.

    DIT_BUNDLE=my.bundle python tests/support/first_run.py         # without it, models are exported here, with torch
    python tests/support/first_run.py --pack                       # the folder as one file, for an issue

All that is found out is in one folder before anything judges it: the environment, the builder's messages and the
inspector's JSON, the verification, the tests' output, the times. A stage that fails leaves what it had; one that does
not end is ended. Nothing is installed, and nothing is asked of the network.
"""

from __future__ import annotations

import argparse
import getpass
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "engines"))
    sys.path.insert(0, str(Path(__file__).parents[2] / "runtime"))
    sys.path.insert(0, str(Path(__file__).parents[1]))

from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt import cuda
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.errors import DiTError

ROOT = Path(__file__).parents[2]
TESTS = "tests/runtime/backends/test_gpu.py"
SMOKE_SECONDS = 60  # what the small engine should take; a large bundle's may take longer
PACKAGES = ("cuda-bindings", "numpy", "onnx", "filelock", "pytest", "pillow", "torch", "dit-export")
TOLD = (".json", ".log")  # of an engine's folder: not the plans, which are large
# Folders whose names may tell whose machine it is.
PRIVATE = ("home", "root", "tmp", "usr", "opt", "mnt", "media", "var", "data", "srv", "work", "workspace", "Users")


class Run:
    """The stages of a run, each with its log in the report's folder.

    Args:
        folder: of the report.
        seconds: for all stages together.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self._end = folder, time.monotonic() + seconds
        self.stages: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.rglob("*"):
            if old.is_file() and old.suffix in (*TOLD, ".half"):
                old.unlink()

    def write(self, name: str, value: Any) -> None:
        half = self.folder / f"{name}.half"
        half.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
        half.replace(self.folder / name)

    def note(self, name: str, seconds: float, failure: str | None) -> bool:
        """Note how a stage ended; returns whether it passed."""
        self.stages.append({"stage": name, "seconds": round(seconds, 1), "failure": failure})
        self.write("summary.json", self.stages)
        print(f"{'PASS' if failure is None else 'FAIL'}  {seconds:6.1f} s  {name}{f': {failure}' if failure else ''}")
        return failure is None

    def call(self, name: str, argv: Sequence[str | Path], keep: Path | None = None, **environment: str) -> bool:
        """Run a child. Its output is in NAME.log, or in NAME.json what it prints and in NAME.log what it says."""
        log, start = self.folder / f"{name}.log", time.monotonic()
        left = self._end - start
        if left <= 0:
            return self.note(name, 0, "no time left")
        print(f"      {name}, at most {left:.0f} s; see {log}", flush=True)
        paths = [str(ROOT / part) for part in ("runtime", "engines", "tests")] + [str(ROOT)]
        known = [item for item in (os.environ.get("PYTHONPATH"),) if item]
        child = {**os.environ, "PYTHONPATH": os.pathsep.join(paths + known), "PYTHONUNBUFFERED": "1", **environment}
        with log.open("wb") as told, (self.folder / f"{name}.json" if "--json" in argv else log).open("ab") as printed:
            process = subprocess.Popen(
                [sys.executable, *argv], stdout=printed, stderr=told, cwd=ROOT, env=child, start_new_session=True
            )
            try:
                code = process.wait(left)
                failure = None if code == 0 else f"ended with {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the group that was started here: builders are children of it
                process.wait()
                failure = f"not done after {left:.0f} s"
        if keep is not None:
            keep_told(keep, self.folder / name)
        if failure is not None:
            failure += f": {_last_line(log)}"
        return self.note(name, time.monotonic() - start, failure)


def keep_told(store: Path, target: Path) -> None:
    """Copy the sidecars, the builder's messages and the inspector's JSON of all engines in a store."""
    for path in sorted(store.rglob("*")):
        if path.suffix in TOLD and path.is_file():
            copy = target / path.relative_to(store)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:400] if lines else "no message"


def command(module: str, *arguments: str | Path) -> list[str | Path]:
    """A command of the distribution, from this clone."""
    return ["-c", f"import sys; from {module} import main; main(sys.argv[1:])", *arguments]


def read_environment() -> tuple[dict[str, Any], str | None]:
    """The machine, its GPU and its libraries; and why nothing can run, if so."""
    found: dict[str, Any] = {"environment": describe_environment(), "packages": {}, "libraries": {}}
    for package in PACKAGES:
        try:
            found["packages"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][package] = None
    reasons = []
    try:
        found["gpu"] = vars(cuda.read_device())
    except DiTError as error:
        found["gpu"] = str(error)
        reasons.append(str(error))
    missing = []
    for name in tensorrt_api.LIBRARIES:
        try:
            found["libraries"][name] = tensorrt_api.import_library(name).version
        except DiTError as error:
            found["libraries"][name] = str(error)
            missing.append(str(error))
    if len(missing) == len(tensorrt_api.LIBRARIES):
        reasons += missing[:1]
    if lacking := [name for name in ("pytest", "filelock", "onnx") if importlib.util.find_spec(name) is None]:
        reasons.append(f"without {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    return found, "; ".join(reasons) or None


def run_stages(folder: Path, seconds: float) -> bool:
    """All stages. Returns whether none failed."""
    run, start = Run(folder, seconds), time.monotonic()
    found, failure = read_environment()
    run.write("environment.json", found)
    if not run.note("environment", time.monotonic() - start, failure):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "bundles")
        given = Path(os.environ["DIT_BUNDLE"]).resolve() if "DIT_BUNDLE" in os.environ else None
        if given is None and not run.call("export", [ROOT / "tests/support/exports.py", made, "fp32", "fp16"]):
            return False
        bundle, store = given or made / "fp16.bundle", Path(scratch, "smoke")
        settings = {"DIT_GPU": "1", **({"DIT_BUNDLE": str(given)} if given else {"DIT_TEST_BUNDLES": str(made)})}
        small = ["--target", "this", "--batch", "1", "--branches", "2", "--rows", "64", "--json", "--store", store]
        smoke = time.monotonic()
        if not run.call("smoke-build", command("dit_engines.command", bundle, *small), store):
            return False
        built = json.loads((folder / "smoke-build.json").read_text(encoding="utf-8"))
        engine = built["builder"].split()[0].replace("_", "-")
        check = [bundle, "--engine", engine, "--quick", "--json", "--store", store]
        passed = run.call("smoke-verify", command("dit_runtime.commands.verify", *check))
        if (took := time.monotonic() - smoke) > SMOKE_SECONDS:
            print(f"      the small engine took {took:.0f} s, {SMOKE_SECONDS} s are usual")
        settings |= {"DIT_GPU_REPORT": str(folder.resolve()), "DIT_GPU_STORE": str(Path(scratch, "store"))}
        pytest = ["-m", "pytest", "-m", "gpu", "-s", "-v", "-p", "no:cacheprovider", TESTS]
        passed &= run.call("tests", pytest, Path(scratch, "store"), **settings)
    for line in speed_lines(folder):
        print(line)
    print(f"{'passed' if passed else 'FAILED'}; make gpu-report packs {folder}")
    return passed


def speed_lines(folder: Path) -> Iterator[str]:
    """The times of a step that the tests found, as lines."""
    for path in sorted(folder.glob("speed-*.json")):
        for name, times in json.loads(path.read_text(encoding="utf-8")).items():
            gap = "" if "launch_gap_us" not in times else f", launch gap {times['launch_gap_us']:.0f} µs"
            yield (
                f"{path.stem} {name}: step p50 {times['step_p50_ms']:.3f} ms, p95 {times['step_p95_ms']:.3f} ms, "
                f"host {times['host_us']:.0f} µs{gap}"
            )


def scrub(text: str) -> str:
    """A text without the names of folders, user and host of this machine."""
    known = {str(ROOT): "CLONE", str(Path.home()): "HOME", sys.prefix: "PYTHON", tempfile.gettempdir(): "TMP"}
    if "DIT_BUNDLE" in os.environ:
        known[str(Path(os.environ["DIT_BUNDLE"]).resolve())] = known[os.environ["DIT_BUNDLE"]] = "BUNDLE"
    for path, name in sorted(known.items(), key=lambda item: -len(item[0])):
        if len(path) > 1:
            text = text.replace(path, name)
    folders = rf"/(?:{'|'.join(PRIVATE)})/(?:[^\s/:'\",)]+/)*(?=[^\s/:'\",)])"  # up to a file's own name
    text = re.sub(folders, "…/", text)
    words = {platform.node(), platform.node().partition(".")[0], getpass.getuser()} - {"", "root"}
    for word in sorted(words, key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", "NAME", text)
    return text


def pack(folder: Path) -> Path:
    """Pack the report's texts in one file beside the folder; its entries name no owner."""
    target = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(target, "w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.suffix in TOLD and path.is_file():
                content = scrub(path.read_text(encoding="utf-8", errors="replace")).encode()
                entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return target


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build/gpu-report", help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="for everything (default: %(default)s)")
    parser.add_argument("--pack", action="store_true", help="pack the folder of the last run, and test nothing")
    asked = parser.parse_args(arguments)
    if not asked.pack:
        return 0 if run_stages(asked.output, asked.seconds) else 1
    if not (asked.output / "environment.json").is_file():
        print(f"{asked.output}: no report; run make gpu-test first", file=sys.stderr)
        return 1
    print(f"{pack(asked.output)}: look through it, then attach it to an issue")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
