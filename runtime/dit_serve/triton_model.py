"""A bundle as a model of Triton Inference Server's Python backend; ``dit-triton`` writes the file that imports it.

Each instance is a process of its own with an engine and a running batch. ``execute`` submits the images of requests and
returns; answers are sent when images are finished. It waits while the batch is full, so that Triton gives further
requests to other instances. Only Triton's own process has the module ``triton_python_backend_utils``.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.decode import decode
from dit_runtime.core.errors import DiTError, EngineError, SamplingError, explain
from dit_runtime.core.reading import FileError
from dit_runtime.sampling.requests import ImageRequest
from dit_serve.batcher import Batcher
from dit_serve.bodies import MOST_IMAGES, GenerateBody
from dit_serve.figures import COUNTERS, GAUGES
from dit_serve.jobs import (
    DeadlineError,
    Event,
    Failed,
    Finished,
    Job,
    Preview,
    QueueFullError,
    Retried,
    Started,
    StoppingError,
)
from dit_serve.model import Model
from dit_serve.triton_files import BUNDLE, INPUTS
from dit_serve.warm_up import open_pipeline, warm_up

DRAIN_SECONDS = 300.0  # for images that are being made when the model is unloaded
WATCH_SECONDS = 0.05  # between two looks at who has hung up
FIGURES_SECONDS = 1.0  # between two writings of the figures
FORMATS = ("pixels", "png")
MANY = frozenset(name for name, _, length in INPUTS if length != 1)

Utils = Any  # the module triton_python_backend_utils


class Places:
    """How many images an instance has taken, which is what its batch holds at most, or one request more."""

    def __init__(self, count: int) -> None:
        self._count, self._taken, self._changed = count, 0, threading.Condition()

    def take(self, count: int) -> None:
        """Wait for a free place, and take ``count``, if need be beyond the last one."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken < self._count)
            self._taken += count

    def leave(self, count: int) -> None:
        """Give places back."""
        with self._changed:
            self._taken -= count
            self._changed.notify()


class TritonPythonModel:
    """The interface of Triton's Python backend."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle, warm the engine up, and start the batch.

        Raises:
            TritonModelException: the bundle or the engine cannot be opened here, in one line.
        """
        import triton_python_backend_utils as utils

        self._utils: Utils = utils
        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._decoupled: bool = config["model_transaction_policy"]["decoupled"]
        try:
            self._model = _open_model(args, settings)
            warm_up(self._model.pipe, int(settings["batch_size"]))
        except DiTError as error:
            raise utils.TritonModelException(str(error)) from error
        self._batcher = self._model.batcher
        self._batcher.__enter__()
        self._places = Places(int(settings["batch_size"]))
        self._answers = set[Answer]()
        self._figures = Figures(utils, self._batcher, args)
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="dit-watch", daemon=True)
        self._watcher.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit the images of requests; their answers follow."""
        for request in requests:
            answer = Answer(self._utils, self._model, request.get_response_sender(), self._decoupled)
            try:
                body, kind = body_from_tensors(
                    {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, self._decoupled
                )
                images = body.prepare(self._model.pipe, {})
                self._places.take(len(images))
            except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for an answer
                answer.refuse(error if isinstance(error, DiTError) else EngineError(explain(error)))
                continue
            answer.images, answer.kind, answer.eta = images, kind, body.eta
            answer.left = functools.partial(self._places.leave, 1)
            deadline = None if body.timeout is None else time.monotonic() + body.timeout
            answer.jobs = [
                Job(image, functools.partial(answer.take, index), deadline, body.previews)
                for index, image in enumerate(images)
            ]
            self._answers.add(answer)
            try:
                self._batcher.submit(answer.jobs)
            except DiTError as error:
                answer.refuse(error)

    def finalize(self) -> None:
        """Finish the images that were taken, and end."""
        self._batcher.stop(finish=True, timeout=DRAIN_SECONDS)
        self._ended.set()
        self._watcher.join()
        self._figures.write()
        self._model.pipe.engine.close()

    def _watch(self) -> None:
        """The thread that lets images of whoever has hung up leave, and writes the figures."""
        written = 0.0
        while not self._ended.wait(WATCH_SECONDS):
            for answer in list(self._answers):
                if answer.ended or answer.cancel_if_nobody_waits():
                    self._answers.discard(answer)
            if time.monotonic() - written > FIGURES_SECONDS:
                self._figures.write()
                written = time.monotonic()


def _open_model(args: Mapping[str, str], settings: Mapping[str, str]) -> Model:
    if args["model_instance_kind"] == "GPU":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(
            os.environ.get("CUDA_VISIBLE_DEVICES"), int(args["model_instance_device_id"])
        )
    folder = settings["bundle"] or Path(args["model_repository"], args["model_version"], BUNDLE)
    bundle = open_bundle(folder, Path(settings["store"]) if settings["store"] else None)
    height, width = map(int, settings["size"].split("x"))
    pipe = open_pipeline(
        bundle, settings["engine"], int(settings["threads"]), (height, width), settings["precision"] or None
    )
    batch_size = int(settings["batch_size"])
    return Model(args["model_name"], pipe, batch_size, most_waiting=batch_size + MOST_IMAGES)


def visible_device(visible: str | None, number: int) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` must be for a process that uses one GPU of those that Triton sees.

    Args:
        visible: its value for Triton; None where it is not set.
        number: of the GPU, as Triton counts those that it sees.
    """
    return str(number) if visible is None else visible.split(",")[number].strip()


def body_from_tensors(tensors: Mapping[str, Any], decoupled: bool) -> tuple[GenerateBody, str]:
    """A request's body, as ``POST /generate`` has it, and the format of its images.

    Args:
        tensors: by name; ``INPUTS`` has their types and lengths.
        decoupled: whether a request has an answer for each image, and so may have previews.

    Raises:
        SamplingError: the tensors are no such body.
    """
    values: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in tensor.tolist()]
        values[name] = found if name in MANY else found[0]
    if len(values.get("seeds", ())) == 1:
        (values["seeds"],) = values["seeds"]
    kind = values.pop("format", FORMATS[0])
    if kind not in FORMATS:
        raise SamplingError(f"format {kind!r:.40}: expected {' or '.join(FORMATS)}")
    if values.get("previews") and not decoupled:
        raise SamplingError("previews: expected 0, since a request has one answer; write the model without --whole")
    try:
        return decode(GenerateBody, values), kind
    except FileError as error:
        raise SamplingError(f"the request's tensors: {error}") from error


@dataclass(eq=False)
class Answer:
    """The answers to one request: sent by the batcher's thread, or ended by the watching one.

    Attributes:
        utils: Triton's module.
        model: that makes the images.
        sender: of Triton.
        decoupled: whether each image is an answer of its own.
        images, jobs: of the request.
        kind: of ``FORMATS``.
        eta: DDIM's, for the record.
        left: called for each image that has ended.
        ended: whether the last answer was sent.
    """

    utils: Utils
    model: Model
    sender: Any
    decoupled: bool
    images: Sequence[ImageRequest] = ()
    jobs: Sequence[Job] = ()
    kind: str = FORMATS[0]
    eta: float = 0.0
    left: Any = None
    ended: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._over = set[int]()  # images that have ended
        self._found: dict[int, Finished] = {}  # images that wait for the others, where there is one answer

    def take(self, index: int, event: Event) -> None:
        """Take an event of an image, in the batcher's thread."""
        if isinstance(event, Started | Retried):
            return
        with self._lock:
            if self.ended:
                return
            if isinstance(event, Preview):
                self._send(self._tensors({index: event}))
                return
            self._end_image(index)
            last = len(self._over) == len(self.images)
            if isinstance(event, Failed):
                self._fail(event.fault, last or not self.decoupled)
            elif self.decoupled:
                self._send(self._tensors({index: event}), last)
            else:
                self._found[index] = event
                if last:
                    self._send(self._tensors({key: self._found[key] for key in sorted(self._found)}), last)

    def refuse(self, error: DiTError) -> None:
        """Send an error as the only answer."""
        with self._lock:
            self._fail(error, last=True)

    def cancel_if_nobody_waits(self) -> bool:
        """Let the images leave where the caller has hung up; whether it has."""
        if not self.sender.is_cancelled():
            return False
        with self._lock:
            if not self.ended:
                self._finish()
                self.sender.send(flags=self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return True

    def _fail(self, error: DiTError, last: bool) -> None:
        response = self.utils.InferenceResponse(error=self.utils.TritonError(str(error), _code_of(self.utils, error)))
        self._send_response(response, last)

    def _send(self, tensors: Mapping[str, Any], last: bool = False) -> None:
        outputs = [self.utils.Tensor(name, value) for name, value in tensors.items()]
        self._send_response(self.utils.InferenceResponse(outputs), last)

    def _send_response(self, response: Any, last: bool) -> None:
        if last:
            self._finish()
        self.sender.send(response, flags=self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)

    def _finish(self) -> None:
        """Nothing more is sent; images that are not finished leave the batch."""
        self.ended = True
        for index, job in enumerate(self.jobs):
            if index not in self._over:
                job.cancel()
                self._end_image(index)

    def _end_image(self, index: int) -> None:
        self._over.add(index)
        self.left()

    def _tensors(self, found: Mapping[int, Finished | Preview]) -> dict[str, Any]:
        """The output tensors for images by their index."""
        images = [self.images[index] for index in found]
        steps = [image.schedule.steps for image in images]
        tensors = {
            "index": np.array(list(found), np.int32),
            "step": np.array(
                [
                    event.step if isinstance(event, Preview) else count
                    for event, count in zip(found.values(), steps, strict=True)
                ],
                np.int32,
            ),
            "steps": np.array(steps, np.int32),
            "seed": np.array([image.seed for image in images], np.uint64).view(np.int64),
            "label": np.array([self._label_of(image).encode() for image in images], np.object_),
        }
        if self.kind == "png":
            files = [
                self.model.png(event.image, self.images[index], self.eta, event.batches)
                if isinstance(event, Finished)
                else self.model.png(event.image)
                for index, event in found.items()
            ]
            tensors["png"] = np.array([base64.b64encode(file) for file in files], np.object_)
        else:
            tensors["images"] = np.stack([event.image for event in found.values()])
        return tensors

    def _label_of(self, image: ImageRequest) -> str:
        """The name of an image's class, or the mixture of several as a request may give it."""
        names = self.model.pipe.manifest.class_names
        if len(image.labels) == 1:
            (number,) = image.labels
            return names[number] if names else str(number)
        return "+".join(f"{number}:{weight:g}" for number, weight in image.labels.items())


def _code_of(utils: Utils, error: DiTError) -> Any:
    """Triton's code for an error."""
    if isinstance(error, QueueFullError | StoppingError | DeadlineError):
        return utils.TritonError.UNAVAILABLE
    return utils.TritonError.INVALID_ARG if isinstance(error, SamplingError) else utils.TritonError.INTERNAL


class Figures:
    """A batcher's load among Triton's own metrics.

    Args:
        utils: Triton's module.
        batcher: of the instance.
        args: of ``initialize``.
    """

    def __init__(self, utils: Utils, batcher: Batcher, args: Mapping[str, str]) -> None:
        self._batcher, self._families = batcher, []
        self._metrics: dict[str, Any] = {}
        self._written: dict[str, int] = {}
        names = {"model": "model_name", "version": "model_version", "instance": "model_instance_name"}
        labels = {name: args[key] for name, key in names.items()}
        for kind, figures in ((utils.MetricFamily.GAUGE, GAUGES), (utils.MetricFamily.COUNTER, COUNTERS)):
            for name, text, field in figures:
                family = utils.MetricFamily(name=name, description=text, kind=kind)
                self._families.append(family)  # a metric does not keep its family alive
                self._metrics[field] = family.Metric(labels=labels)

    def write(self) -> None:
        """Write the load as it is."""
        load = self._batcher.load()
        for _, _, field in GAUGES:
            self._metrics[field].set(getattr(load, field))
        for _, _, field in COUNTERS:
            # Triton's counter goes on from the process before this one, which may have been killed.
            self._metrics[field].increment(getattr(load, field) - self._written.get(field, 0))
            self._written[field] = getattr(load, field)
