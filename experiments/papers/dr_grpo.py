"""Length bias of GRPO's per-sequence normalisation and its division by the standard deviation (Liu et al. 2025)."""

from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.papers.paper import Chart, Evidence, Finding, Paper, by_seed, difference, mean_text, over_steps, where
from lm.sweep.results import Result, measurements
from lm.sweep.statistics import Curve, holm, paired
from lm.sweep.sweep import Sweep

KIND = {
    "GRPO": {"reason.objective.aggregation": "sequence"},
    "no division by length": {"reason.objective.aggregation": "constant"},
    "no division by std": {"reason.objective.aggregation": "sequence", "reason.objective.advantage_scale": "none"},
    "Dr. GRPO": {"reason.objective.aggregation": "constant", "reason.objective.advantage_scale": "none"},
}

sweep = Sweep("dr_grpo", base, {"loss": KIND}, seeds=(0, 1, 2, 3, 4, 5))
quick = Sweep("dr_grpo_quick", small, {"loss": {name: KIND[name] for name in ("GRPO", "Dr. GRPO")}})


def wrong_length(result: Result) -> float:
    """Mean number of tokens of wrong answers to held-out prompts at the end of training."""
    return result.final("chains", "length_wrong")


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    losses = [name for name in KIND if where(runs, loss=name)]
    lengths = {name: by_seed(where(runs, loss=name), wrong_length) for name in losses}
    rewards = {name: by_seed(where(runs, loss=name), lambda r: r.final("chains", "reward")) for name in losses}
    others = losses[1:]
    shorter = {name: paired(lengths[name], lengths["GRPO"]) for name in others}
    corrected = dict(zip(others, holm([shorter[name].p for name in others]), strict=True))
    bias = shorter["Dr. GRPO"]
    seen = corrected["Dr. GRPO"] < 0.05
    return Finding(
        verdict="undecided" if not seen else "holds" if bias.mean < 0 else "does not hold",
        reason=f"Wrong answers of Dr. GRPO less those of GRPO: {difference(bias, 1)} tokens (p {corrected['Dr. GRPO']:.2g}, "
        f"corrected for {len(others)} comparisons); reward {difference(paired(rewards['Dr. GRPO'], rewards['GRPO']))}.",
        columns=("loss", "tokens of a wrong answer", "less GRPO's", "reward held out"),
        rows=[
            (
                name,
                mean_text(lengths[name], 1),
                difference(shorter[name], 1) if name in shorter else "",
                mean_text(rewards[name]),
            )
            for name in losses
        ],
        charts=[
            _chart(runs, losses, "length_wrong", "Length of wrong answers", "tokens"),
            _chart(runs, losses, "reward", "Held-out reward", "reward"),
        ],
    )


def _chart(runs: list[Result], losses: list[str], field: str, title: str, unit: str) -> Chart:
    def measured(result: Result) -> list[tuple[int, float]]:
        return measurements(result.stages["reason"], "chains", field)

    return Chart(title, "steps", unit, [Curve(name, over_steps(where(runs, loss=name), measured)) for name in losses])


paper = Paper(
    "GRPO's division by length and by the standard deviation make wrong answers longer; Dr. GRPO's do not",
    "Z. Liu et al., Understanding R1-Zero-Like Training: A Critical Perspective, arXiv:2503.20783, 2025",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
