"""A dry run of a sweep counts FLOPs, time, device-hours and bytes on disk, what trials share once."""

import dataclasses
from pathlib import Path

import pytest

from lm.cli.main import main
from lm.experiment import GRPO, Source, Stage
from lm.sweep.cost import estimate
from lm.sweep.folder import SweepFolder
from lm.sweep.sweep import Sweep
from tests.sweep.tiny import base

TINY = Path(__file__).parent / "tiny.py"


pytestmark = pytest.mark.slow


def test_a_dry_run_counts_what_is_shared_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(TINY), "--dry-run", "--topology", "v5e:1x1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "MB of checkpoints for one worker; time estimated from 20% of the speed of a matrix product" in lines[-1]
        and "about 2 min, " in lines[-1]
    )
    assert len(lines) == 5 and [("shares pretrain with trials above" in line) for line in lines[:4]] == [
        False,
        False,
        True,
        True,
    ]
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
    assert cost_of(tmp_path, base, steps=600_000).remaining > plain.remaining >= 40
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
