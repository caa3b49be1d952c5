"""A signal is a flag between steps; a second Ctrl-C is at once."""

import os
import signal

import pytest

from lm.train.signals import stop_on_signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_only_sets_the_flag(name, capfd):
    with stop_on_signals() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested == name
    assert capfd.readouterr().err.strip().startswith(f"{name}: saving a checkpoint, then stopping")


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C did nothing")


def test_repeated_sigterm_keeps_the_first_name():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"


def test_handlers_of_before_are_put_back_also_after_an_error():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), stop_on_signals():
        raise RuntimeError
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
