"""Does a sampler with fewer bits than the trainer cost reward, and do truncated importance weights recover it (Yao et al. 2025)?"""

from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.papers.paper import (
    Chart,
    Evidence,
    Finding,
    Paper,
    by_seed,
    difference,
    late_mean,
    mean_text,
    over_steps,
    where,
)
from lm.sweep.results import Result
from lm.sweep.statistics import Curve, paired
from lm.sweep.sweep import Sweep

SAME, ROUNDED, WEIGHED = "the trainer's weights", "4 bits", "4 bits, weighed"
SAMPLER = {
    SAME: None,
    ROUNDED: {"reason.objective.sampler": "int4"},
    WEIGHED: {"reason.objective.sampler": "int4", "reason.objective.tis_clip": 2.0},
}
ALIKE = 0.05  # a cost that is surely less than this is called none

sweep = Sweep("sampler_mismatch", base, {"sampler": SAMPLER}, seeds=(0, 1, 2, 3, 4, 5))
quick = Sweep("sampler_mismatch_quick", small, {"sampler": SAMPLER})


def judge(evidence: Evidence) -> Finding:
    of = {name: where(evidence.results, sampler=name) for name in SAMPLER}
    rewards = {name: by_seed(of[name], lambda r: r.final("chains", "reward")) for name in SAMPLER}
    gaps = {name: by_seed(of[name], gap) for name in (ROUNDED, WEIGHED)}
    cost, gain = paired(rewards[SAME], rewards[ROUNDED]), paired(rewards[WEIGHED], rewards[ROUNDED])
    refuted = cost.high < ALIKE or gain.high < 0
    return Finding(
        verdict="holds" if cost.low > 0 and gain.low > 0 else "does not hold" if refuted else "undecided",
        reason=f"Held-out reward of the trained policy: the trainer's own weights less four bits {difference(cost)}; four bits "
        f"with importance weights less without {difference(gain)}.",
        columns=("sampler", "KL of sampler to trainer, nats a token", "reward held out"),
        rows=[(name, mean_text(gaps[name], 4) if name in gaps else "0", mean_text(rewards[name])) for name in SAMPLER],
        charts=[
            Chart(
                "Reward of the rollouts, which the sampler answers",
                "steps",
                "reward",
                [
                    Curve(name, over_steps(found, lambda r: r.training("reason", "reward")))
                    for name, found in of.items()
                ],
            ),
            Chart(
                "KL of sampler to trainer",
                "steps",
                "nats a token",
                [Curve(name, over_steps(of[name], lambda r: r.training("reason", "sampler_kl"))) for name in gaps],
            ),
        ],
    )


def gap(result: Result) -> float:
    """Mean over the whole training."""
    return late_mean(result, "reason", "sampler_kl", 1.0)


paper = Paper(
    "A sampler of fewer bits than the trainer costs reward, and truncated importance weights bring it back",
    "F. Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, fengyao.notion.site/off-policy-rl, 2025",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
