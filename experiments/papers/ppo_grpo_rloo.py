"""Do PPO, GRPO and RLOO reach the same reward from the same model and number of answers (Ahmadian et al. 2024)?"""

import dataclasses

from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.experiment import PPO, Experiment
from lm.overrides import override
from lm.papers.paper import Chart, Evidence, Finding, Paper, by_seed, difference, mean_text, over_steps, where
from lm.sweep.results import Result, measurements
from lm.sweep.statistics import Curve, holm, paired
from lm.sweep.sweep import Sweep


def ppo(e: Experiment) -> Experiment:
    """PPO with as many answers per step as GRPO's groups together, one update per step, and a value head on the policy."""
    *before, stage = e.stages
    answers = stage.batch_size * stage.objective.group_size
    objective = PPO(
        verifier="answer",
        critic="head",
        max_new_tokens=stage.objective.max_new_tokens,
        kl_coef=0.0,
        lam=1.0,  # as the paper finds best: no token's credit fades with its distance to the reward
        epochs=1,
        minibatches=1,
    )
    return dataclasses.replace(e, stages=(*before, dataclasses.replace(stage, objective=objective, batch_size=answers)))


RULE = {
    "GRPO": None,
    # The mean of the others as baseline is the mean of all times G / (G - 1): RLOO up to that factor.
    "RLOO": {"reason.objective.aggregation": "constant", "reason.objective.advantage_scale": "none"},
    "PPO": ppo,
}

sweep = Sweep("ppo_grpo_rloo", base, {"rule": RULE}, seeds=(0, 1, 2, 3, 4, 5))
quick = Sweep("ppo_grpo_rloo_quick", small, {"rule": RULE})


def fading(rate: float):
    """PPO with the usual λ of 0.95 at a given learning rate."""
    words = ["--reason.objective.lam", "0.95", "--reason.optimizer.peak_lr", str(rate)]
    return lambda e: override(ppo(e), words)


OTHERWISE = {f"λ 0.95, rate {rate:.0e}": fading(rate) for rate in (3e-5, 1e-4, 3e-4)}
otherwise = Sweep("ppo_otherwise", base, {"PPO": OTHERWISE}, seeds=sweep.seeds[:3])

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
    tried = {name: by_seed(where(evidence.runs.get("otherwise", []), PPO=name), reward) for name in OTHERWISE}
    faded = "; ".join(f"{name} {difference(paired(rewards['PPO'], one))}" for name, one in tried.items() if one)
    told = "; ".join(f"{a} less {b} {difference(found[a, b])}" for a, b in pairs)
    return Finding(
        verdict="holds" if alike else "does not hold" if differ else "undecided",
        reason=f"Held-out reward after the same number of answers: {told}. "
        f"PPO's λ is 1; less PPO with {faded or 'another: not tried'}.",
        columns=("rule", "reward held out", "tokens an answer"),
        rows=[
            (
                name,
                mean_text(rewards[name]),
                mean_text(lengths[name], 1),
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
    sweeps=("sweep", "otherwise"),
    quick=("quick",),
)
