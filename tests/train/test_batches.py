"""Batches made ahead are those of their step, in any order; what goes wrong comes out at its step; the thread ends."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lm.experiment import UserError
from lm.train.batches import PREFETCH_STEPS, Prefetcher
from lm.types import TokenBatch


class Source:
    """Batches that carry their step, and which were asked for."""

    def __init__(self, wrong: int | None = None):
        self.asked: list[int] = []
        self.wrong = wrong
        self.thread: threading.Thread | None = None

    def __call__(self, step: int) -> TokenBatch:
        self.asked.append(step)
        self.thread = threading.current_thread()
        if step == self.wrong:
            raise UserError(f"step {step}: nothing to train on")
        zeros = np.zeros((1, 1), np.int32)
        return TokenBatch(tokens=np.full((1, 1), step, np.int32), weights=zeros, segments=zeros, positions=zeros)


def number(batch: TokenBatch) -> int:
    return int(batch.tokens[0, 0])


@pytest.mark.parametrize("start", [0, 7])
def test_steps_come_in_order_from_where_the_run_goes_on_and_none_past_the_end(start):
    source = Source()
    prefetcher = Prefetcher(source, 10)
    assert [number(prefetcher(step)) for step in range(start, 10)] == list(range(start, 10))
    prefetcher.close()
    assert source.asked == list(range(start, 10))
    assert source.thread is not threading.current_thread()


def test_any_other_step_gives_its_own_batch_too():
    prefetcher = Prefetcher(Source(), 100)
    assert [number(prefetcher(step)) for step in (5, 6, 2, 3, 50, 100, 51, 51)] == [5, 6, 2, 3, 50, 100, 51, 51]
    prefetcher.close()


def test_what_is_asked_next_is_ready_and_little_more():
    source = Source()
    prefetcher = Prefetcher(source, 100)
    prefetcher(0)
    while len(source.asked) < PREFETCH_STEPS + 1:
        threading.Event().wait(0.001)
    prefetcher.close()
    assert (
        PREFETCH_STEPS + 1 <= len(source.asked) <= PREFETCH_STEPS + 3
    )  # taken, ready, in the making, and one while it closes


def test_an_error_comes_out_as_itself_at_its_step():
    source = Source(wrong=3)
    prefetcher = Prefetcher(source, 100)
    assert [number(prefetcher(step)) for step in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="step 3: nothing to train on"):
        prefetcher(3)
    assert not source.thread.is_alive()
    with pytest.raises(UserError, match="step 3"):
        prefetcher(3)


def test_closing_ends_the_thread_at_once_and_can_be_done_twice():
    source = Source()
    prefetcher = Prefetcher(source, 10**9)
    prefetcher.close()
    prefetcher(0)
    prefetcher.close()
    assert not source.thread.is_alive()
    prefetcher.close()
    assert number(prefetcher(4)) == 4
    prefetcher.close()
