"""Sweeps through the `lm` command: workers that are killed, folders that are somebody's, trials that diverge."""

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
from lm.experiment import UserError, to_dict
from lm.stored import read_json
from lm.sweep.cost import estimate
from lm.sweep.folder import SweepFolder
from lm.sweep.pool import pool
from lm.sweep.results import read_sweep
from lm.sweep.run import run_sweep
from lm.sweep.study import Study
from lm.sweep.sweep import Random, Sweep
from lm.sweep.worker import Worker
from tests.sweep.studies import opened
from tests.sweep.tiny import base, sweep

pytestmark = pytest.mark.slow

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


def wait_for(what, seconds=600):
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
    said, _ = sweeping.communicate(timeout=900)
    assert sweeping.returncode == 0, said
    return folder, said


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
    assert "died with exit code -9" in said and "is replaced" in said


def test_what_a_dry_run_says_of_the_disk_is_what_there_is(finished):
    folder, _ = finished
    rows, speed = estimate(sweep, SweepFolder(folder, folder.parent / "shared"), None)
    there = sum(
        f.stat().st_size for f in folder.parent.glob("**/checkpoints/**/*") if f.is_file() and "trials" not in f.parts
    )
    there += sum(f.stat().st_size for f in folder.glob("trials/*/stages/sft/checkpoints/**/*") if f.is_file())
    assert 0.8 < sum(row.cost.bytes for row in rows) / there < 1.1
    assert all(row.cost.remaining == 0 < row.cost.seconds for row in rows) and "finished stages" in speed.source


def test_a_stage_that_trials_share_is_trained_once(finished):
    folder, _ = finished
    assert len(list((folder.parent / "shared").glob("*/summary.json"))) == 2, "one pretraining for each seed"
    links = [result.folder / "stages" / "pretrain" for result in read_sweep(folder)]
    assert all(link.is_symlink() for link in links) and len({link.resolve() for link in links}) == 2


def test_a_trial_is_the_run_that_it_would_be_alone(finished, tmp_path):
    folder, _ = finished
    trial = read_sweep(folder)[2]
    words = ["run", str(trial.folder / "experiment.json"), "--run-dir", str(tmp_path / "alone"), "--no-report"]
    subprocess.run([sys.executable, "-m", "lm.cli.main", *words], env=ONE_DEVICE, check=True, stdout=subprocess.DEVNULL)
    alone = dataclasses.replace(trial, folder=tmp_path / "alone")
    for stage in ("pretrain", "sft"):
        assert trial.training(stage, "loss") == alone.training(stage, "loss")
    assert trial.final("text", "bits_per_byte") == alone.final("text", "bits_per_byte")


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
    assert "Each run links to its report" in page.read_text()
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
        ('"model.num_kv_heads": (3, 4)', "num_kv_heads 3: model.num_heads is 2; it should be a multiple"),
    ):
        Path("wrong.py").write_text(TINY.read_text().replace(axis, wrong))
        assert main(["sweep", "wrong.py"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("sweeps").exists()


def test_a_worker_that_cannot_work_is_not_started_again(capfd):
    with pytest.raises(UserError, match="worker 1 stopped with the error above"):
        pool(["sweep", "nowhere.py"], 1)
    assert capfd.readouterr().err.count("lm: error") == 1


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
