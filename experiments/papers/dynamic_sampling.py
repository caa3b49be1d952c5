"""Does dynamic sampling (resampling groups with equal rewards) give more reward per sampled answer (Yu et al. 2025, DAPO, section 3.2)?"""

import numpy as np
from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.overrides import override
from lm.papers.paper import (
    Chart,
    Evidence,
    Finding,
    Paper,
    by_seed,
    difference,
    late_mean,
    mean_text,
    sign_verdict,
    where,
)
from lm.sweep.results import Result, measurements
from lm.sweep.statistics import Curve, curve_points, paired
from lm.sweep.sweep import Sweep

ONCE, AGAIN = "one rollout", "up to three"
RULE = {ONCE: None, AGAIN: {"reason.objective.rollouts": 3}}
MARKS = 8  # places on the axis of answers at which the curves are read

sweep = Sweep(
    "dynamic_sampling", override(base, ["--reason.eval_every", "15"]), {"rule": RULE}, seeds=(0, 1, 2, 3, 4, 5)
)
quick = Sweep("dynamic_sampling_quick", small, {"rule": RULE})


def by_answers(result: Result) -> tuple[list[float], list[float]]:
    """(answers sampled so far, held-out reward) of every measurement."""
    stage = result.experiment["stages"][-1]
    each = stage["batch_size"] * stage["objective"]["group_size"]
    turns = dict(result.training("reason", "rollouts"))
    sampled = np.cumsum([each * turns.get(step, 1) for step in range(1, stage["steps"] + 1)])
    found = measurements(result.stages["reason"], "chains", "reward")
    return [float(sampled[step - 1]) for step, _ in found], [value for _, value in found]


def judge(evidence: Evidence) -> Finding:
    of = {name: where(evidence.results, rule=name) for name in RULE}
    curves = {name: {r.seed: by_answers(r) for r in found if r.finished} for name, found in of.items()}
    budget = min(answers[-1] for answers, _ in curves[ONCE].values())
    at_budget = {name: {s: float(np.interp(budget, *one)) for s, one in runs.items()} for name, runs in curves.items()}
    at_end = {name: by_seed(found, lambda r: r.final("chains", "reward")) for name, found in of.items()}
    flat = {name: by_seed(found, lambda r: late_mean(r, "reason", "frac_zero_std", 1.0)) for name, found in of.items()}
    spent = {name: {seed: answers[-1] for seed, (answers, _) in runs.items()} for name, runs in curves.items()}
    each, step = paired(at_budget[AGAIN], at_budget[ONCE]), paired(at_end[AGAIN], at_end[ONCE])
    return Finding(
        verdict=sign_verdict(each, +1),
        reason=f"Held-out reward after {budget:,.0f} sampled answers, up to three rollouts a step less one: {difference(each)}; "
        f"after as many steps, for which it samples more: {difference(step)}.",
        columns=(
            "rollouts a step",
            "groups without a preference",
            "answers sampled",
            "reward at equal answers",
            "at the end",
        ),
        rows=[
            (
                name,
                mean_text(flat[name]),
                mean_text(spent[name], 0),
                mean_text(at_budget[name]),
                mean_text(at_end[name]),
            )
            for name in RULE
        ],
        charts=[
            Chart(
                "Held-out reward over the answers that were sampled",
                "answers",
                "reward",
                [Curve(name, _read(list(runs.values()), budget)) for name, runs in curves.items()],
            )
        ],
    )


def _read(runs: list[tuple[list[float], list[float]]], budget: float) -> list[tuple[float, float, float, float]]:
    """Held-out rewards interpolated linearly at the same numbers of sampled answers in every run."""
    marks = np.linspace(budget / MARKS, budget, MARKS)
    return curve_points([dict(zip(marks.tolist(), np.interp(marks, *one).tolist(), strict=True)) for one in runs])


paper = Paper(
    "Sampling again where a group has no preference gets more reward out of as many answers",
    "Q. Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476, 2025, section 3.2",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
