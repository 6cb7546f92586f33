"""/metrics for Prometheus. Every server has its own registry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from bessemer.addons.serve.events import ChoiceBuilder
    from bessemer.addons.serve.models import Models

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
CLIENT_GONE = 499
"""Status of a request whose client disconnected before its answer was complete, as in nginx."""


class ServerMetrics:
    """Counters that requests increment, and gauges that are read from the models on demand."""

    def __init__(self, models: Models):
        self.registry = CollectorRegistry()
        text = "HTTP requests by endpoint and status; 499: the client went away"
        self.requests = Counter("bessemer_requests", text, ["endpoint", "status"], registry=self.registry)
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts of answered requests")
        self.generated = self._counter("completion_tokens", "Tokens of answers")
        self.first = self._timer("time_to_first_token", "From the request to the first token of an answer")
        self.each = self._timer("time_per_output_token", "Average time between two tokens of an answer")
        self.whole_request = self._timer("request", "From the request to the end of its answers")
        self.registry.register(_Gauges(models))

    def answered(
        self, model: str, started: float, first: float | None, choices: Sequence[ChoiceBuilder], prompt_tokens: int
    ) -> None:
        """Counts a request that has ended, successfully or not. started, first: when it and its first token arrived."""
        now, tokens = monotonic(), [choice.completion_tokens for choice in choices]
        self.whole_request.labels(model).observe(now - started)
        self.prompt.labels(model).inc(prompt_tokens)
        self.generated.labels(model).inc(sum(tokens))
        if first is not None:
            self.first.labels(model).observe(first - started)
            if max(tokens) > 1:
                self.each.labels(model).observe((now - first) / (max(tokens) - 1))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"bessemer_{name}", text, ["model"], registry=self.registry)

    def _timer(self, name: str, text: str) -> Histogram:
        return Histogram(f"bessemer_{name}_seconds", text, ["model"], buckets=SECONDS, registry=self.registry)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Gauges:
    """The current state of the models."""

    def __init__(self, models: Models):
        self.models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        loaded = list(self.models.loaded.values())
        open_ = GaugeMetricFamily("bessemer_open_samples", "Samples that run or wait", labels=["model"])
        gauges: dict[str, GaugeMetricFamily] = {}
        for model in loaded:
            stats = model.service.stats
            open_.add_metric([model.facts.name], stats.open)
            for key, value in stats.scheduler.items():
                name = "bessemer_scheduler_" + re.sub(r"\W", "_", key)
                gauge = gauges.setdefault(name, GaugeMetricFamily(name, f"The scheduler's {key}", labels=["model"]))
                gauge.add_metric([model.facts.name], value)
        yield from (open_, *gauges.values())
