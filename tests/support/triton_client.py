"""Triton's own clients, as a program: it needs their package, which the environment of the tests does not have.

    python triton_client.py FOLDER < {"http": ADDRESS, "grpc": ADDRESS, "steps": [STEP, …]}

A step is ``{"by": "http" | "grpc" | "stream", "model", "tensors", "expected", "cancel_after"}``. All steps run at once.
Printed is what each got: ``{"answers": [{"file"}, {"error", "status"}, …], "seconds"}``, files with arrays in FOLDER.
"""

from __future__ import annotations

import json
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

OUTPUTS = ("images", "png", "index", "step", "steps", "seed", "label")
KINDS = {"BYTES": np.object_, "INT64": np.int64, "INT32": np.int32, "FP64": np.float64}
OF_INPUT = {"seeds": "INT64", "steps": "INT32", "previews": "INT32", "guidance": "FP64"}


def inputs_of(library: Any, tensors: dict[str, list[Any]]) -> list[Any]:
    found = []
    for name, values in tensors.items():
        kind = OF_INPUT.get(name, "BYTES")
        tensor = library.InferInput(name, [len(values)], kind)
        tensor.set_data_from_numpy(np.array(values, KINDS[kind]))
        found.append(tensor)
    return found


class Answers:
    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self.found: list[dict[str, Any]] = []

    def add(self, result: Any) -> None:
        arrays = {name: result.as_numpy(name) for name in OUTPUTS}
        file = f"{self._number}-{len(self.found)}.npz"
        kept = {name: array for name, array in arrays.items() if array is not None}
        np.savez(
            self._folder / file,
            **{name: array.astype(np.bytes_) if array.dtype == np.object_ else array for name, array in kept.items()},
        )
        self.found.append({"file": file})

    def add_error(self, error: InferenceServerException) -> None:
        self.found.append({"error": error.message(), "status": error.status()})


def run_whole(library: Any, address: str, step: dict[str, Any], answers: Answers) -> None:
    client = library.InferenceServerClient(address)
    try:
        answers.add(client.infer(step["model"], inputs_of(library, step["tensors"])))
    except InferenceServerException as error:
        answers.add_error(error)
    client.close()


def run_stream(address: str, step: dict[str, Any], answers: Answers) -> None:
    library, events = tritonclient.grpc, queue.Queue[Any]()
    client = library.InferenceServerClient(address)
    client.start_stream(lambda result, error: events.put((result, error)))
    client.async_stream_infer(
        step["model"], inputs_of(library, step["tensors"]), enable_empty_final_response=True, request_id="1"
    )
    if "cancel_after" in step:
        time.sleep(step["cancel_after"])
        client.stop_stream(cancel_requests=True)
        return
    final = False
    while not final:
        result, error = events.get(timeout=60)
        if error is not None:
            answers.add_error(error)
            final = len(answers.found) >= step.get("expected", 1)
            continue
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        if response.outputs:
            answers.add(result)
    client.stop_stream()


def main() -> None:
    folder, asked = Path(sys.argv[1]), json.load(sys.stdin)

    def run(number: int, step: dict[str, Any]) -> dict[str, Any]:
        answers, start = Answers(folder, number), time.monotonic()
        if step["by"] == "stream":
            run_stream(asked["grpc"], step, answers)
        else:
            library = tritonclient.http if step["by"] == "http" else tritonclient.grpc
            run_whole(library, asked[step["by"]], step, answers)
        return {"answers": answers.found, "seconds": time.monotonic() - start}

    with ThreadPoolExecutor(len(asked["steps"])) as pool:
        print(json.dumps(list(pool.map(run, range(len(asked["steps"])), asked["steps"]))))


if __name__ == "__main__":
    main()
