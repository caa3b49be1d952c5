"""Where the time went survives kills: parts add up to the whole, and what was done again is lost."""

import pytest

from lm.stored import read_sealed
from lm.train import goodput
from lm.train.goodput import PARTS, Costs
from lm.train.metrics import MetricsLog


class Clock:
    """time.monotonic() as the test sets it, since a busy machine may take any time between two readings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: float):
        self.now = now
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)


def parts(costs: Costs) -> float:
    total = costs.total()
    return sum(total.get(name, 0.0) for name in (*PARTS, "step_seconds"))


def test_parts_add_up_and_the_rest_is_steps(monkeypatch):
    clock = Clock(monkeypatch, 105.0)
    costs = Costs(100.0, {}, 0.0)
    assert costs.total() == {"start_seconds": 5.0, "lost_seconds": 0.0, "seconds": 5.0, "step_seconds": 0.0}
    with costs.of("save_seconds"):
        clock.now += 2.0
    clock.now += 4.0
    assert costs.total()["save_seconds"] == 2.0 and costs.total()["step_seconds"] == 4.0
    assert parts(costs) == costs.total()["seconds"] == 11.0


def test_what_a_kill_lost_is_what_came_after_the_checkpoint_and_the_start_after_it(monkeypatch):
    Clock(monkeypatch, 1003.0)
    saved = {"seconds": 100.0, "step_seconds": 60.0, "eval_seconds": 30.0, "start_seconds": 10.0, "lost_seconds": 0.0}
    costs = Costs(1000.0, saved, 140.0)
    total = costs.total()
    assert total["lost_seconds"] == 43.0, "40 between the checkpoint and the kill, 3 to start again"
    assert total["step_seconds"] == 60.0 and total["start_seconds"] == 10.0
    assert parts(costs) == total["seconds"] == 143.0


def test_a_second_kill_before_a_checkpoint_forgets_nothing(tmp_path):
    assert goodput.seconds_spent(tmp_path) == 0.0
    with MetricsLog(tmp_path) as log:
        log.metrics({"step": 1, "time": 7.0})
        log.metrics({"step": 2, "time": 9.5})
    goodput.store_seconds_spent(tmp_path, goodput.seconds_spent(tmp_path))
    with MetricsLog(tmp_path) as log:
        log.rewind(0)
    assert goodput.seconds_spent(tmp_path) == 9.5
    with MetricsLog(tmp_path) as log:
        log.metrics({"step": 1, "time": 12.0})
    assert goodput.seconds_spent(tmp_path) == 12.0


def test_a_stage_that_has_not_begun_leaves_no_file(tmp_path):
    goodput.store_seconds_spent(tmp_path, 0.0)
    assert not list(tmp_path.iterdir())
    goodput.store_seconds_spent(tmp_path, 3.0)
    assert read_sealed(tmp_path / "time.json") == {"seconds": 3.0}
