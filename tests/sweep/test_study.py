"""Which trial of a sweep is next, which fails, and which is run again: without running any."""

import dataclasses
import json
import os

import pytest

from lm.sweep.folder import SweepFolder, try_lock
from lm.sweep.results import read_sweep
from lm.sweep.study import Study
from lm.sweep.sweep import TPE, Grid, Halving, LogUniform, Random, Sweep
from tests.sweep.studies import HEADS, opened, run_out
from tests.sweep.tiny import base, sweep

pytestmark = pytest.mark.slow


def test_trials_that_an_older_lm_has_named_are_found_again(tmp_path):
    study, _ = opened(tmp_path, sweep)
    study.tell(claimed := study.take(), value=1.0)
    os.close(claimed.handle)
    older = SweepFolder(tmp_path / "older", tmp_path / "shared")
    (tmp_path / "s").rename(older.path)
    for path in list((older.path / "trials").iterdir()):
        plain = json.loads((path / "experiment.json").read_text())
        (path / "experiment.json").write_text(json.dumps(plain | {"name": f"tiny-{path.name[::-1]}"}))
        path.rename(path.with_name(path.name[::-1]))
    text = older.journal.read_text()
    older.journal.write_text(text.replace(claimed.key, claimed.key[::-1]))
    for path in (older.path / "trials").iterdir():
        older.journal.write_text(older.journal.read_text().replace(path.name[::-1], path.name))
    again = Study(sweep, older)
    again.queue()
    assert again.counts() == (1, 4) and len(list((older.path / "trials").iterdir())) == 4


def test_what_is_asked_for_no_more_is_not_run_and_may_be_asked_for_again(tmp_path):
    study, folder = opened(tmp_path, sweep)
    study.tell(study.take(), value=1.0)
    fewer = Study(dataclasses.replace(sweep, seeds=(0,)), folder)
    fewer.queue()
    assert fewer.counts() == (1, 2)
    left = fewer.take()
    assert left.seed == 0 and fewer.take() is None
    fewer.tell(left, value=2.0)
    assert not fewer.open() and not fewer.failures()
    study.queue()
    assert study.counts() == (2, 4) and {study.take().seed, study.take().seed} == {1}


@pytest.mark.parametrize("search", [Random(2), Halving(2, first=2)], ids=lambda search: type(search).__name__)
def test_a_search_of_fewer_seeds_runs_those_only(tmp_path, search):
    axes = {"sft.optimizer.peak_lr": LogUniform(1e-4, 1e-2)}
    value = Sweep("s", base, axes, seeds=(0, 1), search=search)
    _, folder = opened(tmp_path, value)
    fewer = Study(dataclasses.replace(value, seeds=(0,)), folder)
    fewer.queue()
    assert [fewer.take().seed, fewer.take().seed] == [0, 0] and fewer.take() is None


def test_a_trial_that_nobody_holds_is_taken_up_before_a_new_one(tmp_path):
    study, folder = opened(tmp_path, sweep)
    first = study.take()
    second = study.take()
    assert first.key != second.key
    os.close(first.handle)  # as its worker's death does
    again = study.take()
    assert (again.key, again.number) == (first.key, first.number)
    assert try_lock(folder.trial(second.key) / "claim") is None, "held"
    study.tell(second, value=1.0)
    study.tell(again, failed="loss is not finite")
    assert study.counts() == (2, 4) and study.open()
    assert study.failures() == ["peak_lr 0.001, seed 0: loss is not finite"]
    study.queue()
    assert study.counts() == (2, 4), "a failed trial would fail again"
    study.queue(retry_failed=True)
    assert study.counts() == (2, 5)


@pytest.mark.parametrize("search", [Random(5, seed=1)])
def test_a_search_begins_with_the_base_and_runs_every_setting_with_every_seed(tmp_path, search):
    value = Sweep("s", base, {"sft.optimizer.peak_lr": LogUniform(1e-4, 1e-2)}, seeds=(0, 1), search=search)
    study, _ = opened(tmp_path, value)
    taken = []
    while (claimed := study.take()) is not None:
        taken.append((claimed.settings["sft.optimizer.peak_lr"], claimed.seed))
        study.tell(claimed, value=float(len(taken)))
        os.close(claimed.handle)
    assert taken[:2] == [("0.001", 0), ("0.001", 1)]
    assert len(taken) == 10 and sorted(seed for _, seed in taken) == [0] * 5 + [1] * 5
    assert len({rate for rate, _ in taken}) == 5
    more = dataclasses.replace(value, seeds=(0, 1, 2))
    Study(more, SweepFolder(tmp_path / "s", tmp_path / "shared")).queue()
    assert study.counts() == (10, 15), "a seed that is added is run with the settings that are there"


def test_halving_ends_what_is_worse_at_a_rung(tmp_path):
    search = Halving(6, first=2, reduction=2)
    value = Sweep("s", base, {"sft.optimizer.peak_lr": LogUniform(1e-4, 1e-2)}, search=search)
    study, _ = opened(tmp_path, value)
    ended = []
    for quality in (1.0, 2.0, 3.0, 0.5):  # bits per byte: less is better
        claimed = study.take()
        ended.append(study.report(claimed, 2, quality))
        study.tell(claimed, value=quality, pruned=ended[-1])
        os.close(claimed.handle)
    assert ended == [False, True, True, False]


POSSIBLE = {("2", "1"), ("3", "1"), ("3", "3"), ("4", "1")}


@pytest.mark.parametrize("search", [Grid(), Random(12), TPE(12, startup=4), Halving(12, first=2)], ids=str)
def test_points_that_cannot_work_are_failed_trials_and_the_rest_is_run(tmp_path, search):
    value = Sweep("s", base, HEADS, search=search)
    study, folder = opened(tmp_path, value)
    run = set(run_out(study))
    assert run <= POSSIBLE and len(run) >= (4 if search == Grid() else 2)
    known = 6 if search == Grid() else 12
    assert study.counts() == (known, known) and not study.open() and not study.all_failed()
    assert study.failures() and all("should be a multiple of" in line for line in study.failures())
    again = Study(value, folder)
    again.queue()
    assert run_out(again) == [] and again.counts() == (known, known), "the same command again tries nothing again"


@pytest.mark.parametrize("search", [Grid(), Random(6)], ids=str)
def test_a_trial_that_failed_is_run_again_only_if_asked(tmp_path, search):
    value = Sweep("s", base, {"sft.steps": (2, 3, 4)}, seeds=(0, 1), search=search)
    study, folder = opened(tmp_path, value)
    run_out(study, worse=lambda settings: settings["sft.steps"] == "3")
    failed = study.failures()
    assert failed == ["steps 3, seed 0: diverged", "steps 3, seed 1: diverged"]
    again = Study(value, folder)
    again.queue()
    assert run_out(again) == [] and again.failures() == failed
    again.queue(retry_failed=True)
    assert sorted(run_out(again)) == [("3",), ("3",)] and again.failures() == []


def test_settings_that_json_has_no_word_for_fail_and_are_shown(tmp_path):
    study, folder = opened(tmp_path, Sweep("s", base, {"sft.optimizer.peak_lr": (1e-3, float("nan"))}))
    assert run_out(study) == [("0.001",)]
    assert "peak_lr nan, seed 0" in study.failures()[0] and len(read_sweep(folder.path)) == 2
