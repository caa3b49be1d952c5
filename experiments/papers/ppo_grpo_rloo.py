"""Do PPO, GRPO and RLOO end alike from the same model with the same number of answers (Ahmadian et al. 2024)?"""

import dataclasses

from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.experiment import PPO, Experiment
from lm.overrides import override
from lm.papers.paper import Chart, Evidence, Finding, Paper, by_seed, difference, over_seeds, over_steps, where
from lm.sweep.results import Result, measurements
from lm.sweep.statistics import Curve, holm, paired
from lm.sweep.sweep import Sweep


def ppo(e: Experiment) -> Experiment:
    """As many answers a step as GRPO's groups together, and one update of them; values from a head on the policy."""
    *before, stage = e.stages
    answers = stage.batch_size * stage.objective.group_size
    objective = PPO(
        verifier="answer",
        critic="head",
        max_new_tokens=stage.objective.max_new_tokens,
        kl_coef=0.0,
        epochs=1,
        minibatches=1,
    )
    return dataclasses.replace(e, stages=(*before, dataclasses.replace(stage, objective=objective, batch_size=answers)))


RULE = {
    "GRPO": None,
    # The mean of the others as baseline is the mean of all times G / (G - 1): RLOO up to that factor.
    "RLOO": {"reason.objective.aggregation": "constant", "reason.objective.scale_advantages": False},
    "PPO": ppo,
}

sweep = Sweep("ppo_grpo_rloo", base, {"rule": RULE}, seeds=(0, 1, 2, 3, 4, 5))
quick = Sweep("ppo_grpo_rloo_quick", small, {"rule": RULE})


def ppo_at(rate: float):
    """PPO at another learning rate, to see whether the common one is what it lacks."""
    return lambda e: override(ppo(e), ["--reason.optimizer.peak_lr", str(rate)])


RATES = {"3e-5": ppo_at(3e-5), "3e-4": ppo_at(3e-4)}
rates = Sweep("ppo_rates", base, {"rate": RATES}, seeds=sweep.seeds[:3])

ALIKE = 0.05  # rewards whose difference is surely less than this are called alike


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    rewards = {name: by_seed(where(runs, rule=name), reward) for name in RULE}
    lengths = {name: by_seed(where(runs, rule=name), lambda r: r.final("chains", "length")) for name in RULE}
    pairs = [("GRPO", "RLOO"), ("GRPO", "PPO"), ("RLOO", "PPO")]
    found = {pair: paired(rewards[pair[0]], rewards[pair[1]]) for pair in pairs}
    corrected = holm([one.p for one in found.values()])
    alike = all(one.low > -ALIKE and one.high < ALIKE for one in found.values())
    differ = [pair for pair, p in zip(pairs, corrected, strict=True) if p < 0.05]
    tuned = [rewards["PPO"], *(by_seed(where(evidence.runs.get("rates", []), rate=rate), reward) for rate in RATES)]
    best = max((one for one in tuned if one), key=lambda one: sum(one.values()) / len(one))
    told = "; ".join(f"{a} less {b} {difference(found[a, b])}" for a, b in pairs)
    return Finding(
        verdict="holds" if alike else "does not hold" if differ else "undecided",
        reason=f"Held-out reward after the same number of answers: {told}. With PPO at the best of its rates (1e-4, "
        f"{', '.join(RATES)}; chosen by these rewards, which favours it) GRPO less PPO is {difference(paired(rewards['GRPO'], best))}.",
        columns=("rule", "reward held out", "tokens an answer"),
        rows=[
            (
                name,
                over_seeds(rewards[name]),
                over_seeds(lengths[name], 1),
            )
            for name in RULE
        ],
        charts=[
            Chart(
                "Held-out reward",
                "steps",
                "reward",
                [Curve(name, over_steps(where(runs, rule=name), _measured)) for name in RULE],
            )
        ],
    )


def reward(result: Result) -> float:
    return result.final("chains", "reward")


def _measured(result: Result) -> list[tuple[int, float]]:
    return measurements(result.stages["reason"], "chains", "reward")


paper = Paper(
    "PPO, GRPO and RLOO end alike from the same start with the same number of answers",
    "A. Ahmadian et al., Back to Basics: Revisiting REINFORCE Style Optimization, arXiv:2402.14740, 2024",
    judge,
    sweeps=("sweep", "rates"),
    quick=("quick",),
)
