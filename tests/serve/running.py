"""A running server, as tests see it."""

import dataclasses
import time

import openai

from lm.model.transformer import Transformer
from lm.serve.models import Served
from lm.serve.scheduler import Scheduler
from lm.serve.slot_engine import SlotEngine


@dataclasses.dataclass(frozen=True)
class Running:
    """A running server, its client, and what it serves."""

    port: int
    client: openai.OpenAI
    served: dict[str, Served]
    scheduler: Scheduler
    model: Transformer

    def engine(self) -> SlotEngine:
        return next(iter(self.served.values())).engine


def wait_until(condition, seconds: float) -> float:
    """Seconds until the condition holds; fails after `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - began
