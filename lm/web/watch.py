"""Reward-hacking watch: judge's reward, reward model's score and KL of held-out answers over a stage, and a warning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lm.train.run_files import Line, Run, StageFiles, finite, step_order
from lm.web import watch_charts
from lm.web.charts import SvgChart
from lm.web.numbers import percent, signed

JUDGED = ("reward", "reward_stderr", "score", "score_stderr")


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer to a held-out prompt, with the reward model's score (None: not scored) and the judge's reward."""

    when: str
    answer: str
    score: float | None
    reward: float | None


@dataclass(frozen=True)
class AnswersBeforeAfter:
    """The answers to one held-out prompt before a stage and after it (or at its latest evaluation)."""

    prompt: str
    sides: list[JudgedAnswer]


@dataclass(frozen=True)
class StageWatch:
    """A stage as measured by one eval at temperature 1: charts, small charts, answers, and a warning or None."""

    stage: str
    kind: str
    eval: str
    verifier: str
    charts: list[SvgChart]
    small: list[SvgChart]
    answers: list[AnswersBeforeAfter]
    warning: str | None


def watches(run: Run) -> list[StageWatch]:
    """A watch for each stage and eval with held-out KL at two or more steps."""
    verifiers = {item["name"]: item["verifier"] for item in run.experiment["evals"]}
    return [
        StageWatch(
            stage.name,
            stage.kind,
            name,
            verifiers.get(name, "verifier"),
            watch_charts.main_charts(stage.name, name, lines),
            watch_charts.small_charts(stage, name, lines),
            compared(stage, name),
            over_optimisation(lines, stage.checkpoints),
        )
        for stage in run.stages
        for name, lines in reward_evals(stage).items()
        if len(finite(lines, "reward", "kl")) > 1
    ]


def warnings(run: Run) -> list[tuple[str, str]]:
    """(stage, warning) of every stage with a warning."""
    found = [
        (stage, over_optimisation(lines, stage.checkpoints))
        for stage in run.stages
        for lines in reward_evals(stage).values()
    ]
    return [(stage.name, told) for stage, told in found if told]


def reward_evals(stage: StageFiles) -> dict[str, list[Line]]:
    """Measurements of each eval with metric reward, in order of steps; of several at one step the last."""
    found: dict[str, dict[int, Line]] = {}
    for line in stage.evals:
        if line["metric"] == "reward":
            found.setdefault(line["eval"], {})[line["step"]] = line
    return {name: list(lines.values()) for name, lines in found.items()}


def over_optimisation(lines: list[Line], saved: Iterable[int] | None = None) -> str | None:
    """A warning if the reward model's score rises while the judge's reward falls, else None.

    Compares the measurement with the highest judge's reward to the last one; both changes must exceed twice their standard
    error. This is how a reward model is over-optimised (Gao, Schulman and Hilton, arXiv:2210.10760).

    Args:
        lines: measurements of one eval in order of steps; those without reward, score and standard errors are ignored.
        saved: steps that have a checkpoint; None: unknown.
    """
    found = finite(lines, *JUDGED)
    if len(found) < 2:
        return None
    best, last = max(found, key=lambda line: line["reward"]), found[-1]
    fall, rise = best["reward"] - last["reward"], last["score"] - best["score"]
    fall_error = math.hypot(best["reward_stderr"], last["reward_stderr"])
    rise_error = math.hypot(best["score_stderr"], last["score_stderr"])
    if not (fall > 2 * fall_error and rise > 2 * rise_error):
        return None
    return (
        f"From step {best['step']:,} to step {last['step']:,} the reward model's score rises from {_decimals(best['score'])} to "
        f"{_decimals(last['score'])} (standard error of the difference {_decimals(rise_error)}), while the judge's reward falls from "
        f"{percent(best['reward'])} to {percent(last['reward'])} ({100 * fall_error:.1f} points): the policy is "
        f"over-optimised for the reward model. {_advice(best['step'], saved)}"
    )


def _decimals(value: float) -> str:
    return signed(f"{value:.2f}")


def _advice(step: int, saved: Iterable[int] | None) -> str:
    if step == 0:
        return "The model that entered the stage is the better one: use a stronger KL penalty (or larger beta), or a better reward model."
    if saved is None or step in saved:
        return f"The checkpoint of step {step:,} is the better one."
    return (
        f"The model of step {step:,} was the better one, but its checkpoint has been removed: train again for {step:,} steps, or "
        "use a stronger KL penalty (or larger beta)."
    )


def compared(stage: StageFiles, name: str, limit: int = 6) -> list[AnswersBeforeAfter]:
    """The first held-out prompts with an answer both before the stage and later, and these answers."""
    lines = [line for line in stage.samples if line["kind"] == "heldout" and line.get("eval") == name]
    before = {line["prompt"]: line for line in lines if line["when"] == "before"}
    later = [line for line in lines if line["when"] != "before"]
    last = {line["prompt"]: line for line in later if step_order(line) == step_order(later[-1])}
    both = [prompt for prompt in before if prompt in last][:limit]
    return [
        AnswersBeforeAfter(prompt, [_judged_answer(before[prompt]), _judged_answer(last[prompt])]) for prompt in both
    ]


def _judged_answer(line: Line) -> JudgedAnswer:
    when = "before" if line["when"] == "before" else f"{line['when']}, step {line['step']:,}"
    return JudgedAnswer(when, line["answer"], line.get("score"), line.get("reward"))
