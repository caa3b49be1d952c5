"""Reward against KL of DPO and PPO, with a program as gold reward (Rafailov et al. 2023, arXiv:2305.18290, figure 2)."""

import dataclasses
import math
from pathlib import Path

from lm.experiment import Experiment, Source
from lm.files import load
from lm.overrides import override
from lm.papers.paper import Chart, Evidence, Finding, Paper, difference, mean_text
from lm.sweep.results import Result
from lm.sweep.statistics import Curve, estimate, holm, paired
from lm.sweep.sweep import Sweep

LIMITS = (1.0, 2.0, 4.0, 8.0)  # nats an answer

rlhf = load(str(Path(__file__).parent.parent / "rlhf.py"))


def ending_with(name: str):
    """The experiment with this preference stage as its last stage, without the other one."""

    def change(e: Experiment) -> Experiment:
        others = {"ppo", "dpo"} - {name}
        return dataclasses.replace(e, stages=tuple(stage for stage in e.stages if stage.name not in others))

    return change


RULE = {
    **{
        f"DPO, β {beta}": (lambda e, b=beta: override(ending_with("dpo")(e), ["--dpo.objective.beta", str(b)]))
        for beta in (0.05, 0.2)
    },
    **{
        f"PPO, KL {coef}": (
            lambda e, c=coef: override(
                ending_with("ppo")(e), ["--ppo.objective.lam", "1.0", "--ppo.objective.kl_coef", str(c)]
            )
        )
        for coef in (0.02, 0.1)
    },
}
OFTEN = ["--ppo.steps", "40", "--ppo.eval_every", "2", "--dpo.eval_every", "10"]  # both have points within a nat
base = dataclasses.replace(
    override(rlhf, OFTEN), prompts=(), evals=tuple(item for item in rlhf.evals if item.name in ("judge", "instruct"))
)

sweep = Sweep("dpo_ppo", base, {"rule": RULE}, seeds=(0, 1, 2))


def made_up(e: Experiment) -> Experiment:
    """A quick variant without pretraining, on generated pairs, since an untrained model has no answers to compare."""
    pairs = (Source("gen:preferences", holdout=0.05),)
    kept = (stage for stage in e.stages if stage.name not in ("pretrain", "collect"))
    stages = tuple(
        dataclasses.replace(s, sources=pairs) if s.sources[0].path.startswith("collected:") else s for s in kept
    )
    return dataclasses.replace(e, stages=stages)


SMALL = [
    "--model.num_layers",
    "1",
    "--model.embed_dim",
    "32",
    "--model.mlp_dim",
    "64",
    "--ppo.eval_every",
    "1",
    "--dpo.eval_every",
    "1",
]
FEW = ["--evals.judge.count", "8", "--evals.instruct.count", "8", "--ppo.objective.max_new_tokens", "8"]
FEW += ["--evals.judge.max_new_tokens", "8", "--evals.instruct.max_new_tokens", "8"]
little = made_up(base)
BRIEF = {"steps": "2", "batch_size": "8", "optimizer.warmup_steps": "1"}
SHORT = [word for stage in little.stages for name, value in BRIEF.items() for word in (f"--{stage.name}.{name}", value)]
quick = Sweep(
    "dpo_ppo_quick",
    override(little, [*SMALL, *FEW, *SHORT]),
    {"rule": {name: RULE[name] for name in ("DPO, β 0.05", "PPO, KL 0.02")}},
)


def points(result: Result) -> list[tuple[float, float]]:
    """(KL, gold reward) of every measurement of the preference stage, including its start."""
    stage = list(result.stages.values())[-1]
    lines = [line for line in stage.evals if line["eval"] == "judge" and math.isfinite(line.get("kl", math.nan))]
    return sorted((line["kl"], line["reward"]) for line in lines)


def best_within(results: list[Result], limit: float) -> dict[int, float]:
    """Seed -> highest gold reward of an algorithm at a KL within the limit, over its settings and steps."""
    found: dict[int, float] = {}
    for result in results:
        for kl, reward in points(result):
            if kl <= limit:
                found[result.seed] = max(found.get(result.seed, -math.inf), reward)
    return found


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    of = {kind: [r for r in runs if r.settings["rule"].startswith(kind)] for kind in ("DPO", "PPO")}
    table = {(kind, limit): best_within(found, limit) for kind, found in of.items() for limit in LIMITS}
    gains = {limit: paired(table["DPO", limit], table["PPO", limit]) for limit in LIMITS}
    corrected = dict(zip(LIMITS, holm([gains[limit].p for limit in LIMITS]), strict=True))
    seen = [gains[limit].mean for limit in LIMITS if corrected[limit] < 0.05]
    below = any(gain < 0 for gain in seen)
    return Finding(
        verdict="does not hold" if below else "holds" if seen else "undecided",
        reason="Best gold reward within a KL, DPO less PPO: "
        + "; ".join(f"{limit:g} nats {difference(gains[limit])}, p {corrected[limit]:.2g}" for limit in LIMITS)
        + " (p by Holm for four).",
        columns=("KL at most", "DPO", "PPO"),
        rows=[
            (
                f"{limit:g} nats",
                *(mean_text(table[kind, limit]) for kind in ("DPO", "PPO")),
            )
            for limit in LIMITS
        ],
        charts=[
            Chart(
                "Gold reward against KL, seed by seed's mean at each measurement",
                "KL, nats an answer",
                "gold reward",
                [
                    Curve(name, _mean([r for r in runs if r.settings["rule"] == name]))
                    for name in RULE
                    if any(r.settings["rule"] == name for r in runs)
                ],
            )
        ],
    )


def _mean(results: list[Result]) -> list[tuple[float, float, float, float]]:
    """Means of KL and reward over seeds at each measurement, ordered by step."""
    by_place = list(zip(*(points(result) for result in results), strict=False))
    found = []
    for same in by_place:
        reward = estimate([r for _, r in same])
        found.append(
            (sum(kl for kl, _ in same) / len(same), reward.mean, reward.mean - reward.half, reward.mean + reward.half)
        )
    return found


paper = Paper(
    "DPO's reward is above PPO's at every KL to the reference",
    "R. Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, 2023, figure 2",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
