"""Compute-optimal size: curves of equal FLOPs and their minima (Hoffmann et al. 2022, arXiv:2203.15556, approach 2)."""

import dataclasses
import math

import numpy as np
from tiny_text import experiment as base
from tiny_text import quick as small

from lm.experiment import Experiment
from lm.model.flops import forward_flops_per_token
from lm.papers.paper import Chart, Evidence, Finding, Paper, by_seed, mean_text, where
from lm.sweep.results import Result
from lm.sweep.statistics import Curve, curve_point, estimate, power_law
from lm.sweep.sweep import Sweep

CLAIMED, RIVAL = 0.5, 0.73  # exponents of the size: Hoffmann et al., Kaplan et al. 2020
ROWS = 16


def shape(width: int, layers: int, heads: int) -> dict:
    return {
        "model.embed_dim": width,
        "model.num_layers": layers,
        "model.scan_unroll": layers,
        "model.num_heads": heads,
        "model.num_kv_heads": heads,
        "model.head_dim": width // heads,
        "model.mlp_dim": 8 * round(width / 3),
        "tokenizer.vocab_size": 512,
        "pretrain.batch_size": ROWS,
        "pretrain.optimizer.peak_lr": 4e-3 * math.sqrt(64 / width),
    }


def spend(flops: float):
    """Set the steps to use up the FLOPs, with a tenth of them as warmup and the cosine schedule ending at the last."""

    def change(e: Experiment) -> Experiment:
        stage = e.stages[0]
        a_step = 3 * forward_flops_per_token(e.model, e.tokenizer.vocab_size, stage.seq_len) * ROWS * stage.seq_len
        steps = max(2, round(flops / a_step))
        optimizer = dataclasses.replace(stage.optimizer, warmup_steps=max(1, steps // 10))
        return dataclasses.replace(e, stages=(dataclasses.replace(stage, steps=steps, optimizer=optimizer),))

    return change


def size(experiment: dict) -> float:
    """Number of parameters that every token is multiplied with: blocks and output head."""
    m = experiment["model"]
    block = (
        m["embed_dim"] * (2 * m["num_heads"] + 2 * m["num_kv_heads"]) * m["head_dim"]
        + 3 * m["embed_dim"] * m["mlp_dim"]
    )
    return m["num_layers"] * block + m["embed_dim"] * experiment["tokenizer"]["vocab_size"]


SIZES = {
    f"{w} wide, {n} deep": shape(w, n, h) for w, n, h in ((24, 2, 2), (32, 2, 2), (48, 2, 3), (64, 3, 4), (96, 4, 6))
}
BUDGETS = {f"{c:.0e}": spend(c) for c in (1e12, 2e12, 4e12)}

RATES = {"half": 0.5, "double": 2.0}


def times_rate(factor: float):
    """Multiply the learning rate, to test whether an untuned one moves the minimum."""
    return {"pretrain.optimizer.peak_lr": lambda e: factor * e.stages[0].optimizer.peak_lr}


sweep = Sweep("isoflop", base, {"size": SIZES, "budget": BUDGETS}, seeds=(0, 1, 2))
rates = Sweep(
    "isoflop_rates",
    base,
    {
        "size": SIZES,
        "budget": {c: BUDGETS[c] for c in (min(BUDGETS, key=float), max(BUDGETS, key=float))},
        "rate": {name: times_rate(factor) for name, factor in RATES.items()},
    },
)
quick = Sweep(
    "isoflop_quick",
    small,
    {
        "size": {w: {"model.embed_dim": int(w), "model.mlp_dim": 2 * int(w)} for w in ("16", "32", "48")},
        "budget": {"1e9": spend(1e9), "3e9": spend(3e9)},
    },
)


def optimum(sizes: list[float], losses: list[float]) -> float:
    """The size at the minimum of a parabola fitted to losses over log size; nan if it opens downwards."""
    a, b, _ = np.polyfit(np.log(sizes), losses, 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else math.nan


def bits(result: Result) -> float:
    return result.final("docs", "bits_per_byte")


def exponent(budgets: list[str], best: list[float]) -> float:
    """Exponent of the power law through the minima; nan if a minimum is missing."""
    return math.nan if any(map(math.isnan, best)) else power_law([float(c) for c in budgets], best).exponent


def _tuned(evidence: Evidence, labels: list[str], sizes: list[float]) -> str:
    """A sentence with the exponent for the best of three learning rates per size (one seed, two budgets)."""
    tried = evidence.runs.get("rates", [])
    if not tried:
        return ""
    budgets = sorted({r.settings["budget"] for r in tried}, key=float)
    one = [r for r in (*evidence.results, *tried) if r.seed == tried[0].seed]
    best = [optimum(sizes, [min(bits(r) for r in where(one, size=n, budget=c)) for n in labels]) for c in budgets]
    return (
        f" With the best of three rates for each size and budget (half, one and double; one seed, the budgets {' and '.join(budgets)}) "
        f"it is {exponent(budgets, best):.2f}."
    )


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    budgets = sorted({r.settings["budget"] for r in runs}, key=float)
    labels = sorted({r.settings["size"] for r in runs}, key=lambda label: size(where(runs, size=label)[0].experiment))
    sizes = [size(where(runs, size=label)[0].experiment) for label in labels]

    table = {(n, c): by_seed(where(runs, size=n, budget=c), bits) for n in labels for c in budgets}
    seeds = sorted(set.intersection(*(set(found) for found in table.values())))

    def optima(chosen: list[int]) -> list[float]:
        return [optimum(sizes, [np.mean([table[n, c][s] for s in chosen]) for n in labels]) for c in budgets]

    found = estimate([exponent(budgets, optima([seed])) for seed in seeds])
    low, high = found.mean - found.half, found.mean + found.half
    excluded = high < CLAIMED or low > CLAIMED
    verdict = "does not hold" if excluded else "holds" if high < RIVAL else "undecided"
    best = optima(seeds)
    outside = [c for c, n in zip(budgets, best, strict=True) if not sizes[0] <= n <= sizes[-1]]
    doubt = f" The minimum of {', '.join(outside)} lies outside the sizes that were tried." if outside else ""
    return Finding(
        verdict=verdict,
        reason=f"The size at the minimum grows as FLOPs^{found.mean:.2f} [{low:.2f}, {high:.2f}] (Student's t over the exponents of "
        f"{len(seeds)} seeds); claimed is {CLAIMED}, Kaplan et al. have {RIVAL}.{doubt}{_tuned(evidence, labels, sizes)}",
        columns=("parameters", *(f"{c} FLOPs" for c in budgets)),
        rows=[
            *(
                (f"{n:,.0f} ({label})", *(mean_text(table[label, c]) for c in budgets))
                for n, label in zip(sizes, labels, strict=True)
            ),
            ("minimum at", *(f"{n:,.0f}" for n in best)),
        ],
        charts=[
            Chart(
                "Curves of equal FLOPs",
                "parameters",
                "bits per byte",
                [
                    Curve(
                        f"{c} FLOPs",
                        [
                            curve_point(n, list(table[label, c].values()))
                            for n, label in zip(sizes, labels, strict=True)
                        ],
                    )
                    for c in budgets
                ],
                log_x=True,
            )
        ],
    )


paper = Paper(
    "The best size of a model grows as the square root of the compute",
    "J. Hoffmann et al., Training Compute-Optimal Large Language Models, arXiv:2203.15556, 2022",
    judge,
    sweeps=("sweep", "rates"),
    quick=("quick",),
)
