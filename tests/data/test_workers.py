"""Worker processes of data: Ctrl-C is for the process that started them, which ends their tasks."""

import multiprocessing
import signal
import time

import pytest

from lm.data.workers import WorkerPool


def blocked(shared, task):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def slow(shared, task):
    time.sleep(600 * task)
    return task


def test_ctrl_c_reaches_no_worker_even_while_it_starts():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with WorkerPool("test", "rows", 0, processes=2) as pool:
        assert all(pool.map(blocked, range(4)))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize("files", [1, 3])
def test_an_exception_waits_for_no_task(files):
    began = time.monotonic()

    def read(file):
        for _ in pool.map(slow, [0] * files + [1] * 9):
            if file == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), WorkerPool("test", "rows", 0, processes=2) as pool:
        pool.each(read, range(files))
    while multiprocessing.active_children():
        time.sleep(0.1)
    assert time.monotonic() - began < 300
