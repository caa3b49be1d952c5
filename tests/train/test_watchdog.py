"""The watchdog ends a process whose step does not come, and leaves alone what does."""

import subprocess
import sys
import textwrap
import time

import pytest

from lm.train.watchdog import EXIT_STUCK, PATIENCE, Watchdog

STUCK = """
    import threading
    from lm.train.watchdog import Watchdog

    def stuck_here():
        threading.Event().wait()

    with Watchdog(0.3) as dog:
        {expect}
        stuck_here()
"""


@pytest.mark.parametrize(
    ("expect", "said"),
    [
        ("dog.expect('step 7 of stage sft')", "waited 0.3 seconds for step 7 of stage sft"),
        ("dog.patiently('the evaluation').__enter__()", "waited 1.2 seconds for the evaluation"),
    ],
)
def test_what_does_not_come_ends_the_process_and_shows_its_stacks(expect, said):
    code = textwrap.dedent(STUCK).format(expect=expect)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == EXIT_STUCK == 75
    assert f"process 0 of 1 {said} (--watchdog)" in run.stderr
    assert "most recent call first" in run.stderr and "in stuck_here" in run.stderr


def test_what_comes_in_time_and_what_is_not_watched_goes_on():
    with Watchdog(None) as off, Watchdog(3000.0) as dog:
        off.expect("nothing")
        dog.expect("step 1")
        with dog.patiently("an evaluation"):
            inside = dog._expected
        after = dog._expected
    assert inside is not None and inside.seconds == 3000 * PATIENCE
    assert after is not None and after.what == "step 1" and after.until > time.monotonic() + 2500


def test_the_clock_begins_again_with_every_step():
    with Watchdog(60.0) as dog:
        dog.expect("step 1")
        first = dog._expected
        time.sleep(0.05)
        dog.expect("step 2")
        second = dog._expected
    assert first is not None and second is not None
    assert second.what == "step 2" and second.until > first.until
