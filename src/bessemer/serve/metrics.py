"""/metrics for Prometheus. Every server has a registry of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from bessemer.serve.answer import Answer
from bessemer.serve.models import Models

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GONE = 499
"""Status of a request whose client went away before its answer was complete, as nginx counts it."""


class Metrics:
    """Counters that requests fill, and gauges that are read off the models when somebody looks."""

    def __init__(self, models: Models):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "bessemer_requests", "HTTP requests by endpoint and status; 499: the client went away",
            ["endpoint", "status"], registry=self.registry,
        )  # fmt: skip
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts of answered requests")
        self.generated = self._counter("completion_tokens", "Tokens of answers")
        self.first = self._timer("time_to_first_token", "From the request to the first token of an answer")
        self.each = self._timer("time_per_output_token", "Between two tokens of an answer, its average")
        self.whole = self._timer("request", "From the request to the end of its answers")
        self.registry.register(_Gauges(models))

    def answered(
        self, model: str, began: float, first: float | None, answers: list[Answer], prompt_tokens: int
    ) -> None:
        """A request has ended, one way or another. began, first: when it came and when its first token did."""
        now, tokens = monotonic(), [answer.tokens for answer in answers]
        self.whole.labels(model).observe(now - began)
        self.prompt.labels(model).inc(prompt_tokens)
        self.generated.labels(model).inc(sum(tokens))
        if first is not None:
            self.first.labels(model).observe(first - began)
            if max(tokens) > 1:
                self.each.labels(model).observe((now - first) / (max(tokens) - 1))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"bessemer_{name}", text, ["model"], registry=self.registry)

    def _timer(self, name: str, text: str) -> Histogram:
        return Histogram(f"bessemer_{name}_seconds", text, ["model"], buckets=SECONDS, registry=self.registry)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Gauges:
    """What the models are doing right now."""

    def __init__(self, models: Models):
        self.models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        loaded = list(self.models.loaded.values())
        open_ = GaugeMetricFamily("bessemer_open_samples", "Samples that run or wait", labels=["model"])
        found: dict[str, GaugeMetricFamily] = {}
        for model in loaded:
            figures = model.service.figures
            open_.add_metric([model.facts.name], figures.open)
            for key, value in figures.scheduler.items():
                name = "bessemer_scheduler_" + re.sub(r"\W", "_", key)
                gauge = found.setdefault(name, GaugeMetricFamily(name, f"The scheduler's {key}", labels=["model"]))
                gauge.add_metric([model.facts.name], value)
        yield from (open_, *found.values())
