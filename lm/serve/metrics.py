"""Prometheus metrics of the server."""

from __future__ import annotations

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lm.serve.scheduler import Scheduler

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds
STEPS = (1, 2, 3, 4, 5, 10, 30, 100, 1000)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of requests and tokens, and gauges of queue and slots."""

    def __init__(self) -> None:
        self._registry = here = CollectorRegistry()
        self.requests = Counter("lm_requests", "requests by path and status", ["path", "status"], registry=here)
        self.prompt_tokens = Counter("lm_prompt_tokens", "tokens of prompts", ["model"], registry=here)
        self.sampled_tokens = Counter("lm_sampled_tokens", "sampled tokens", ["model"], registry=here)
        self.cancelled = Counter("lm_cancelled_requests", "requests whose client went before the end", registry=here)
        self.first_token = Histogram(
            "lm_first_token_seconds", "from the request to its first token", buckets=FIRST_TOKEN, registry=here
        )
        self.first_steps = Histogram(
            "lm_first_token_steps",
            "steps of the engine from the request to its first token",
            buckets=STEPS,
            registry=here,
        )
        self.whole = Histogram("lm_request_seconds", "from the request to its end", buckets=WHOLE, registry=here)

    def watch(self, scheduler: Scheduler) -> None:
        """Add the gauges, which are read when the metrics are."""
        here = self._registry
        Gauge("lm_waiting", "completions that wait for a slot", registry=here).set_function(scheduler.waiting)
        running = Gauge("lm_running", "completions in slots", ["model"], registry=here)
        slots = Gauge("lm_slots", "completions that are sampled at once", ["model"], registry=here)
        for name, engine in scheduler.engines.items():
            running.labels(name).set_function(functools.partial(getattr, engine, "running"))
            slots.labels(name).set(engine.sizes.slots)

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)
