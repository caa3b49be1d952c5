"""Worker processes of data: Ctrl-C is for the process that started them."""

import signal

from lm.data.workers import WorkerPool


def blocked(shared, task):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_reaches_no_worker_even_while_it_starts():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with WorkerPool("test", "rows", 0, processes=2) as pool:
        assert all(pool.map(blocked, range(4)))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
