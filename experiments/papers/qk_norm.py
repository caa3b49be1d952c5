"""Learning-rate sensitivity with and without QK-norm (Wortsman et al. 2023, arXiv:2309.14322)."""

from tiny_text import experiment as base
from tiny_text import quick as small

from lm.papers.paper import Chart, Evidence, Finding, Paper, difference, mean_text, sign_verdict, where
from lm.sweep.statistics import Curve, curve_point, paired
from lm.sweep.sweep import Sweep

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
NORM = {"QK-norm": None, "no QK-norm": {"model.qk_norm": False}}
AXES = {"norm": NORM, "pretrain.optimizer.peak_lr": RATES}

sweep = Sweep("qk_norm", base, AXES, seeds=(0, 1, 2))
quick = Sweep("qk_norm_quick", small, {"norm": NORM, "pretrain.optimizer.peak_lr": (1e-3, 1e-1)})


def bits(result) -> float:
    """Held-out bits per byte; for a diverged run those of the initial model, as in the paper."""
    if result.diverged:
        return result.stages["pretrain"].evals[0]["bits_per_byte"]
    return result.final("docs", "bits_per_byte")


def sensitivity(by_rate: dict[str, float]) -> float:
    """Learning-rate sensitivity: mean difference to the best rate's result over all rates (the paper's equation 1)."""
    return sum(by_rate.values()) / len(by_rate) - min(by_rate.values())


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    rates = sorted({r.settings["pretrain.optimizer.peak_lr"] for r in runs}, key=float)
    table = {
        (norm, rate): {r.seed: bits(r) for r in where(runs, norm=norm, peak_lr=rate)} for norm in NORM for rate in rates
    }
    seeds = sorted(set.intersection(*(set(found) for found in table.values())))
    of = {n: {s: sensitivity({rate: table[n, rate][s] for rate in rates}) for s in seeds} for n in NORM}
    gain = paired(of["QK-norm"], of["no QK-norm"])
    return Finding(
        verdict=sign_verdict(gain, -1),
        reason=f"Sensitivity (mean excess over the best rate, bits a byte, {rates[0]} to {rates[-1]}): with "
        f"{mean_text(of['QK-norm'])}, without "
        f"{mean_text(of['no QK-norm'])}; difference {difference(gain)}.",
        columns=("peak learning rate", *NORM),
        rows=[(rate, *(mean_text(table[n, rate]) for n in NORM)) for rate in rates],
        charts=[
            Chart(
                "Held out, by learning rate",
                "peak learning rate",
                "bits per byte",
                [Curve(n, [curve_point(float(rate), list(table[n, rate].values())) for rate in rates]) for n in NORM],
                log_x=True,
            )
        ],
    )


paper = Paper(
    "QK-norm makes training less sensitive to the learning rate",
    "M. Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, arXiv:2309.14322, 2023",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
