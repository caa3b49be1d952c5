"""Gold reward against KL when optimising proxy reward models of several sizes by best-of-n and PPO (Gao et al. 2023, arXiv:2210.10760)."""

import dataclasses
import math

import numpy as np
from small_reasoner import CHAINS, SHORT
from small_reasoner import experiment as reasoner
from small_reasoner import quick as small

from lm.experiment import PPO, Collect, Eval, Experiment, Optimizer, RewardModel, Source, Stage
from lm.papers.paper import Chart, Evidence, Finding, Paper, by_seed, difference, mean_text, where
from lm.sweep.results import Result
from lm.sweep.statistics import Curve, curve_points, estimate, paired
from lm.sweep.sweep import Sweep

LAYERS = (1, 2, 4)  # of the proxy; the policy has as many as the largest
SIZES = {f"{count} of {LAYERS[-1]} layers": {"reward.objective.layers": count} for count in LAYERS}


def chosen_by_a_proxy(e: Experiment) -> Experiment:
    """Stages: the program judges answers of the SFT model, a proxy reward model is trained on them, PPO optimises the proxy."""
    sft = e.stages[0]
    after = {"seq_len": sft.seq_len, "save_every": 200}
    collect = Stage("collect", Collect(verifier="answer", answers=4), (CHAINS,), steps=96, batch_size=32, **after)
    reward = Stage(
        "reward",
        RewardModel(center_coef=0.01),
        (Source("collected:collect", holdout=0.1),),
        steps=500,
        batch_size=16,
        optimizer=Optimizer(peak_lr=3e-4, warmup_steps=15),
        **after,
    )
    ppo = Stage(
        "ppo",
        PPO(reward_models=("reward",), verifier="answer", critic="head", kl_coef=0.0, lam=1.0, epochs=2, minibatches=2),
        (CHAINS,),
        start="sft",
        steps=100,
        batch_size=64,
        optimizer=Optimizer(peak_lr=2e-5, warmup_steps=5, schedule="constant", weight_decay=0.0),
        eval_every=5,
        evals=("gold",),
        **after,
    )
    sampled = {"verifier": "answer", "max_new_tokens": 64, "temperature": 1.0}
    evals = (
        Eval("gold", CHAINS, count=256, **sampled),
        Eval("best", CHAINS, "best_of_n", count=128, best_of=16, **sampled),
    )
    return dataclasses.replace(e, name="overoptimisation", stages=(sft, collect, reward, ppo), evals=evals)


def deep(e: Experiment, width: int) -> Experiment:
    """A model of this width with as many layers as the largest proxy."""
    model = dataclasses.replace(e.model, num_layers=LAYERS[-1], embed_dim=width, head_dim=16, mlp_dim=11 * width // 4)
    return dataclasses.replace(e, model=model)


def little(e: Experiment) -> Experiment:
    """A quick variant of a few steps on generated pairs, since all answers of an untrained model are wrong."""
    pairs = (Source("gen:preferences", holdout=0.1),)
    kept = (
        dataclasses.replace(s, steps=4, batch_size=8, optimizer=dataclasses.replace(s.optimizer, warmup_steps=2))
        for s in e.stages
        if s.name != "collect"
    )
    stages = tuple(dataclasses.replace(s, sources=pairs) if s.name == "reward" else s for s in kept)
    last = stages[-1]
    ppo = dataclasses.replace(last, eval_every=2, objective=dataclasses.replace(last.objective, max_new_tokens=SHORT))
    evals = tuple(dataclasses.replace(item, count=8, best_of=4, max_new_tokens=SHORT) for item in e.evals)
    return dataclasses.replace(e, stages=(*stages[:-1], ppo), evals=evals)


base = chosen_by_a_proxy(deep(reasoner, 64))
sweep = Sweep("overoptimisation", base, {"proxy": SIZES}, seeds=(0, 1, 2))
quick = Sweep(
    "overoptimisation_quick", little(chosen_by_a_proxy(deep(small, 32))), {"proxy": dict([next(iter(SIZES.items()))])}
)


def by_ppo(result: Result) -> list[tuple[float, float]]:
    """(√KL, gold reward) of every measurement of PPO, from its start."""
    lines = [line for line in result.stages["ppo"].evals if line["eval"] == "gold" and line.get("kl") is not None]
    return [(math.sqrt(max(0.0, line["kl"])), line["reward"]) for line in lines]


def by_best_of_n(result: Result) -> list[tuple[float, float]]:
    """(√KL, gold reward) of the best of 1, 2, 4, … answers."""
    (line,) = (line for line in result.stages["reward"].evals if line["eval"] == "best")
    return [(math.sqrt(kl), gold) for kl, gold in zip(line["kl_bound"], line["reward"], strict=True)]


def fitted(points: list[tuple[float, float]], bend) -> tuple[float, float]:
    """(α, β) of gold - gold at the start = d (α - β bend(d)), by least squares; the paper's equations 1 and 2."""
    (_, start), *others = points
    moved = [point for point in others if point[0] > 0]
    if len(moved) < 2:
        return math.nan, math.nan
    d, gold = np.array(moved).T
    (alpha, minus_beta), *_ = np.linalg.lstsq(np.stack([d, d * bend(d)], axis=1), gold - start, rcond=None)
    return float(alpha), float(-minus_beta)


GOLD = ("gold at PPO's end", "gold of the best of most")
RULES = {"PPO": (by_ppo, np.log), "best of n": (by_best_of_n, lambda d: d)}


def judge(evidence: Evidence) -> Finding:
    of = {size: found for size in SIZES if (found := where(evidence.results, proxy=size))}
    fits = {
        (rule, size): by_seed_pairs(of[size], lambda r, p=points, b=bend: fitted(p(r), b))
        for rule, (points, bend) in RULES.items()
        for size in of
    }
    end = {size: by_seed(found, lambda r: by_ppo(r)[-1][1]) for size, found in of.items()}
    middle = {size: by_seed(found, lambda r: by_ppo(r)[len(by_ppo(r)) // 2][1]) for size, found in of.items()}
    smallest, largest = next(iter(of)), list(of)[-1]
    seeds = sorted(set.intersection(*(set(one) for one in end.values())))
    bends = estimate([float(np.mean([fits["PPO", size][seed][1] for size in of])) for seed in seeds])
    larger, later = paired(end[largest], end[smallest]), paired(end[smallest], middle[smallest])
    most = {size: by_seed(found, lambda r: by_best_of_n(r)[-1][1]) for size, found in of.items()}
    low, high = bends.mean - bends.half, bends.mean + bends.half
    refuted = high < 0 or larger.high < 0
    return Finding(
        verdict="holds" if low > 0 and larger.low > 0 else "does not hold" if refuted else "undecided",
        reason=f"β of PPO's curves, mean over the proxies: {bends.mean:.3f} [{low:.3f}, {high:.3f}]; gold reward at PPO's end, "
        f"largest proxy less smallest: {difference(larger)}; with the smallest, end less middle: {difference(later)}. "
        f"The best of the most answers, largest proxy less smallest (not part of the verdict): {difference(paired(most[largest], most[smallest]))}.",
        columns=("proxy", *(f"{letter} of {rule}" for rule in RULES for letter in "αβ"), *GOLD),
        rows=[
            (
                size,
                *(
                    mean_text({seed: pair[i] for seed, pair in fits[rule, size].items()})
                    for rule in RULES
                    for i in (0, 1)
                ),
                mean_text(end[size]),
                mean_text(most[size]),
            )
            for size in of
        ],
        charts=[chart for rule in RULES for chart in charts(rule, of, fits)],
    )


def charts(rule: str, of: dict[str, list[Result]], fits: dict) -> list[Chart]:
    """Charts of the measurements with the curves of the mean α and β."""
    points, bend = RULES[rule]
    measured = {size: along([points(r) for r in found if r.finished]) for size, found in of.items()}
    lines = {
        size: drawn_fit(curve, np.mean(list(fits[rule, size].values()), axis=0), bend)
        for size, curve in measured.items()
    }
    return [
        Chart(
            f"Gold reward, {rule}, by the proxy's size{told}",
            "√KL, nats an answer",
            "gold reward",
            [Curve(size, curve) for size, curve in curves.items()],
        )
        for told, curves in (("", measured), (", as fitted", lines))
    ]


def drawn_fit(measured: list[tuple], both: np.ndarray, bend) -> list[tuple[float, float, float, float]]:
    """Points of start + d (α - β bend(d)), from the first measurement to the last."""
    alpha, beta = both
    start, far = measured[0][1], max(point[0] for point in measured)
    if not np.isfinite(both).all() or far <= 0:
        return []
    places = np.linspace(far / 40, far, 40)
    gold = start + places * (alpha - beta * bend(places))
    return [(float(d), *[float(value)] * 3) for d, value in zip(places, gold, strict=True)]


def by_seed_pairs(results: list[Result], pair) -> dict[int, tuple[float, float]]:
    return {result.seed: pair(result) for result in results if result.finished}


def along(runs: list[list[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """Points of mean √KL and mean gold reward over seeds at each measurement."""
    places = [float(np.mean([d for d, _ in same])) for same in zip(*runs, strict=True)]
    return curve_points([dict(zip(places, (gold for _, gold in run), strict=True)) for run in runs])


paper = Paper(
    "Following a proxy bends gold reward down as KL grows, and less so the larger the proxy",
    "L. Gao, J. Schulman, J. Hilton, Scaling Laws for Reward Model Overoptimization, arXiv:2210.10760, 2023",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
