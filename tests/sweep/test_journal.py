"""A journal of a sweep that was cut or damaged anywhere is taken up again, and no killed process holds it."""

import time

import pytest

from lm.sweep.study import Study
from lm.sweep.sweep import Random, Sweep
from tests.sweep.studies import HEADS, opened, run_out
from tests.sweep.tiny import base, sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def journals(tmp_path_factory):
    """The journal of a search with a failed trial, and its sweep."""
    place = tmp_path_factory.mktemp("journal")
    value = Sweep("s", base, HEADS, seeds=(0, 1), search=Random(4, seed=5))
    study, folder = opened(place, value)
    run_out(study, worse=lambda settings: settings["model.num_heads"] == "4")
    assert study.counts() == (8, 8)
    return value, folder, folder.journal.read_bytes()


DAMAGE = {
    "empty": lambda good, at: b"",
    "cut": lambda good, at: good[:at],
    "garbage in the middle": lambda good, at: good[:at] + b"\x00\xff\n\r{" + good[at:],
    "two writers": lambda good, at: good[:at] + good[at // 2 :],
    "bytes lost": lambda good, at: good[: at // 2] + good[at:],
    "no object": lambda good, at: b"5\n" + good,
    "no operation": lambda good, at: good + b'{"op_code": 99}\n',
    "deep": lambda good, at: good + b"[" * 100_000 + b"\n",
    "other fields": lambda good, at: good + b'{"op_code": 4, "worker_id": "x", "study_id": []}\n',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_journal_cut_anywhere_goes_on(journals, damage):
    value, folder, good = journals
    ends = range(0, len(good) + 1, len(good) // {"cut": 12, "two writers": 6, "bytes lost": 6}.get(damage, 2))
    for at in ends:
        bad = DAMAGE[damage](good, at)
        folder.journal.write_bytes(bad)
        study = Study(value, folder)
        joined = damage in ("two writers", "bytes lost")  # of which some leave lines that could have been written
        if not joined:
            whole = good.startswith(bad) and (bad.endswith(b"\n") or not bad)
            assert bool(study.remark) == (not whole and bad != good), (at, study.remark)
        if study.remark:
            assert "journal.log is damaged from line" in study.remark and "\n" not in study.remark
            assert folder.journal.with_name("journal.log.damaged").read_bytes() == bad
        study.queue()
        assert not any("4" in settings[0] for settings in run_out(study)), "what failed is not run again"
        done, known = study.counts()
        assert done == known >= (0 if joined else 6) and not study.open(), "two of the four settings may be the same"
        assert Study(value, folder).remark == ""


def test_a_journal_that_a_killed_worker_was_writing_is_not_held(tmp_path):
    study, folder = opened(tmp_path, sweep)
    folder.journal.with_name("journal.log.lock").symlink_to("journal.log")  # Optuna's own lock, of a killed process
    began = time.monotonic()
    study.tell(study.take(), value=1.0)
    assert Study(sweep, folder).counts() == (1, 4) and time.monotonic() - began < 20
