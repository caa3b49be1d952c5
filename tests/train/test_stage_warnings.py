"""What a stage warns of: once, after so many steps in a row, across resumes; shown, and written down for the report."""

import dataclasses

import pytest

from lm.config.objective import WARNING_STEPS as STEPS
from lm.experiment import GRPO, PPO, SFT, Experiment, Optimizer
from lm.train.metrics import MetricsLog, read_lines
from lm.train.stage_warnings import Warnings
from tests.helpers import TINY, tiny_stage

FLAT = {"frac_zero_std": 1.0, "reward": 0.25, "eos_rate": 0.5}
GOOD = FLAT | {"frac_zero_std": 0.5}
ONE = {"score_range": 0.0, "score": 2.0, "eos_rate": 1.0}


def warned(folder, objective, lines, first=1, **changes):
    """What is shown while a stage's metrics are these lines."""
    shown = []
    stage = tiny_stage(objective, steps=changes.pop("steps", 100))
    with MetricsLog(folder) as log:
        log.rewind(first - 1)
        watch = Warnings(Experiment("tiny", (stage,), model=TINY), stage, log, shown.append)
        for step, line in enumerate(lines, first):
            log.metrics({"step": step} | line)
            watch.see({"step": step} | line)
    return shown


def test_equal_rewards_are_said_once_after_some_steps(tmp_path):
    shown = warned(tmp_path, GRPO(), [GOOD, *[FLAT] * (STEPS - 1), GOOD, *[FLAT] * (2 * STEPS), GOOD, *[FLAT] * STEPS])
    (text,) = shown
    assert text.startswith(
        f"tiny: in the {STEPS} steps up to step {2 * STEPS + 1} all answers to a prompt had the same reward"
    )
    (line,) = read_lines(tmp_path / "warnings.jsonl")
    assert line["kind"] == "equal_rewards" and line["step"] == 2 * STEPS + 1 and line["text"] in text


def test_a_stage_shorter_than_that_is_warned_of_at_its_end(tmp_path):
    assert len(warned(tmp_path, GRPO(), [FLAT] * 2, steps=2)) == 1


def test_ppo_answers_that_all_score_the_same_are_said(tmp_path):
    (text,) = warned(tmp_path, PPO(verifier="answer"), [ONE] * (STEPS + 3))
    assert "all answers had the same reward (2)" in text


def test_answers_that_are_all_truncated_are_said_once(tmp_path):
    cut = GOOD | {"eos_rate": 0.0}
    (text,) = warned(tmp_path, GRPO(), [GOOD, cut, GOOD, cut, cut])
    assert "at step 2 every answer was cut off at max_new_tokens" in text


def test_truncation_beyond_its_threshold_is_said(tmp_path):
    (text,) = warned(tmp_path, GRPO(), [GOOD, *[GOOD | {"eos_rate": 0.4}] * (STEPS + 2)])
    assert f"in the {STEPS} steps up to step {STEPS + 1} more than half of the answers were cut off" in text


HEALTHY = GOOD | {"entropy": 2.0, "grad_norm": 0.5, "completion_length": 100.0}


@pytest.mark.parametrize(
    ("metric", "low"), [("entropy", 0.1), ("grad_norm", 1e-3), ("completion_length", 9.0)], ids=str
)
def test_a_collapse_is_said_with_its_step(tmp_path, metric, low):
    fallen, spared = HEALTHY | {metric: low}, HEALTHY | {metric: HEALTHY[metric] / 2}
    lines = [*[HEALTHY] * (STEPS + 2), *[fallen] * (STEPS - 1), HEALTHY, *[spared] * STEPS]
    assert warned(tmp_path / "spared", GRPO(), lines) == []
    (text,) = warned(tmp_path / "fallen", GRPO(), [*lines, *[fallen] * STEPS])
    assert f"up to step {len(lines) + STEPS} {metric} was below" in text
    assert len(warned(tmp_path / "fallen", GRPO(), [fallen], first=len(lines) + STEPS + 1)) == 0, "once, over resumes"


def test_steps_whose_answers_are_all_cut_off_and_masked_have_no_entropy(tmp_path):
    nothing = HEALTHY | {"entropy": 0.0, "eos_rate": 0.0}
    warnings = warned(tmp_path, GRPO(), [*[HEALTHY] * (STEPS + 2), *[nothing] * (2 * STEPS)])
    assert not any("entropy was below" in text for text in warnings) and any("cut off" in text for text in warnings)


def test_a_stage_that_begins_low_has_not_collapsed(tmp_path):
    assert warned(tmp_path, GRPO(), [HEALTHY | {"entropy": 0.01}] * (3 * STEPS)) == []


def held_out(folder, rewards, accuracies, metric="reward", error=0.01):
    """What is shown of a stage with these rewards by step and accuracies by {step: accuracy}."""
    shown, stage = [], tiny_stage(GRPO(), steps=100)
    key = {"reward": "reward", "pass_at_k": "pass_at_1"}[metric]
    with MetricsLog(folder) as log:
        watch = Warnings(Experiment("tiny", (stage,), model=TINY), stage, log, shown.append)
        for step, reward in enumerate(rewards, 1):
            log.metrics({"step": step} | GOOD | {"reward": reward})
            watch.see({"step": step} | GOOD | {"reward": reward})
            if step in accuracies:
                line = {"step": step, "when": "during", "eval": "held", "metric": metric, key: accuracies[step]}
                log.evaluation(line | {f"{key}_stderr": error})
                watch.compare_held_out()
    return shown


RISING = [0.2 + 0.02 * step for step in range(30)]


@pytest.mark.parametrize("metric", ["reward", "pass_at_k"])
def test_a_reward_that_rises_while_held_out_accuracy_falls_is_said_with_its_step(tmp_path, metric):
    (text,) = held_out(tmp_path, RISING, {10: 0.6, 20: 0.5, 30: 0.4}, metric)
    assert "from step 10 to step 20 the reward rose from 0.34 to 0.54" in text
    assert "held-out accuracy of held fell from 0.6 to 0.5" in text and "step 10 was better" in text
    (line,) = read_lines(tmp_path / "warnings.jsonl")
    assert (line["kind"], line["step"]) == ("held_out_falls_held", 20)


@pytest.mark.parametrize(
    ("rewards", "accuracies", "error"),
    [
        (RISING, {10: 0.4, 20: 0.5, 30: 0.6}, 0.01),  # both rise
        (RISING, {10: 0.6, 20: 0.5, 30: 0.5}, 0.1),  # within the error
        ([0.5] * 30, {10: 0.6, 20: 0.4, 30: 0.3}, 0.01),  # the reward is flat
        (RISING[::-1], {10: 0.6, 20: 0.4, 30: 0.3}, 0.01),  # both fall
        (RISING, {30: 0.3}, 0.01),  # one measurement
    ],
)
def test_other_courses_of_held_out_accuracy_warn_of_nothing(tmp_path, rewards, accuracies, error):
    assert held_out(tmp_path, rewards, accuracies, error=error) == []


def test_a_resumed_stage_goes_on_counting_and_says_nothing_twice(tmp_path):
    assert warned(tmp_path, GRPO(), [FLAT] * (STEPS - 1)) == []
    assert len(warned(tmp_path, GRPO(), [FLAT], first=STEPS)) == 1
    assert warned(tmp_path, GRPO(), [FLAT] * (STEPS + 1), first=STEPS + 1) == []
    # what is forgotten, because the run goes on from before it, is said again
    assert len(warned(tmp_path, GRPO(), [FLAT] * STEPS, first=STEPS - 1)) == 1
    assert len(read_lines(tmp_path / "warnings.jsonl")) == 1


@pytest.mark.parametrize("objective", [SFT(), GRPO()])
def test_a_stage_that_learns_warns_of_nothing(tmp_path, objective):
    assert warned(tmp_path, objective, [GOOD] * 20) == []
    assert not (tmp_path / "warnings.jsonl").exists()


def test_narrow_parameters_without_master_weights_are_said(tmp_path):
    shown = []
    narrow = dataclasses.replace(TINY, param_dtype="bfloat16")
    for master in (True, False):
        stage = tiny_stage(SFT(), optimizer=Optimizer(master_weights=master))
        with MetricsLog(tmp_path) as log:
            Warnings(Experiment("tiny", (stage,), model=narrow), stage, log, shown.append)
    assert len(shown) == 1 and "tiny.optimizer.master_weights is false" in shown[0]
