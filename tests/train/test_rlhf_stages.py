"""Reward models, PPO and collected answers, through the whole loop: they learn, and go on to the bit where they were."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.experiment import (
    DPO,
    GRPO,
    PPO,
    SFT,
    Collect,
    Eval,
    Experiment,
    Mesh,
    Model,
    Optimizer,
    RewardModel,
    Source,
    Stage,
    Tokenizer,
    UserError,
)
from lm.json_lines import checksums
from lm.rollout.verifiers import NEEDS, VERIFIERS
from lm.train.answers import best_answers
from lm.train.judging import judge_pairs
from lm.train.loaded_run import load_run
from lm.train.loop import Interrupted
from lm.train.metrics import read_lines
from lm.train.rollouts import RolloutBatches
from lm.train.scorers import load_scorer
from lm.train.signals import Stop
from lm.train.stages import run
from lm.train.trajectory_files import read_trajectories, trajectory_files
from lm.web.pairs_page import write_pairs_page
from tests.train.runs import forget_last_checkpoint, metrics

pytestmark = pytest.mark.slow

STEPS, SAVED = 12, 6
WORDS = ["".join(np.random.default_rng(i).choice(list("abdeghiklmnoprstu"), 4)) for i in range(60)]


def experiment(folder: Path) -> Experiment:
    pairs, asked = (Source(str(folder / name), holdout=0.2) for name in ("pairs.jsonl", "asked.jsonl"))
    made = Source("collected:collect", holdout=0.1)
    shared = {"optimizer": Optimizer(peak_lr=1e-2, warmup_steps=2), "steps": STEPS, "seq_len": 48, "save_every": SAVED}
    ppo = PPO(
        reward_models=("reward", "twin"), ensemble="min", verifier="brevity", max_new_tokens=12, epochs=2, minibatches=2,
        kl_target=0.5, kl_horizon=100, missing_eos_penalty=0.5,
    )  # fmt: skip
    return Experiment(
        name="rlhf",
        stages=(
            Stage("sft", SFT(), (asked,), batch_size=8, **shared),
            Stage("collect", Collect(verifier="brevity", answers=3, max_new_tokens=12), (asked,), steps=4, batch_size=8, seq_len=48),
            Stage("reward", RewardModel(center_coef=0.01), (pairs,), batch_size=8, microbatches=2, **shared),
            Stage("twin", RewardModel(), (pairs,), batch_size=8, **shared),
            Stage("ppo", ppo, (asked,), batch_size=8, eval_every=6, evals=("manners",), **shared),
            Stage("head", PPO(verifier="brevity", critic="head", max_new_tokens=12, epochs=1), (asked,), batch_size=8, start="sft", **shared),
            Stage("grpo", GRPO(verifiers=("brevity",), reward_models=("reward", "twin"), reward_weights=(0.5, 1, 2), group_size=4, max_new_tokens=12), (asked,), batch_size=2, start="sft", **shared),
            Stage("dpo", DPO(), (made,), batch_size=4, start="sft", **shared),
        ),
        evals=(
            Eval("pairs", pairs, "pair_accuracy", count=8, max_new_tokens=8),
            Eval("manners", asked, verifier="brevity", count=8, max_new_tokens=12, temperature=1.0),
            Eval("best", asked, "best_of_n", verifier="brevity", count=4, max_new_tokens=12, temperature=1.0, best_of=4),
        ),
        prompts=(),
        tokenizer=Tokenizer(vocab_size=320),
        model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=48),
        mesh=Mesh(data=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # what even a model that knows nothing does more or less of
        patch.setitem(VERIFIERS, "brevity", lambda row, text: 1 / (1 + len(text)))
        patch.setitem(NEEDS, "brevity", ())
        yield _whole_run(tmp_path_factory)


def _whole_run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rlhf")
    pairs = [{"prompt": f"Say {w}", "chosen": f"{w} yes", "rejected": "no"} for w in WORDS]
    asked = [{"question": f"Tell {w}", "answer": f"{w} no"} for w in WORDS]
    for name, rows in (("pairs", pairs), ("asked", asked)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(experiment(root), root / "whole")
    return root


def evals(run_dir: Path, stage: str, name: str) -> list[dict]:
    return [line for line in read_lines(run_dir / "stages" / stage / "eval.jsonl") if line["eval"] == name]


def test_a_reward_model_learns_what_is_preferred(folder):
    lines = metrics(folder / "whole", "reward")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    (line,) = evals(folder / "whole", "reward", "pairs")
    assert line["pair_accuracy"] == 1.0 and line["longer_accuracy"] == 1.0 and line["margin"] > 0


def test_ppo_raises_the_score_and_knows_its_reference(folder):
    lines = metrics(folder / "whole", "ppo")
    assert len(lines) == STEPS
    assert np.mean([line["score"] for line in lines[-3:]]) > lines[0]["score"]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4) and lines[-1]["kl"] > 0.01
    assert lines[0]["kl_coef"] == pytest.approx(0.05) and lines[-1]["kl_coef"] != lines[0]["kl_coef"]
    before, during, after = evals(folder / "whole", "ppo", "manners")
    assert before["kl"] == pytest.approx(0, abs=1e-4) and after["kl"] > before["kl"]
    assert all({"score", "entropy", "distinct_2"} <= line.keys() for line in (before, during, after))


def test_reward_models_are_rewards_of_grpo_beside_the_verifiers(folder):
    lines = metrics(folder / "whole", "grpo")
    assert len(lines) == STEPS
    for line in lines:
        parts = [line[f"reward_{name}"] for name in ("brevity", "reward", "twin")]
        assert line["reward"] == pytest.approx(np.dot(parts, (0.5, 1, 2)), abs=1e-5)


def test_a_trajectory_keeps_the_score_that_the_reward_model_gives_its_tokens(folder):
    loaded = load_run(folder / "whole", "sft")
    scorer = load_scorer(loaded.stored(folder / "whole"), "twin")
    rows = read_trajectories(trajectory_files(folder / "whole" / "stages" / "grpo")[0])
    for row in rows[:3]:
        tokens = np.asarray(row["tokens"])[None]
        places = np.arange(tokens.shape[1])[None]
        scores, _ = scorer(tokens, places, np.ones_like(tokens))
        assert dict(row["rewards"])["twin"] == pytest.approx(float(scores[0, -1]), abs=1e-4)


def test_best_of_n_is_measured_when_the_reward_model_is_made(folder):
    (line,) = evals(folder / "whole", "reward", "best")
    assert line["best_of"] == [1, 2, 4] and line["score"] == sorted(line["score"])
    assert line["kl_bound"][0] == 0 and len(evals(folder / "whole", "ppo", "best")) == 0


def test_collected_answers_are_in_the_label_pages_file_and_are_learnt_from(folder):
    here = folder / "whole" / "stages" / "collect"
    answers = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 32 and all(len(row["answers"]) == len(row["scores"]) == 3 for row in answers)
    choices = [json.loads(line) for line in (here / "labels.jsonl").read_text().splitlines()]
    assert {record["annotator"] for record in choices} == {"the verifier brevity"}
    made = [json.loads(line) for line in (here / "made.jsonl").read_text().splitlines()]
    assert made and all({"prompt", "chosen", "rejected"} <= row.keys() for row in made)
    assert len(metrics(folder / "whole", "dpo")) == STEPS


def test_a_stage_starts_where_it_says(folder):
    """The reference of DPO is the model after sft and not the one after PPO: at its first step nothing has moved."""
    first, last = metrics(folder / "whole", "dpo")[0], metrics(folder / "whole", "dpo")[-1]
    # Rounding differs between the programs of policy and reference.
    assert abs(first["reward_margin"]) < 1e-6 < 1e-4 < abs(last["reward_margin"])
    assert metrics(folder / "whole", "head")[0]["kl"] == pytest.approx(0, abs=1e-4)


RESUMED = ("reward", "ppo", "head", "grpo")


@pytest.fixture(scope="module")
def resumed(folder) -> Path:
    """A copy of the run in which stages have lost what came after their first checkpoint, run again."""
    again = folder / "resumed"
    shutil.copytree(folder / "whole", again)
    for stage in RESUMED:
        forget_last_checkpoint(again, stage, STEPS // SAVED)
    here = again / "stages" / "collect"
    for name in ("summary.json", "made.jsonl"):
        (here / name).unlink()
    answers = (here / "answers.jsonl").read_bytes()
    (here / "answers.jsonl").write_bytes(answers[: len(answers) * 2 // 3])
    with pytest.raises(UserError, match=r"answers\.jsonl:\d+ is gone: 32 lines were written"):
        run(experiment(folder), again)
    checksums(here / "answers.jsonl").unlink()  # as if it had never been longer
    run(experiment(folder), again)
    return again


@pytest.mark.parametrize("stage", RESUMED)
def test_resumed_is_the_same_to_the_bit(folder, resumed, stage):
    whole, pieces = (_parameters(where, stage) for where in (folder / "whole", resumed))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics(folder / "whole", stage) == metrics(resumed, stage)


def test_a_signal_in_a_rollout_saves_the_step_before_it(folder, monkeypatch):
    where, rolled, now, step = folder / "stopped", [], Stop.now, RolloutBatches.__call__
    shutil.copytree(folder / "whole", where)
    forget_last_checkpoint(where, "ppo", STEPS // SAVED)

    def rollout(self, number, state):
        rolled.append((self.stage.name, number))
        return step(self, number, state)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutBatches, "__call__", rollout)
        patch.setattr(Stop, "now", lambda self: "SIGTERM" if rolled and rolled[-1] == ("ppo", SAVED + 2) else now(self))
        with pytest.raises(Interrupted, match=f"SIGTERM: saved at step {SAVED + 2} of {STEPS} of stage ppo"):
            run(experiment(folder), where)
    run(experiment(folder), where)
    assert metrics(folder / "whole", "ppo") == metrics(where, "ppo")


def _parameters(run_dir: Path, stage: str):
    if stage != "reward":
        return load_run(run_dir, stage).model
    loaded = load_run(run_dir, "sft")
    return load_scorer(loaded.stored(run_dir), "reward")


def test_answers_that_were_cut_are_sampled_again_and_the_same(folder, resumed):
    for name in ("answers.jsonl", "made.jsonl"):
        one, other = (where / "stages" / "collect" / name for where in (folder / "whole", resumed))
        assert one.read_bytes() == other.read_bytes()


def only(folder: Path, *stages: Stage) -> Experiment:
    whole = experiment(folder)
    return dataclasses.replace(whole, stages=(*whole.stages[:1], *stages), evals=())


def test_a_reward_model_of_another_tokenizer_is_refused(folder):
    whole = experiment(folder)
    asked = whole.stages[0].sources
    stage = Stage(
        "ppo",
        PPO(reward_models=(f"{folder / 'whole'}:reward",), max_new_tokens=8),
        asked,
        steps=1,
        batch_size=8,
        seq_len=48,
    )
    other = dataclasses.replace(only(folder, stage), tokenizer=Tokenizer(vocab_size=330))
    with pytest.raises(UserError, match=r"reward has another tokenizer \(\d+ pieces\) than this run"):
        run(other, folder / "other_tokenizer")


def test_a_reward_that_is_no_number_stops_the_run(folder, monkeypatch):
    monkeypatch.setitem(VERIFIERS, "brevity", lambda row, text: float("nan"))
    whole = experiment(folder)
    stage = dataclasses.replace(whole.stages[5], steps=2)
    with pytest.raises(UserError, match=r"head: verifier 'brevity' gave nan for .* to the prompt 'Tell"):
        run(only(folder, stage), folder / "nan")


def test_people_are_waited_for(folder):
    whole = experiment(folder)
    stage = dataclasses.replace(whole.stages[1], objective=Collect(judge="people", max_new_tokens=12))
    with pytest.raises(
        UserError, match=r"collect: (\d+) of \1 pairs wait for people: `lm label .*answers.jsonl --labels"
    ):
        run(only(folder, stage), folder / "people")


def test_the_best_answers_are_conversations_to_imitate(folder):
    whole = experiment(folder)
    collect = dataclasses.replace(
        whole.stages[1], objective=Collect(verifier="brevity", make="best", answers=4, max_new_tokens=12)
    )
    imitate = dataclasses.replace(
        whole.stages[0], name="again", sources=(Source("collected:collect", holdout=0.1),), steps=2
    )
    run(only(folder, collect, imitate), folder / "best")
    here = folder / "best" / "stages" / "collect"
    rows = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
    made = [json.loads(line) for line in (here / "made.jsonl").read_text().splitlines()]
    for row, one in zip(rows, made, strict=True):
        assert one["messages"][-1]["content"] == row["answers"][int(np.argmax(row["scores"]))]


def test_pairs_of_a_file_are_scored_by_one_reward_model_or_by_several(folder, resumed):
    one = judge_pairs([folder / "whole"], "reward", str(folder / "pairs.jsonl"), 0.2)
    (line,) = evals(folder / "whole", "reward", "pairs")
    assert one.worth.accuracy.mean == line["pair_accuracy"] == 1.0 and not one.worth.shorter
    assert one.remark == ""
    both = judge_pairs([folder / "whole", folder / "resumed"], "reward", str(folder / "pairs.jsonl"), None)
    assert len(both.scored.gaps) == 60 and both.members[0] == both.members[1] == both.worth.accuracy.mean
    assert "--heldout 0.2 scores only those held out" in both.remark
    implicit = judge_pairs([folder / "whole"], "dpo", str(folder / "pairs.jsonl"), None)
    assert "implicit reward" in implicit.what
    page = write_pairs_page(both, folder / "new" / "pairs.html").read_text()
    assert page.count("<svg") == 3 and "2 reward models together" in page


@pytest.mark.parametrize(
    ("stage", "message"),
    [("sft", "stage sft of .* comes before any preference stage"), ("rewards", "no stage 'rewards'")],
)
def test_a_stage_that_cannot_judge_is_refused(folder, stage, message):
    with pytest.raises(UserError, match=message):
        judge_pairs([folder / "whole"], stage, str(folder / "pairs.jsonl"), None)


def test_the_best_of_many_answers_is_chosen_by_the_reward_model(folder):
    loaded = load_run(folder / "whole", "sft")
    given = {"seed": 0, "temperature": 1.0, "max_new_tokens": 8}
    (one,), first = best_answers(loaded, folder / "whole", ["Tell abcd"], 1, "reward", **given)
    (best,), score = best_answers(loaded, folder / "whole", ["Tell abcd"], 16, "reward", **given)
    assert score[0] >= first[0] and isinstance(best.text, str) and isinstance(one.text, str)


def test_a_batch_in_which_no_answer_ends_is_learnt_from_and_told(folder, capsys):
    """Every answer is one token, which is never the end: all get the penalty, and all numbers stay finite."""
    whole = experiment(folder)
    objective = PPO(verifier="brevity", max_new_tokens=1, missing_eos_penalty=1.0, epochs=1, whiten_rewards=True)
    stage = dataclasses.replace(whole.stages[5], objective=objective, steps=2, batch_size=4)
    run(only(folder, stage), folder / "endless")
    lines = metrics(folder / "endless", "head")
    assert [line["eos_rate"] for line in lines] == [0.0, 0.0]
    assert capsys.readouterr().out.count("at step 1 every answer was cut off at max_new_tokens") == 1
    assert all(np.isfinite(list(line.values())).all() for line in lines)
