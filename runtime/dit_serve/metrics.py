"""What a server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dit_serve.figures import COUNTERS, GAUGES
from dit_serve.model import ServedModel

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
PATHS = ("/generate", "/v1/images/generations", "/v1/models", "/info", "/health", "/metrics")


class Metrics:
    """The figures of a server, in a registry of its own."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Loads(models))
        self._answers = Counter("dit_answers", "Answers", ("path", "status"), registry=self._registry)
        self._seconds = Histogram(
            "dit_answer_seconds", "Time to an answer's beginning", ("path",), buckets=SECONDS, registry=self._registry
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        known = path if path in PATHS else "other"
        self._answers.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """All figures and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Loads(Collector):
    """What each model's batcher is doing when it is asked."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """The families of all models."""
        loads = {name: model.batcher.load() for name, model in self._models.items()}
        for family, figures in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for metric, text, field in figures:
                made = family(metric, text, labels=("model",))
                for name, load in loads.items():
                    made.add_metric([name], getattr(load, field))
                yield made
