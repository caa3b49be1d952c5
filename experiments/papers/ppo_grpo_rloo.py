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


def ppo_with(*words: str):
    """PPO set otherwise, to see whether what the three have in common is what it lacks."""
    return lambda e: override(ppo(e), list(words))


OTHERWISE = {
    "rate 3e-5": ppo_with("--reason.optimizer.peak_lr", "3e-5"),
    "rate 3e-4": ppo_with("--reason.optimizer.peak_lr", "3e-4"),
    "λ 1": ppo_with("--reason.objective.lam", "1"),  # no token's credit fades with its distance to the end
}
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
    tried = {"as it is": {seed: rewards["PPO"][seed] for seed in otherwise.seeds if seed in rewards["PPO"]}}
    tried |= {name: by_seed(where(evidence.runs.get("otherwise", []), PPO=name), reward) for name in OTHERWISE}
    means = {name: sum(found.values()) / len(found) for name, found in tried.items() if found}
    best = max(means, key=lambda name: means[name])
    told = "; ".join(f"{a} less {b} {difference(found[a, b])}" for a, b in pairs)
    return Finding(
        verdict="holds" if alike else "does not hold" if differ else "undecided",
        reason=f"Held-out reward after the same number of answers: {told}. PPO otherwise: "
        f"{', '.join(f'{name} {mean:.3f}' for name, mean in means.items())}; GRPO less the best of these, chosen by these rewards, "
        f"which favours it: {difference(paired(rewards['GRPO'], tried[best]))}.",
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
    sweeps=("sweep", "otherwise"),
    quick=("quick",),
)
