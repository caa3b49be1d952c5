"""Does a higher upper clip preserve entropy (Yu et al. 2025, DAPO, arXiv:2503.14476, section 3.1)?"""

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
    over_steps,
    sign_verdict,
)
from lm.sweep.results import Result
from lm.sweep.statistics import Curve, estimate, paired
from lm.sweep.sweep import Sweep

SEVERAL = ["--reason.objective.updates_per_rollout", "4", "--reason.optimizer.peak_lr", "2e-4"]
CLIP = {"0.2": None, "0.28": {"reason.objective.clip_high": 0.28}}

sweep = Sweep("clip_higher", override(base, SEVERAL), {"upper clip": CLIP}, seeds=(0, 1, 2, 3, 4, 5))
quick = Sweep(
    "clip_higher_quick", override(small, ["--reason.objective.updates_per_rollout", "2"]), {"upper clip": CLIP}
)


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    of = {bound: [r for r in runs if r.settings["upper clip"] == bound] for bound in CLIP}
    entropy = {bound: by_seed(of[bound], lambda r: late_mean(r, "reason", "entropy")) for bound in CLIP}
    reward = {bound: by_seed(of[bound], lambda r: r.final("chains", "reward")) for bound in CLIP}
    clipped = {bound: by_seed(of[bound], lambda r: late_mean(r, "reason", "clip_high_frac", 1.0)) for bound in CLIP}
    kept, gained = paired(entropy["0.28"], entropy["0.2"]), paired(reward["0.28"], reward["0.2"])
    return Finding(
        verdict=sign_verdict(kept, +1),
        reason=f"Entropy over the last tenth of the training, 0.28 less 0.2: {difference(kept, 4)} nats a token; held-out "
        f"reward: {difference(gained)}.",
        columns=("upper clip", "entropy, nats a token", "tokens clipped above", "reward held out"),
        rows=[
            (
                bound,
                mean_text(entropy[bound], 4),
                f"{100 * estimate(list(clipped[bound].values())).mean:.3f} %",
                mean_text(reward[bound]),
            )
            for bound in CLIP
        ],
        charts=[_chart(of, "entropy", "nats a token"), _chart(of, "reward", "reward of the rollouts")],
    )


def _chart(of: dict[str, list[Result]], field: str, unit: str) -> Chart:
    def trained(result: Result) -> list[tuple[int, float]]:
        return result.training("reason", field)

    return Chart(
        f"Training {field}", "steps", unit, [Curve(bound, over_steps(found, trained)) for bound, found in of.items()]
    )


paper = Paper(
    "A higher upper clip keeps the policy's entropy up",
    "Q. Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476, 2025, section 3.1",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
