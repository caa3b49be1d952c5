"""Muon against AdamW with the same number of learning rates tried (Jordan et al. 2024)."""

from tiny_text import experiment as base
from tiny_text import quick as small

from lm.papers.paper import Chart, Evidence, Finding, Paper, by_seed, difference, mean_text, sign_verdict, where
from lm.sweep.statistics import Curve, curve_point, paired
from lm.sweep.sweep import Sweep

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
RULES = ("adamw", "muon")
AXES = {"pretrain.optimizer.kind": RULES, "pretrain.optimizer.peak_lr": RATES}

sweep = Sweep("muon", base, AXES, seeds=(0, 1, 2, 3))
quick = Sweep(
    "muon_quick", small, {"pretrain.optimizer.kind": RULES, "pretrain.optimizer.peak_lr": (1e-3,)}, seeds=(0, 1)
)


def tuned(table: dict[str, dict[int, float]]) -> tuple[dict[int, float], dict[int, str]]:
    """(values, rates): each seed's result at the learning rate that is best for the other seeds (leave-one-out)."""
    seeds = sorted(set.intersection(*(set(found) for found in table.values())))
    chosen = {
        seed: min(table, key=lambda rate, s=seed: sum(v for other, v in table[rate].items() if other != s))
        for seed in seeds
    }
    return {seed: table[rate][seed] for seed, rate in chosen.items()}, chosen


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    rates = sorted({r.settings["pretrain.optimizer.peak_lr"] for r in runs}, key=float)

    def bits(rule: str, rate: str) -> dict[int, float]:
        return by_seed(where(runs, kind=rule, peak_lr=rate), lambda r: r.final("docs", "bits_per_byte"))

    table = {rule: {rate: bits(rule, rate) for rate in rates} for rule in RULES}
    best = {rule: tuned(table[rule]) for rule in RULES}
    gain = paired(best["muon"][0], best["adamw"][0])
    edges = [rule for rule in RULES if set(best[rule][1].values()) & {rates[0], rates[-1]}] if len(rates) > 1 else []
    edge = f" The best rate of {' and '.join(edges)} is at the edge of the grid." if edges else ""
    return Finding(
        verdict=sign_verdict(gain, -1),
        reason=f"At the rate that the other seeds choose, bits per byte held out: Muon "
        f"{mean_text(best['muon'][0])}, AdamW "
        f"{mean_text(best['adamw'][0])}; difference {difference(gain)}.{edge}",
        columns=("peak learning rate", *RULES),
        rows=[(rate, *(mean_text(table[rule][rate]) for rule in RULES)) for rate in rates],
        charts=[
            Chart(
                "Held out, by learning rate",
                "peak learning rate",
                "bits per byte",
                [
                    Curve(rule, [curve_point(float(rate), list(table[rule][rate].values())) for rate in rates])
                    for rule in RULES
                ],
                log_x=True,
            )
        ],
    )


paper = Paper(
    "Muon ends lower than AdamW after the same steps, with as many learning rates tried",
    "K. Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; J. Liu et al., arXiv:2502.16982, 2025",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
