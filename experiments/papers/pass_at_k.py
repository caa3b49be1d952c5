"""Does reinforcement learning solve problems that k samples of the base model did not (Yue et al. 2025, arXiv:2504.13837)?"""

import dataclasses

from small_reasoner import CHAINS, SHORT
from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.experiment import Eval
from lm.overrides import override
from lm.papers.paper import Chart, Evidence, Finding, Paper, difference, mean_text
from lm.sweep.results import Result
from lm.sweep.statistics import Curve, curve_point, paired
from lm.sweep.sweep import Sweep

SAMPLES = Eval("samples", CHAINS, "pass_at_k", count=128, max_new_tokens=64, temperature=1.0, best_of=64)

# Taught less, and practised longer: 64 samples of a model that was taught 800 steps solve every prompt, and leave nothing to add.
weak = override(base, ["--sft.steps", "350", "--reason.steps", "240"])

sweep = Sweep("pass_at_k", dataclasses.replace(weak, evals=(*base.evals, SAMPLES)), seeds=(0, 1, 2, 3, 4, 5))
quick = Sweep(
    "pass_at_k_quick",
    dataclasses.replace(
        small,
        evals=(
            *small.evals,
            dataclasses.replace(SAMPLES, count=8, best_of=4, max_new_tokens=SHORT),
        ),
    ),
)


def passed(result: Result, stage: str, k: int) -> float:
    """pass@k on the held-out prompts after a stage."""
    lines = [line for line in result.stages[stage].evals if line["eval"] == "samples" and line["when"] == "after"]
    return lines[-1][f"pass_at_{k}"]


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    most = int(max(line["k"] for line in runs[0].stages["sft"].evals if line["eval"] == "samples"))
    sizes = [2**i for i in range(most.bit_length()) if 2**i <= most]
    table = {(stage, k): {r.seed: passed(r, stage, k) for r in runs} for stage in ("sft", "reason") for k in sizes}
    gains = {k: paired(table["reason", k], table["sft", k]) for k in sizes}
    first, last = gains[1], gains[most]
    # The claim: it is better at one sample, and not at many.
    holds = first.low > 0 and last.high <= 0.01
    refuted = last.low > 0.01
    return Finding(
        verdict="holds" if holds else "does not hold" if refuted else "undecided",
        reason=f"Reinforcement learning changes pass@1 by {difference(first)} and pass@{most} by {difference(last)}.",
        columns=("k", "before", "after", "difference"),
        rows=[
            (
                str(k),
                mean_text(table["sft", k]),
                mean_text(table["reason", k]),
                difference(gains[k]),
            )
            for k in sizes
        ],
        charts=[
            Chart(
                "pass@k, before and after",
                "k",
                "solved by one of k",
                [
                    Curve(label, [curve_point(k, list(table[stage, k].values())) for k in sizes])
                    for stage, label in (("sft", "before"), ("reason", "after"))
                ],
                log_x=True,
            )
        ],
    )


paper = Paper(
    "Reinforcement learning makes likelier what the model could already sample, and adds nothing to it",
    "Y. Yue et al., Does Reinforcement Learning Really Incentivize Reasoning Capacity in LLMs Beyond the Base Model?, "
    "arXiv:2504.13837, 2025",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
