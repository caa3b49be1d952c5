"""lm/train/profile.py: which steps are traced, and that a trace is there afterwards."""

import subprocess
import sys

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


# Runs in a separate process, because the profiler once crashed a process that had run thousands of tests.
TRACED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from lm.train.profile import Trace

for start in (1, 3):  # from the beginning, or resumed in the middle of what is to be traced
    folder, active = Path(sys.argv[1], str(start)), []
    trace = Trace(folder, (2, 4))
    for step in range(start, 6):
        trace.before(step)
        active += [step] if trace.active else []
        trace.after(step, jnp.ones(4) * step)
    print(active, len(list(folder.glob("plugins/profile/*/*.xplane.pb"))))
trace = Trace(Path(sys.argv[1], "short"), (1, 100))
trace.before(1)
trace.after(1, jax.jit(lambda x: x + 1)(jnp.ones(4)))
trace.close()
print(trace.active, len(list(trace.folder.glob("plugins/profile/*/*.xplane.pb"))))
"""


def test_a_trace_is_written_after_its_last_step_or_when_a_stage_ends(tmp_path):
    command = [sys.executable, "-c", TRACED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.splitlines() == ["[2, 3] 1", "[3] 1", "False 1"]


def test_without_steps_nothing_happens(tmp_path):
    trace = Trace(tmp_path, None)
    trace.before(1)
    trace.after(1, jnp.ones(1))
    trace.close()
    assert not list(tmp_path.iterdir())
