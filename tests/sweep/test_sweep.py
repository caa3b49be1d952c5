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
from lm.sweep.sweep import TPE, Grid, Halving, LogUniform, Random, Sweep
from lm.sweep.worker import Worker
from lm.train.run_folder import read_json
from tests.sweep.tiny import base, sweep

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sweep")]

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
    os.kill(killed[1], signal.SIGKILL)  # the worker; what it started ends with it, and another goes on from there
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
def test_what_a_dry_run_says_of_the_disk_is_what_there_is(finished):
    folder, _ = finished
    rows, speed = estimate(sweep, SweepFolder(folder, folder.parent / "shared"), None)
    there = sum(
        f.stat().st_size for f in folder.parent.glob("**/checkpoints/**/*") if f.is_file() and "trials" not in f.parts
    )
    there += sum(f.stat().st_size for f in folder.glob("trials/*/stages/sft/checkpoints/**/*") if f.is_file())
    assert 0.8 < sum(row.cost.bytes for row in rows) / there < 1.1
    assert all(row.cost.ahead == 0 < row.cost.seconds for row in rows) and "that are finished" in speed.source


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
    assert "Each run is a link to its report" in page.read_text()
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
        ('"model.num_kv_heads": (3, 4)', "num_kv_heads 3: model.num_heads 2 is not"),
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
    assert "MB of checkpoints for one worker; time by a matrix product" in lines[-1] and "about 2 min, " in lines[-1]
    assert len(lines) == 5 and [("has pretrain from above" in line) for line in lines[:4]] == [False, False, True, True]
    assert "device-hours" in lines[-1] and not Path("sweeps").exists()


def test_hours_count_every_rollout_that_dynamic_sampling_may_take(tmp_path):
    reason = Stage(
        "reason", GRPO(group_size=4, max_new_tokens=32), (Source("gen:arithmetic"),), steps=20, batch_size=8, seq_len=64
    )
    alone = dataclasses.replace(base, stages=(reason,))
    value = Sweep("dynamic", alone, {"reason.objective.rollouts": (1, 3)})
    one, three = (row.cost for row in estimate(value, SweepFolder(tmp_path / "s", tmp_path), "v5e:1x1")[0])
    assert one.hours < three.hours < 3 * one.hours and one.flops == three.flops


def cost_of(tmp_path, experiment, index=0, **changes):
    """Of one trial of an experiment with a stage or the evals changed."""
    stages = tuple(dataclasses.replace(s, **changes) if i == index else s for i, s in enumerate(experiment.stages))
    value = Sweep("s", dataclasses.replace(experiment, stages=stages))
    (row,), _ = estimate(value, SweepFolder(tmp_path / "s", tmp_path), None)
    return row.cost


def test_a_dry_run_counts_evals_samples_time_and_what_is_kept_on_disk(tmp_path):
    plain = cost_of(tmp_path, base)
    more = dataclasses.replace(base, evals=(dataclasses.replace(base.evals[0], count=4000),), prompts=("a", "b"))
    evaluated = cost_of(tmp_path, more)
    assert evaluated.other_flops > 100 * plain.other_flops and evaluated.flops == plain.flops
    assert cost_of(tmp_path, more, 1, eval_every=1).other_flops > evaluated.other_flops
    assert cost_of(tmp_path, base, steps=600_000).ahead > plain.ahead >= 40
    sampled = dataclasses.replace(
        base, stages=(Stage("r", GRPO(max_new_tokens=32), (Source("gen:arithmetic"),), steps=50, seq_len=64),)
    )
    assert (
        cost_of(tmp_path, sampled, objective=GRPO(max_new_tokens=32, rollouts=3)).other_flops
        > cost_of(tmp_path, sampled).other_flops
    )
    kept = {"save_every": 1, "keep_last": 1}
    one = cost_of(tmp_path, base, **kept).bytes
    assert cost_of(tmp_path, base, **kept | {"keep_last": 2}).bytes > one
    assert (
        cost_of(tmp_path, base, **kept, keep_every=2).bytes
        > one
        > cost_of(tmp_path, base, **kept, keep_moments=False).bytes
    )


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
    wild = {"pretrain.optimizer.peak_lr": (1e3,), "pretrain.optimizer.weight_decay": (1e3,), "pretrain.steps": (30,)}
    value = Sweep("s", base, wild)
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


# ---- points that fail, and journals that were cut ------------------------------------------------------------------

HEADS = {"model.num_heads": (2, 3, 4), "model.num_kv_heads": (1, 3)}
POSSIBLE = {("2", "1"), ("3", "1"), ("3", "3"), ("4", "1")}


def run_out(study, worse=lambda settings: False):
    """Take every trial and tell it a number, or that it failed: the settings that were run."""
    run = []
    while (claimed := study.take()) is not None:
        run.append(tuple(claimed.settings.values()))
        study.tell(claimed, value=1.0, failed="diverged" if worse(claimed.settings) else "")
        os.close(claimed.handle)
    return run


@pytest.mark.parametrize("search", [Grid(), Random(12), TPE(12, startup=4), Halving(12, first=2)], ids=str)
def test_points_that_cannot_work_are_failed_trials_and_the_rest_is_run(tmp_path, search):
    value = Sweep("s", base, HEADS, search=search)
    study, folder = opened(tmp_path, value)
    run = set(run_out(study))
    assert run <= POSSIBLE and len(run) >= (4 if search == Grid() else 2)
    known = 6 if search == Grid() else 12
    assert study.counts() == (known, known) and not study.open() and not study.all_failed()
    assert study.failures() and all("is not a multiple of" in line for line in study.failures())
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


def test_a_sweep_of_which_every_trial_fails_says_so_and_ends_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    axis, of_tiny = '"sft.optimizer.peak_lr": (1e-3, 3e-3)', TINY.read_text()
    Path("grid.py").write_text(of_tiny.replace(axis, '"model.num_kv_heads": (3, 5)'))
    assert main(["sweep", "grid.py"]) == 2 and main(["sweep", "grid.py", "--dry-run"]) == 2
    assert "none of its 4 trials can run; the first, num_kv_heads 3" in capsys.readouterr().err
    assert not Path("sweeps").exists()
    search = of_tiny.replace(axis, '"model.num_kv_heads": (3, 5)').replace("seeds=(0, 1))", "search=Random(3))")
    Path("search.py").write_text(search.replace("import Sweep", "import Random, Sweep"))
    assert main(["sweep", "search.py"]) == 2
    said = capsys.readouterr()
    assert "every trial of sweep tiny failed (" in said.err and said.out.count("cannot run: num_kv_heads") == 3


def test_settings_that_json_has_no_word_for_fail_and_are_shown(tmp_path):
    study, folder = opened(tmp_path, Sweep("s", base, {"sft.optimizer.peak_lr": (1e-3, float("nan"))}))
    assert run_out(study) == [("0.001",)]
    assert "peak_lr nan, seed 0" in study.failures()[0] and len(read_sweep(folder.path)) == 2


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
    assert Study(sweep, folder).counts() == (1, 4) and time.monotonic() - began < 5
