"""What may differ when a run goes on, what an older lm wrote, and file systems without locks."""

import copy
import dataclasses
import errno
import fcntl
import json
import subprocess
import threading

import pytest

from lm.changes import changes, normalised, read_experiment, without_defaults
from lm.choices.log import open_log
from lm.experiment import (
    GRPO,
    SFT,
    Eval,
    Experiment,
    Optimizer,
    Pretrain,
    Source,
    Stage,
    Tokenizer,
    UserError,
    from_dict,
    to_dict,
)
from lm.stored import LOOK_SECONDS, read_sealed, write_json_atomic, write_sealed
from lm.sweep.folder import try_lock
from lm.sweep.trials import key_of
from lm.train.run_folder import RunFolder
from lm.train.run_list import list_runs

DATA = Source("gen:drills")
PLAN = Experiment(
    name="plan",
    stages=(
        Stage("pretrain", Pretrain(), (DATA,), Optimizer(schedule="constant"), steps=100),
        Stage("sft", SFT(), (DATA,), steps=100),
    ),
)


def plain(experiment: Experiment) -> dict:
    return json.loads(json.dumps(to_dict(experiment)))


def with_stage(place: int, **values) -> dict:
    stages = [dataclasses.replace(s, **values) if i == place else s for i, s in enumerate(PLAN.stages)]
    return plain(dataclasses.replace(PLAN, stages=tuple(stages)))


def begin(folder: RunFolder, *stages: str) -> None:
    for name in stages:
        folder.stage_folder(name).mkdir(parents=True)
        (folder.stage_folder(name) / "metrics.jsonl").write_text("")


def test_fields_that_an_older_file_lacks_are_at_their_defaults(tmp_path):
    older = plain(PLAN)
    del older["model"]["softcap"], older["stages"][0]["optimizer"]["state_dtype"], older["stages"][1]["keep_last"]
    assert normalised(older) == plain(PLAN)
    folder = RunFolder(tmp_path / "run")
    folder.claim(plain(PLAN))
    begin(folder, "pretrain")
    folder.experiment.write_text(json.dumps(older))
    assert folder.claim(plain(PLAN)) is True


def test_a_key_does_not_depend_on_fields_at_their_defaults():
    assert without_defaults(PLAN)["stages"][1] == {
        "kind": "Stage", "name": "sft", "objective": {"kind": "SFT"}, "sources": [{"kind": "Source", "path": "gen:drills"}], "steps": 100
    }  # fmt: skip
    assert key_of(PLAN) != key_of(dataclasses.replace(PLAN, seed=1))


@pytest.mark.parametrize(
    "changed",
    [
        with_stage(0, save_every=7, eval_every=5, evals=("x",), keep_last=1, keep_every=10, keep_moments=False),
        plain(dataclasses.replace(PLAN, prompts=("Why?",), evals=(Eval("x", DATA),), name="other")),
        plain(dataclasses.replace(PLAN, mesh=dataclasses.replace(PLAN.mesh, data=1, fsdp=2))),
    ],
)
def test_what_cannot_change_training_may_change(changed, tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    folder.claim(plain(PLAN))
    begin(folder, "pretrain", "sft")
    assert folder.claim(changed) is True
    assert "goes on with another" in capsys.readouterr().out
    assert folder.read_experiment() == changed


def test_steps_may_be_added_where_the_schedule_is_constant_and_else_the_way_is_told(tmp_path):
    assert changes(plain(PLAN), with_stage(0, steps=150), 1).more_steps == (("pretrain", 100, 150),)
    folder = RunFolder(tmp_path / "run")
    folder.claim(plain(PLAN))
    begin(folder, "pretrain", "sft")
    for stage, steps, reason in ((0, 50, "can only become more"), (1, 150, "copy the folder, remove stages/sft")):
        with pytest.raises(UserError, match=rf"steps: 100 → {steps}(.|\n)*{reason}"):
            folder.claim(with_stage(stage, steps=steps))


def test_a_stage_that_has_not_begun_may_change_but_for_its_sources(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(plain(PLAN))
    begin(folder, "pretrain")
    assert folder.claim(with_stage(1, steps=150, batch_size=8)) is True
    with pytest.raises(UserError, match="sources"):
        folder.claim(with_stage(1, sources=(Source("gen:docs"),)))


def test_a_stage_is_added_only_where_the_vocabulary_is_not_learnt_from_its_text():
    more = dataclasses.replace(PLAN, stages=(*PLAN.stages, Stage("more", SFT(), (DATA,))))
    given = Tokenizer(path="tokenizer.model")
    assert changes(plain(PLAN), plain(more), 2).refused
    with_file = (plain(dataclasses.replace(one, tokenizer=given)) for one in (PLAN, more))
    assert not changes(*with_file, 2).refused


def test_a_changed_experiment_file_is_found_by_the_environment_beside_it(tmp_path):
    write_json_atomic(tmp_path / "experiment.json", plain(PLAN))
    write_sealed(tmp_path / "environment.json", {"runs": [], "experiments": [plain(PLAN)]})
    assert read_experiment(tmp_path) == plain(PLAN)
    damaged = copy.deepcopy(plain(PLAN)) | {"seed": 1}
    write_json_atomic(tmp_path / "experiment.json", damaged)
    with pytest.raises(UserError, match=r"experiment\.json is damaged: seed is 1, and .* says 0"):
        read_experiment(tmp_path)


def test_an_experiment_file_that_was_changed_is_taken_where_the_command_names_it(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.claim(plain(PLAN))
    write_sealed(folder.environment, {"runs": [], "experiments": [plain(PLAN)]})
    changed = copy.deepcopy(plain(PLAN)) | {"seed": 1}
    write_json_atomic(folder.experiment, changed)
    with pytest.raises(UserError, match="damaged: seed is 1"):
        folder.claim(plain(PLAN))
    folder.claim(changed)
    assert "was changed, and the run goes on with it: seed is 1" in capsys.readouterr().out
    assert folder.read_experiment() == changed


def test_a_sealed_file_that_changed_is_refused(tmp_path):
    file = tmp_path / "summary.json"
    write_sealed(file, {"steps": 6, "tokens": (1, 2)})
    assert read_sealed(file) == {"steps": 6, "tokens": [1, 2]}
    file.write_text(file.read_text().replace("6,", "7,", 1))
    with pytest.raises(UserError, match="does not match its own checksum"):
        read_sealed(file)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_is_told_in_one_line(code, tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for take in (
        lambda: RunFolder(tmp_path / "run").lock().__enter__(),
        lambda: try_lock(tmp_path / "claim"),
        lambda: open_log(tmp_path / "labels.jsonl").__enter__(),
    ):
        with pytest.raises(UserError, match="its file system has no file locks") as refusal:
            take()
        assert "\n" not in str(refusal.value)
    write_json_atomic(tmp_path / "run" / "experiment.json", to_dict(PLAN))
    (tmp_path / "run" / "stages").mkdir()
    (listed,) = list_runs(tmp_path)  # a copy of a run that was trained elsewhere
    assert listed.state == "pretrain 0 of 100"


def test_runs_on_a_disk_that_may_only_be_read_are_listed(small_disk):
    run = RunFolder(small_disk / "run")
    (run.path / "stages").mkdir(parents=True)
    write_json_atomic(run.experiment, to_dict(PLAN))
    with run.lock():
        assert [one.state for one in list_runs(small_disk)] == ["running: pretrain 0 of 100"]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert [one.state for one in list_runs(small_disk)] == ["pretrain 0 of 100"]


def test_a_run_starts_while_runs_are_listed(tmp_path):
    """`lm runs` holds the lock of a run for the instant in which it looks."""
    run = RunFolder(tmp_path / "run")
    with run.lock():
        pass
    with (run.path / "lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(LOOK_SECONDS / 2, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with run.lock():
            pass


def test_a_flag_that_has_become_a_choice_is_read_and_keeps_its_digest():
    """`scale_advantages` of older files, and of files of the user's own, is `advantage_scale`; sweeps know their trials."""
    plain = {"kind": "GRPO", "scale_advantages": False}
    stage = {"name": "grpo", "objective": plain, "sources": [{"path": "gen:arithmetic"}]}
    read = from_dict({"name": "old", "stages": [stage]})
    assert read.stages[0].objective == GRPO(advantage_scale="none") == GRPO(scale_advantages=False)
    assert without_defaults(read)["stages"][0]["objective"] == {"kind": "GRPO", "scale_advantages": False}
    stage["objective"] = plain | {"scale_advantages": True}
    assert without_defaults(from_dict({"name": "old", "stages": [stage]}))["stages"][0]["objective"] == {"kind": "GRPO"}
