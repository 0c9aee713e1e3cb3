"""``make fuzz MINUTES=10``: the property tests of files with many examples, then each reader under atheris.

Half of the time each. What is found stays in ``build/fuzz/found``, and the exit code is 1.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "fuzz"
EXAMPLES = "2000"  # of each kind of file in one round
NAMES = ("decode", "manifest", "table", "record", "noise", "graph", "golden", "safetensors")


def main(minutes: float) -> int:
    """Fuzz for so many minutes; the exit code says whether anything was found."""
    bundles = Path(os.environ.get("DIT_TEST_BUNDLES", FOLDER / "bundles"))
    if not (bundles / "fp32.bundle").is_dir():
        subprocess.run([sys.executable, ROOT / "tests" / "support" / "exports.py", bundles], check=True)
    failed = [name for name in ("properties", *NAMES) if not _fuzz(name, minutes * 30, bundles)]
    print(f"fuzz: {minutes:g} minutes, failures in {', '.join(failed) or 'nothing'}; see {FOLDER / 'found'}")
    return 1 if failed else 0


def _fuzz(name: str, seconds: float, bundles: Path) -> bool:
    if name == "properties":
        return _run_properties(time.monotonic() + seconds, bundles)
    if importlib.util.find_spec("atheris") is None:
        print(f"fuzz: {name} is left out: pip install atheris", file=sys.stderr)
        return True
    harness = [ROOT / "tests" / "fuzz" / "harnesses.py", name, str(int(seconds / len(NAMES)) or 1), FOLDER, bundles]
    return subprocess.run([sys.executable, *harness], cwd=ROOT, check=False).returncode == 0


def _run_properties(end: float, bundles: Path) -> bool:
    """Rounds of the property tests, each with other examples, until the time is over."""
    seed = time.time_ns() % 2**32
    while time.monotonic() < end:
        environment = {**os.environ, "DIT_FUZZ_EXAMPLES": EXAMPLES, "DIT_TEST_BUNDLES": os.fspath(bundles)}
        tests = ["-q", f"--hypothesis-seed={seed}", "tests/test_mutations.py"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *tests],
                cwd=ROOT,
                env=environment,
                check=False,
                timeout=max(end - time.monotonic(), 1),
            )
        except subprocess.TimeoutExpired:
            break
        if done.returncode:
            print(f"fuzz: found with --hypothesis-seed={seed} and DIT_FUZZ_EXAMPLES={EXAMPLES}", file=sys.stderr)
            return False
        seed += 1
    return True


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 10))
