"""A run goes on with what it began with, or says what is another; a finished stage keeps what its fields say."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lm.between_batches import between_batches
from lm.experiment import UserError
from lm.files import load
from lm.json_lines import checksums, read_json_lines, rewrite_json_lines
from lm.stored import read_sealed, write_sealed
from lm.train import evaluate, stages
from lm.train.checkpoint import Checkpoints
from lm.train.loaded_run import load_run
from lm.train.loop import Interrupted
from lm.train.metrics import read_lines
from lm.train.run_folder import RunFolder
from lm.train.signals import Stop
from lm.train.stages import evaluate_run, run
from tests.train.runs import experiment, forget_last_checkpoint, metrics, write_questions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    write_questions(root)
    run(experiment(root), root / "whole")
    return root


@pytest.fixture
def unfinished(whole, tmp_path) -> Path:
    """The run as it was after step 2 of its last stage."""
    shutil.copytree(whole / "whole", tmp_path / "run")
    forget_last_checkpoint(tmp_path / "run", "sft", 2)
    return tmp_path / "run"


def test_rows_that_an_eval_passes_over_are_counted_in_its_line(whole):
    file = whole / "asked.jsonl"
    kept = file.read_text()
    long = "".join(json.dumps({"question": f"Tell {'b ' * 99}{n}", "answer": "no"}) + "\n" for n in range(20))
    try:
        file.write_text(long + kept)
        (line,) = evaluate_run(whole / "whole")[""]
    finally:
        file.write_text(kept)
    (why,) = line["passed_over"]
    assert "longer than 60 tokens" in why and 0 < line["passed_over"][why] < 20 and line["count"] == 4


def test_examples_of_a_measurement_that_a_kill_cut_are_written_once(whole, unfinished):
    stage = unfinished / "stages" / "sft"
    lines = [raw for raw, line in read_json_lines(stage / "eval.jsonl") if line["when"] != "before"]
    rewrite_json_lines(stage / "eval.jsonl", lines)  # the examples before the first step are there, their line is not
    run(experiment(whole), unfinished)
    for kind in ("eval", "samples"):
        once, cut = (
            sorted(json.dumps(line) for line in read_lines(folder / "stages" / "sft" / f"{kind}.jsonl"))
            for folder in (whole / "whole", unfinished)
        )
        assert once == cut


def test_other_data_are_refused_with_the_difference_and_may_be_accepted(whole, unfinished, capsys):
    file = whole / "asked.jsonl"
    kept = file.read_text()
    try:
        file.write_text(kept.replace("Gladly. bal", "Gladly. bel"))
        with pytest.raises(UserError, match=r"the data of .*asked\.jsonl had SHA-256 .*--accept-changes") as refusal:
            run(experiment(whole), unfinished)
        assert "\n" not in str(refusal.value)
        run(experiment(whole), unfinished, accept=True)
        assert "accepted: the data of" in capsys.readouterr().out
        recorded = read_sealed(unfinished / "environment.json")
        assert len(recorded["accepted"][0]["differences"]) == 1 and recorded["began"]["data"]
    finally:
        file.write_text(kept)


def test_data_that_were_corrected_before_the_first_stage_are_no_difference(whole, tmp_path, monkeypatch):
    write_questions(tmp_path)
    file, folder = tmp_path / "asked.jsonl", RunFolder(tmp_path / "run")
    kept = file.read_text()
    long = "".join(json.dumps({"question": f"Tell {'zz ' * 99}{n}", "answer": "no"}) + "\n" for n in range(5))
    file.write_text(kept + long)
    with pytest.raises(UserError, match=r"asked\.jsonl line \d+"):
        run(experiment(tmp_path), folder.path)
    before = folder.read_environment()["began"]
    file.write_text(kept)
    monkeypatch.setattr(stages, "_train_all", lambda *arguments: None)
    run(experiment(tmp_path), folder.path)
    now = folder.read_environment()["began"]
    assert now["data"] != before["data"] and now["tokenizer"] != before["tokenizer"]
    assert now["tokenizer"] == RunFolder(whole / "whole").read_environment()["began"]["tokenizer"]


def test_other_versions_are_refused(whole, unfinished):
    environment = unfinished / "environment.json"
    recorded = read_sealed(environment)
    recorded["began"]["versions"]["jax"] = "0.0.1"
    write_sealed(environment, recorded)
    with pytest.raises(UserError, match=r"jax was 0\.0\.1 and is now "):
        run(experiment(whole), unfinished)


@pytest.mark.parametrize("environment", [True, False])
def test_another_tokenizer_is_refused(whole, unfinished, environment):
    model = unfinished / "tokenizer" / "tokenizer.model"
    data = model.read_bytes()
    assert b"Gl" in data
    model.write_bytes(data.replace(b"Gl", b"Fl"))
    if not environment:  # the checkpoint names it too
        (unfinished / "environment.json").unlink()
    with pytest.raises(UserError, match="tokenizer had SHA-256"):
        run(experiment(whole), unfinished)
    with pytest.raises(UserError, match="is not the tokenizer that stage sft was trained with"):
        load_run(unfinished)


def test_collected_files_that_changed_are_refused(whole, unfinished):
    made = unfinished / "stages" / "collect" / "made.jsonl"
    kept = made.read_text()
    made.write_text("".join(kept.splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match=r"made\.jsonl had SHA-256 .*not what stage collect wrote"):
        run(experiment(whole), unfinished)
    with pytest.raises(UserError, match="not what stage collect wrote"):
        evaluate_run(unfinished)
    made.unlink()
    with pytest.raises(UserError, match=r"made\.jsonl is gone"):
        run(experiment(whole), unfinished)


def test_what_is_the_same_goes_on_to_the_bit_and_fills_a_damaged_summary_in(whole, unfinished):
    run(experiment(whole, save_every=1, eval_every=2, evals=("asked",)), unfinished)
    assert metrics(whole / "whole", "sft") == metrics(unfinished, "sft")
    np.testing.assert_array_equal(*(load_run(path).model.embed.weight.value for path in (whole / "whole", unfinished)))
    (unfinished / "stages" / "sft" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        load_run(unfinished)


def test_metrics_that_are_gone_are_missed(whole, unfinished):
    file = unfinished / "stages" / "sft" / "metrics.jsonl"
    for part in (file, checksums(file)):
        part.unlink()
    with pytest.raises(UserError, match="step 1 is missing"):
        run(experiment(whole), unfinished)


def test_a_finished_stage_without_its_last_checkpoint_is_refused(whole, unfinished):
    shutil.copy(whole / "whole" / "stages" / "sft" / "summary.json", unfinished / "stages" / "sft")
    with pytest.raises(UserError, match="the last checkpoint of a finished stage, is not there"):
        load_run(unfinished)
    run(experiment(whole), unfinished)  # nobody needs it


def test_steps_are_added_to_a_finished_stage_and_are_those_of_a_longer_one(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    run(experiment(whole, steps=6), tmp_path / "run")
    run(experiment(whole, steps=6), tmp_path / "long")
    assert metrics(tmp_path / "run", "sft") == metrics(tmp_path / "long", "sft")
    after = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "stages" / "sft" / "eval.jsonl").read_text().splitlines()
        if '"after"' in line
    ]
    assert after == [6]


def test_a_finished_stage_without_moments_keeps_its_last_model_and_those_for_good(whole, tmp_path):
    lean = experiment(whole, save_every=1, keep_every=3, keep_moments=False)
    run(lean, tmp_path / "run")
    with Checkpoints(RunFolder(tmp_path / "run").checkpoints("sft")) as checkpoints:
        assert checkpoints.steps() == [3, 4]
        assert not any(checkpoints.has(step, "opt_state") for step in (3, 4))
    np.testing.assert_array_equal(
        *(load_run(path).model.embed.weight.value for path in (whole / "whole", tmp_path / "run"))
    )
    longer = experiment(whole, save_every=1, keep_every=3, keep_moments=False, steps=6)
    with pytest.raises(UserError, match="optimizer state of stage sft was dropped"):
        run(longer, tmp_path / "run")
    (tmp_path / "run" / "stages" / "sft" / "summary.json").unlink()
    run(lean, tmp_path / "run")  # nothing is left but to measure
    assert metrics(whole / "whole", "sft") == metrics(tmp_path / "run", "sft")


def test_a_signal_in_an_evaluation_saves_at_once_and_leaves_the_evaluation_for_later(whole, tmp_path, monkeypatch):
    often = experiment(whole, save_every=4, eval_every=1, evals=("asked",))
    stops: list[Stop] = []
    measured = evaluate.measure

    def signalled(item, subject):
        stops[0].requested = "SIGTERM"
        between_batches()
        pytest.fail("the evaluation went on")

    now = Stop.now
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "now", lambda self: (stops.append(self), now(self))[1])
        patch.setattr(
            evaluate,
            "measure",
            lambda item, subject: measured(item, subject) if not due() else signalled(item, subject),
        )

        def due() -> bool:
            file = tmp_path / "run" / "stages" / "sft" / "eval.jsonl"
            return file.exists() and '"step": 1' in file.read_text()

        with pytest.raises(Interrupted, match="SIGTERM: saved at step 2 of 4 of stage sft"):
            run(often, tmp_path / "run")
    run(often, tmp_path / "run")
    assert metrics(whole / "whole", "sft") == metrics(tmp_path / "run", "sft")
    lines = [json.loads(line) for line in (tmp_path / "run" / "stages" / "sft" / "eval.jsonl").read_text().splitlines()]
    assert [(line["step"], line["when"]) for line in lines] == [
        (0, "before"), (1, "during"), (2, "during"), (3, "during"), (4, "after")
    ]  # fmt: skip


def test_the_quickstart_keeps_at_most_60_mb_of_checkpoints():
    stages = load("quickstart").stages
    megabytes = 8.7  # of its model in float32
    assert all(not stage.keep_moments and not stage.keep_every for stage in stages) and len(stages) * megabytes < 60


def test_a_field_is_no_difference_where_it_cannot_change_what_was_trained(whole):
    changed = dataclasses.replace(experiment(whole, keep_last=1), prompts=())
    shutil.copytree(whole / "whole", whole / "changed")
    run(changed, whole / "changed")
    assert RunFolder(whole / "changed").read_experiment()["prompts"] == []
