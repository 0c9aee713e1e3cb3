"""Bundles altered on purpose, and inputs of their graphs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from dit_runtime.bundle.reader import Bundle, open_bundle
from support.optional import onnx


def signed(path: Path) -> Bundle:
    manifest = json.loads((path / "manifest.json").read_text())
    for name, spec in manifest["files"].items():
        content = (path / name).read_bytes()
        spec.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (path / "manifest.json").write_text(json.dumps(manifest))
    return open_bundle(path)


def edit_graph(path: Path, name: str, change) -> None:
    file = path / "graphs" / f"{name}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model.graph)
    onnx.save(model, file)


def step_inputs(z: np.ndarray, branches: int) -> dict[str, np.ndarray]:
    """Inputs under which ``denoised`` is the guided prediction of the first branch."""
    batch = len(z)
    state = np.zeros((batch, 3, *z.shape[1:]), np.float32)
    state[:, 0] = z
    guidance = np.zeros((branches, batch, z.shape[1]), np.float32)
    guidance[0] = 1
    coefficients = np.zeros((batch, 17), np.float32)
    coefficients[:, 1] = 1
    return {"state": state, "noise": np.zeros_like(z), "coefficients": coefficients, "guidance": guidance}
