"""Sweeps through the `lm` command: workers that are killed, folders that are somebody's, trials that diverge, searches."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.cli.main import main
from lm.experiment import GRPO, Source, Stage, UserError, to_dict
from lm.sweep.cost import estimate
from lm.sweep.folder import SweepFolder, try_lock
from lm.sweep.pool import pool
from lm.sweep.results import read_sweep
from lm.sweep.run import run_sweep
from lm.sweep.study import Study
from lm.sweep.sweep import Halving, LogUniform, Random, Sweep
from lm.sweep.worker import Worker
from lm.train.run_folder import read_json
from tests.sweep.tiny import base, sweep

pytestmark = pytest.mark.xdist_group("sweep")

TINY = Path(__file__).parent / "tiny.py"
ROOT = TINY.parent.parent.parent
ONE_DEVICE = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}


def started(folder, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "lm.cli.main", "sweep", str(TINY), "--folder", str(folder), *words],
        env=ONE_DEVICE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes(folder):
    """Of the runs that go on in a sweep's folder: (process, its parent)."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text().split("\0")
            if "run" in words and any(str(folder) in word for word in words):
                found.append((int(file.parent.name), int((file.parent / "stat").read_text().split()[3])))
        except (OSError, ValueError):
            continue
    return found


def wait_for(what, seconds=120):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of four trials by two workers: one trial was killed, then one worker, both with SIGKILL."""
    place = tmp_path_factory.mktemp("sweep")
    folder = place / "tiny"
    sweeping = started(folder, "--store", str(place / "shared"), "--workers", "2")
    run, _ = wait_for(lambda: processes(folder))[0]
    os.kill(run, signal.SIGKILL)
    wait_for(lambda: any((place / "shared").glob("*/summary.json")))
    killed = wait_for(lambda: processes(folder))[0]
    os.kill(killed[1], signal.SIGKILL)  # the worker; what it started goes on and keeps its locks
    said, _ = sweeping.communicate(timeout=240)
    assert sweeping.returncode == 0, said
    return folder, said


@pytest.mark.slow
def test_every_trial_ends_once_whatever_is_killed(finished):
    folder, said = finished
    results = read_sweep(folder)
    assert [(r.settings["sft.optimizer.peak_lr"], r.seed) for r in results] == [
        ("0.001", 0), ("0.001", 1), ("0.003", 0), ("0.003", 1),
    ]  # fmt: skip
    assert all(result.finished and not result.failed for result in results)
    assert all(len(list(r.stages["sft"].metrics)) == 6 for r in results), "no step twice, none left out"
    study = Study(sweep, SweepFolder(folder, folder.parent / "shared"))
    assert study.counts() == (4, 4)
    assert "died with code -9" in said and "another takes its place" in said


@pytest.mark.slow
def test_a_stage_that_trials_share_is_trained_once(finished):
    folder, _ = finished
    assert len(list((folder.parent / "shared").glob("*/summary.json"))) == 2, "one pretraining for each seed"
    links = [result.folder / "stages" / "pretrain" for result in read_sweep(folder)]
    assert all(link.is_symlink() for link in links) and len({link.resolve() for link in links}) == 2


@pytest.mark.slow
def test_a_trial_is_the_run_that_it_would_be_alone(finished, tmp_path):
    folder, _ = finished
    trial = read_sweep(folder)[2]
    words = ["run", str(trial.folder / "experiment.json"), "--run-dir", str(tmp_path / "alone")]
    subprocess.run([sys.executable, "-m", "lm.cli.main", *words], env=ONE_DEVICE, check=True, stdout=subprocess.DEVNULL)
    alone = dataclasses.replace(trial, folder=tmp_path / "alone")
    for stage in ("pretrain", "sft"):
        assert trial.training(stage, "loss") == alone.training(stage, "loss")
    assert trial.final("text", "bits_per_byte") == alone.final("text", "bits_per_byte")


@pytest.mark.slow
def test_the_same_command_again_has_nothing_to_do_and_more_seeds_are_added(finished, capsys):
    folder, _ = finished
    store = folder.parent / "shared"
    assert run_sweep(sweep, str(TINY), folder, store=store) == []
    assert "4 trials, 4 of them done" in capsys.readouterr().out
    more = dataclasses.replace(sweep, axes={"sft.optimizer.peak_lr": (1e-3, 3e-3, 1e-2)}, seeds=(0, 1, 2))
    place = SweepFolder(folder, store)
    place.claim(more)
    study = Study(more, place)
    study.queue()
    assert study.counts() == (4, 9)
    place.claim(sweep)
    Study(sweep, place).queue()
    assert len(read_sweep(folder)) == 4, "what is asked for no more is not compared"


@pytest.mark.slow
def test_a_comparison_of_a_sweep_has_a_table_a_page_and_rows(finished, tmp_path, capsys):
    folder, _ = finished
    rows, page = tmp_path / "rows.csv", tmp_path / "page.html"
    assert (
        main(
            [
                "compare",
                str(folder),
                "--csv",
                str(rows),
                "--page",
                str(page),
                "--baseline",
                "sft.optimizer.peak_lr=0.003",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "What differs: sft.optimizer.peak_lr" in said and "the baseline" in said
    lines = rows.read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith('"group","seed"')
    assert "Where the numbers are from" in page.read_text()
    assert main(["compare", str(folder), "--baseline", "sft.optimizer.peak_lr=0.004"]) == 2
    assert "there are 0.001, 0.003" in capsys.readouterr().err


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    place = SweepFolder(tmp_path / "s", tmp_path / "shared")
    place.claim(sweep)
    place.claim(dataclasses.replace(sweep, seeds=(0, 1, 2), axes={}))  # the same one grown
    other = dataclasses.replace(base, model=dataclasses.replace(base.model, num_layers=2))
    with pytest.raises(UserError, match=r"model\.num_layers: 1 → 2"):
        place.claim(dataclasses.replace(sweep, base=other))
    with pytest.raises(UserError, match="search: Grid → Random"):
        place.claim(dataclasses.replace(sweep, search=Random(3)))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"no sweep\.json"):
        SweepFolder(tmp_path / "own", tmp_path / "shared").claim(sweep)


def test_a_sweep_that_cannot_work_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    axis = '"sft.optimizer.peak_lr": (1e-3, 3e-3)'
    for wrong, message in (
        ('"sft.optimizer.peek_lr": (1e-3,)', "did you mean sft.optimizer.peak_lr"),
        ('"model.num_kv_heads": (1, 3)', "trial num_kv_heads 3: model.num_heads 2 is not"),
    ):
        Path("wrong.py").write_text(TINY.read_text().replace(axis, wrong))
        assert main(["sweep", "wrong.py"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("sweeps").exists()


def test_a_worker_that_cannot_work_is_not_started_again(capfd):
    with pytest.raises(UserError, match="worker 1 cannot work"):
        pool(["sweep", "nowhere.py"], 1)
    assert capfd.readouterr().err.count("lm: error") == 1


def test_a_dry_run_counts_what_is_shared_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(TINY), "--dry-run", "--topology", "v5e:1x1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and [("has pretrain from above" in line) for line in lines[:4]] == [False, False, True, True]
    assert "device-hours" in lines[-1] and not Path("sweeps").exists()


def test_hours_count_every_rollout_that_dynamic_sampling_may_take(tmp_path):
    reason = Stage(
        "reason", GRPO(group_size=4, max_new_tokens=32), (Source("gen:arithmetic"),), steps=10, batch_size=8, seq_len=64
    )
    alone = dataclasses.replace(base, stages=(reason,))
    value = Sweep("dynamic", alone, {"reason.objective.rollouts": (1, 3)})
    one, three = (row.cost for row in estimate(value, SweepFolder(tmp_path / "s", tmp_path), "v5e:1x1"))
    assert one.hours < three.hours < 3 * one.hours and one.flops == three.flops


# ---- which trial is next: without running any ---------------------------------------------------------------------


def opened(tmp_path, value):
    folder = SweepFolder(tmp_path / "s", tmp_path / "shared")
    folder.claim(value)
    study = Study(value, folder)
    study.queue()
    return study, folder


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


def test_a_run_that_diverges_is_counted_as_failed_and_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    value = Sweep("s", base, {"pretrain.optimizer.peak_lr": (1e30,), "pretrain.optimizer.clip_norm": (1e30,)})
    study, folder = opened(tmp_path, value)
    Worker(value, folder, study, "").work()
    (result,) = read_sweep(folder.path)
    assert result.diverged and not result.finished
    assert study.counts() == (1, 1) and "nan at step" in study.failures()[0]


def test_a_run_that_is_refused_fails_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    (tmp_path / "text.txt").write_text("words\n" * 3000)
    gone = dataclasses.replace(base.stages[0].sources[0], path=str(tmp_path / "gone.txt"))
    stages = (dataclasses.replace(base.stages[0], sources=(gone,)), base.stages[1])
    value = Sweep("s", dataclasses.replace(base, stages=stages), {"sft.steps": (2,)})
    study, folder = opened(tmp_path, value)
    Worker(value, folder, study, "").work()
    (line,) = study.failures()
    assert "gone.txt" in line and read_json(folder.path / "sweep.json")["base"] == json.loads(
        json.dumps(to_dict(value.base))
    )
