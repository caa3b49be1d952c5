"""frontier.html and .png: gold reward over KL for several seeds of one experiment, with the peak of each stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm import experiment as experiments
from lm.experiment import UserError
from lm.sweep.statistics import Estimate, estimate
from lm.train.run_files import Line, Run, finite, read_run
from lm.web import frontier_charts
from lm.web.report import fill, write_page
from lm.web.watch import reward_evals

# Fields that may differ between the runs: seed, devices, and paths.
FREE = ("name", "seed", "mesh", "path", "reward_models", "judge")


@dataclass(frozen=True)
class Point:
    """One step of a stage, or one n of best-of-n (`label`): KL in nats per answer, gold reward, proxy score."""

    label: str
    kl: Estimate
    reward: Estimate
    score: Estimate | None


@dataclass(frozen=True)
class FrontierCurve:
    """A curve: points in order of steps (or n); `by_run`: each run's (KL, reward) by point."""

    name: str
    points: list[Point]
    by_run: list[dict[int, tuple[float, float]]]
    joined: bool

    @property
    def seeds(self) -> list[list[tuple[float, float]]]:
        """Each run's own (KL, reward) points, in order."""
        runs = sorted({run for found in self.by_run for run in found})
        return [[found[run] for found in self.by_run if run in found] for run in runs]

    @property
    def peak(self) -> int:
        return max(range(len(self.points)), key=lambda i: self.points[i].reward.mean)

    def below_peak(self, place: int) -> Estimate:
        """Mean difference, within seeds, of the peak's reward and the reward of point `place`."""
        best, other = self.by_run[self.peak], self.by_run[place]
        return estimate([best[run][1] - other[run][1] for run in best if run in other])


@dataclass(frozen=True)
class Panel:
    """Curves of evals with the same verifier and prompts, whose rewards are comparable."""

    verifier: str
    path: str
    curves: list[FrontierCurve]


def write_frontier(run_dirs: Sequence[Path], path: Path) -> tuple[Path, Path]:
    """Write the page to `path` and the drawing beside it as .png; returns both paths.

    Raises:
        UserError: a folder is not a run, the runs are not seeds of one experiment, or none measured KL.
    """
    runs = [read_run(folder) for folder in run_dirs]
    check_seeds(runs)
    panels = frontier(runs)
    if not any(curve.joined for panel in panels for curve in panel.curves):
        raise UserError(
            f"{', '.join(map(str, run_dirs))}: no held-out reward with its KL; add an eval of metric reward at temperature 1, "
            "and name it in the evals of a preference stage with eval_every"
        )
    page, png = write_page(path, render(runs, panels)), path.with_suffix(".png")
    frontier_charts.save_png(panels, png)
    return page, png


def check_seeds(runs: list[Run]) -> None:
    """Raise UserError unless the runs are one experiment with different seeds, measured on the same data."""
    first, *rest = runs
    for other in rest:
        for name, ours, theirs in zip(_eval_names(first), _eval_data(first), _eval_data(other), strict=False):
            if ours and theirs and ours != theirs:
                raise UserError(
                    f"{first.folder} and {other.folder} measured {name} on other data: its source had SHA-256 {ours:.16} and "
                    f"{theirs:.16}"
                )
    for other in rest:
        for name, old, new in experiments.diff(first.experiment, other.experiment):
            if not set(name.split(".")) & set(FREE):
                raise UserError(
                    f"{first.folder} and {other.folder} are not seeds of one experiment: {name} is {old!r} and {new!r}"
                )
    by_seed: dict[Any, Run] = {}
    for run in runs:
        seed = run.experiment["seed"]
        if seed in by_seed:
            raise UserError(
                f"{by_seed[seed].folder} and {run.folder} both have seed {seed}: give each seed once, since "
                "an interval over equal seeds is meaningless"
            )
        by_seed[seed] = run


def _eval_names(run: Run) -> list[str]:
    return [item["name"] for item in run.experiment["evals"]]


def _eval_data(run: Run) -> list[str | None]:
    """The fingerprint of each eval's data in the last session; None where it is unknown."""
    known = run.sessions[-1].get("data_fingerprint", {}) if run.sessions else {}
    return [known.get(item["source"]["path"]) for item in run.experiment["evals"]]


def frontier(runs: list[Run]) -> list[Panel]:
    """The panels: one for each measured verifier and source of prompts, in the order of the evals."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for item in runs[0].experiment["evals"]:
        kinds.setdefault((item["verifier"], item["source"]["path"]), []).append(item["name"])
    panels = []
    for (verifier, path), names in kinds.items():
        stages = {name: stage_curves(runs, name) for name in names}
        several = sum(map(bool, stages.values())) > 1
        found = [replace(one, name=f"{one.name}, {name}") if several else one for name in names for one in stages[name]]
        found += [curve for name in names for curve in best_of_curves(runs, name)]
        if found:
            panels.append(Panel(verifier, path, found))
    return panels


def stage_curves(runs: list[Run], name: str) -> list[FrontierCurve]:
    """A curve for each stage in which the eval measured KL at two or more steps."""
    curves = []
    for stages in zip(*(run.stages for run in runs), strict=True):
        by_step: dict[int, dict[int, Line]] = {}
        for run, stage in enumerate(stages):
            for line in finite(reward_evals(stage).get(name, []), "reward", "kl"):
                by_step.setdefault(line["step"], {})[run] = line
        if len(by_step) > 1:
            curves.append(_curve(stages[0].name, [(f"step {s:,}", by_step[s]) for s in sorted(by_step)], True))
    return curves


def best_of_curves(runs: list[Run], name: str) -> list[FrontierCurve]:
    """Best-of-n points for each stage that measured it with this eval, each at its upper bound of KL."""
    curves = []
    for stages in zip(*(run.stages for run in runs), strict=True):
        by_n: dict[int, dict[int, Line]] = {}
        for run, stage in enumerate(stages):
            for line in stage.evals:
                if line["eval"] == name and line["metric"] == "best_of_n":
                    for n, one in best_of(line):
                        by_n.setdefault(n, {})[run] = one
        if by_n:
            curves.append(
                _curve(f"best of n by {stages[0].name}", [(f"n = {n}", by_n[n]) for n in sorted(by_n)], False)
            )
    return curves


def best_of(line: Line) -> list[tuple[int, Line]]:
    """(n, KL, reward and score) from one measurement, where KL and reward are finite."""
    keys = {"kl": "kl_bound", "reward": "reward", "score": "score"}
    found = [
        (n, {to: line[key][i] for to, key in keys.items() if line.get(key) and line[key][i] is not None})
        for i, n in enumerate(line.get("best_of", []))
    ]
    return [(n, one) for n, one in found if finite([one], "kl", "reward")]


def _curve(name: str, points: list[tuple[str, dict[int, Line]]], joined: bool) -> FrontierCurve:
    return FrontierCurve(
        name,
        [_point(label, list(lines.values()), joined) for label, lines in points],
        [{run: (line["kl"], line["reward"]) for run, line in lines.items()} for _, lines in points],
        joined,
    )


def _point(label: str, lines: list[Line], measured_kl: bool) -> Point:
    kl = estimate([line["kl"] for line in lines])
    scores = [line["score"] for line in finite(lines, "score")]
    return Point(
        label,
        kl if measured_kl else Estimate(kl.mean, math.nan, kl.count),
        estimate([line["reward"] for line in lines]),
        estimate(scores) if scores else None,
    )


# ---- the page ----------------------------------------------------------------------------------------------------


def render(runs: list[Run], panels: list[Panel]) -> str:
    """Render the page as HTML."""
    return fill(
        "frontier.html.j2",
        name=runs[0].experiment["name"],
        names=[run.experiment["name"] for run in runs],
        seeds=[str(run.experiment["seed"]) for run in runs],
        free=differences(runs),
        panels=[(panel, frontier_charts.chart(panel), [ending(curve) for curve in panel.curves]) for panel in panels],
        told=frontier_charts.told,
        hundredths=frontier_charts.hundredths,
    )


def differences(runs: Iterable[Run]) -> list[str]:
    """Names of the fields, besides name and seed, that differ between the runs."""
    first, *rest = runs
    names = [name for other in rest for name, _, _ in experiments.diff(first.experiment, other.experiment)]
    return [name for name in dict.fromkeys(names) if name not in ("name", "seed")]


def ending(curve: FrontierCurve) -> str:
    """A sentence on a curve's peak and its end."""
    best, last = curve.points[curve.peak], curve.points[-1]
    far = f"{'' if curve.joined else 'at most '}{frontier_charts.hundredths(best.kl)} nats from the reference"
    rise = f", {_points(curve.below_peak(0))} points above {curve.points[0].label}" if curve.peak else ""
    where = f"is highest at {best.label}, {far}: {frontier_charts.told(best.reward)}{rise}"
    if best is last:
        return f"{where}, its last point."
    fall = curve.below_peak(-1)
    if math.isnan(fall.half):
        return f"{where}. At {last.label} it is {_points(fall)} points lower."
    sure = "" if abs(fall.mean) > fall.half else ", which is within seed noise"
    return f"{where}. From there to {last.label} it falls by {_points(fall)} points{sure}. Differences are within each seed."


def _points(change: Estimate) -> str:
    """A reward difference in percentage points, with its interval if any: 20.0 ± 6.5."""
    half = "" if math.isnan(change.half) else f" ± {100 * change.half:.1f}"
    return f"{100 * change.mean:.1f}{half}"
