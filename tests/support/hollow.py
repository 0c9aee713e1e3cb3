"""A bundle without its weights, and weights of the same shapes made where they are needed.

    python tests/support/hollow.py dit-xl.bundle build/dit-xl.hollow     # a few MB in place of gigabytes

A machine that is lent for minutes gets the hollow bundle and fills it there: what a step costs depends on shapes, and
not on what the weights are. The golden records do not belong to these weights, so such a bundle is timed, not verified.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx

DTYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}
DEVIATION = 0.02  # of a weight: the usual initialization of a transformer


def empty(bundle: Path, target: Path) -> None:
    """Copy a bundle without its weights' files and engines into the folder ``target``, which must not exist."""
    weights = [spec["weights"] for spec in _manifest(bundle)["graphs"].values() if spec.get("weights")]
    left_out = {Path(name).name for name in weights} | {"engines"}
    shutil.copytree(bundle, target, ignore=lambda folder, names: left_out & set(names))


def fill(hollow: Path, target: Path) -> Path:
    """Copy a hollow bundle to ``target``, with normal weights from a seed, and with their hashes in its manifest."""
    shutil.copytree(hollow, target)
    manifest, rng = _manifest(target), np.random.default_rng(0)
    for spec in manifest["graphs"].values():
        if not spec.get("weights") or (target / spec["weights"]).exists():
            continue
        content = bytearray()
        model = onnx.load(target / spec["file"], load_external_data=False)
        for tensor in model.graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                # The largest are hundreds of MB: one tensor at a time is in memory twice.
                values = rng.standard_normal(tuple(tensor.dims), np.float32) * np.float32(DEVIATION)
                offset, data = int(place["offset"]), values.astype(DTYPES[tensor.data_type]).tobytes()
                assert len(data) == int(place["length"]), f"{spec['file']}: {tensor.name}"
                content.extend(bytes(max(0, offset + len(data) - len(content))))
                content[offset : offset + len(data)] = data
        content.extend(bytes(max(0, manifest["files"][spec["weights"]]["bytes"] - len(content))))
        (target / spec["weights"]).write_bytes(content)
        manifest["files"][spec["weights"]]["sha256"] = hashlib.sha256(content).hexdigest()
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return target


def _manifest(bundle: Path) -> dict[str, dict[str, dict[str, str]]]:
    read: dict[str, dict[str, dict[str, str]]] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return read


if __name__ == "__main__":
    empty(Path(sys.argv[1]), Path(sys.argv[2]))
