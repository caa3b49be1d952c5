"""lm/train/profile.py: which steps are traced, and that a trace is there afterwards."""

import jax
import jax.numpy as jnp
import pytest

from lm.experiment import UserError
from lm.train.profile import Trace, parse_steps


def test_steps_are_a_slice():
    assert parse_steps("10:13") == (10, 13)


@pytest.mark.parametrize("text", ["10", "13:10", "5:5", "0:3", "-1:3", "a:b", "1:2:3"])
def test_what_is_no_slice_is_refused(text):
    with pytest.raises(UserError, match=r"should be FIRST:END, for instance 10:13"):
        parse_steps(text)


@pytest.mark.parametrize("start", [1, 3])  # from the beginning, or resumed in the middle of what is to be traced
def test_a_trace_is_written_when_its_last_step_is_done(tmp_path, start):
    trace = Trace(tmp_path, (2, 4))
    active = []
    for step in range(start, 6):
        trace.before(step)
        active += [step] if trace.active else []
        trace.after(step, jnp.ones(4) * step)
    assert active == [step for step in (2, 3) if step >= start]
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_a_stage_that_ends_early_still_writes_its_trace(tmp_path):
    trace = Trace(tmp_path, (1, 100))
    trace.before(1)
    trace.after(1, jax.jit(lambda x: x + 1)(jnp.ones(4)))
    trace.close()
    assert not trace.active and list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_without_steps_nothing_happens(tmp_path):
    trace = Trace(tmp_path, None)
    trace.before(1)
    trace.after(1, jnp.ones(1))
    trace.close()
    assert not list(tmp_path.iterdir())
