"""Runs several sweep workers on this machine, each on its share of the cores, and replaces those that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from lm.experiment import UserError
from lm.parent_death import with_parent
from lm.sweep.worker import EXIT_USER, WorkerStopped

MOST_DEATHS = 10  # total number of worker deaths before giving up
POLL_SECONDS = 0.2
STOPPED = [WorkerStopped(number).exit_code for number in (signal.SIGINT, signal.SIGTERM)]


def pool(words: list[str], count: int) -> None:
    """Run `lm WORDS --join I` in `count` processes until all have ended.

    Raises:
        WorkerStopped: a signal arrived, and all workers have ended.
        UserError: a worker ended with a user's error, or workers keep dying.
    """
    stopping = 0

    def stop(number: int, _: object) -> None:
        nonlocal stopping
        stopping = number
        for child in children.values():
            child.send_signal(signal.SIGTERM)

    children: dict[int, subprocess.Popen] = {}
    deaths = 0
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for place in range(count):
            children[place] = _start(words, place, count)
        while children:
            time.sleep(POLL_SECONDS)
            for place, child in list(children.items()):
                if child.poll() is None:
                    continue
                del children[place]
                if child.returncode not in (0, *STOPPED) and not stopping:
                    deaths += 1
                    if child.returncode == EXIT_USER:  # it printed the reason, which holds for every worker
                        stop(signal.SIGTERM, None)
                        raise UserError(f"worker {place + 1} stopped with the error above")
                    if deaths > MOST_DEATHS:
                        stop(signal.SIGTERM, None)
                        raise UserError(f"workers died {deaths} times, the last with code {child.returncode}")
                    print(f"worker {place + 1} died with exit code {child.returncode} and is replaced", flush=True)
                    children[place] = _start(words, place, count)
    finally:
        for child in children.values():
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping:
        raise WorkerStopped(stopping)


def _start(words: list[str], place: int, count: int) -> subprocess.Popen:
    """Start one worker, on its share of the cores if there are enough for all."""
    child = subprocess.Popen(
        with_parent([sys.executable, "-m", "lm.cli.main", *words, "--join", str(place + 1)]),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= count:
            os.sched_setaffinity(child.pid, cores[place * len(cores) // count : (place + 1) * len(cores) // count])
    return child
