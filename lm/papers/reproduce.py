"""Runs the sweeps of a paper's claim, judges it, and stores the result as JSON and in the paper's Markdown page."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

from lm.experiment import UserError
from lm.files import defined_in, file_of
from lm.papers.paper import Evidence, Finding, Paper, paper_file
from lm.stored import write_json_atomic
from lm.sweep.results import Result, read_sweep
from lm.sweep.run import run_sweep
from lm.sweep.sweep import Sweep
from lm.train.metrics import json_value
from lm.train.provenance import environment
from lm.train.run_folder import RunFolder

BEGIN, END = "<!-- result: written by `lm reproduce` -->", "<!-- end of the result -->"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The finding about a paper's claim, with the provenance of its runs."""

    name: str
    paper: Paper
    finding: Finding
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A plain value for JSON; numbers that are not finite become null."""
        found = {"name": self.name, "title": self.paper.title, "source": self.paper.source}
        return json_value(found | dataclasses.asdict(self.finding) | {"provenance": self.provenance})


def reproduce(
    name: str, paper: Paper, folder: Path, quick: bool = False, workers: int = 1, cache: Path | None = None
) -> Outcome:
    """Run a paper's unfinished sweeps, in folders `FOLDER-SWEEP`, and judge the claim.

    Raises:
        UserError: a sweep is invalid, or a run failed for another reason than divergence.
        WorkerStopped: a signal arrived; running trials have saved.
    """
    began = time.monotonic()
    file = file_of(paper_file(name))
    runs: dict[str, list[Result]] = {}
    for value in paper.quick if quick else paper.sweeps:
        place = folder.with_name(f"{folder.name}-{value}")
        run_sweep(defined_in(file, value, Sweep), f"{file}:{value}", place, workers, cache=cache)
        runs[value] = read_sweep(place)
        _check(runs[value], place)
    finding = paper.judge(Evidence(runs, quick))
    return Outcome(name, paper, finding, provenance(runs, time.monotonic() - began))


def _check(results: list[Result], folder: Path) -> None:
    """Raise UserError if a run failed for another reason than divergence (which is a result), or none finished."""
    for result in results:
        if result.failed and not result.diverged:
            raise UserError(f"{result.folder}: {result.failed}; fix it, then run lm sweep … --retry-failed ({folder})")
    if not any(result.finished for result in results):
        raise UserError(f"{folder}: no run has finished")


def provenance(runs: dict[str, list[Result]], seconds: float) -> dict[str, Any]:
    """Provenance of a claim's runs: commits, machines, versions, seeds and run time, from their environment.json."""
    everything = [result for found in runs.values() for result in found]
    sessions = [
        session for result in everything for session in RunFolder(result.folder).read_environment().get("runs", ())
    ] or [environment({})]
    git = [session["git"] or {} for session in sessions]
    return {
        "commits": sorted({str(one.get("commit")) for one in git}),
        "dirty": any(changed(one) for one in git),
        "cpu": sorted({session["cpu"] for session in sessions}),
        "cores": sorted({session["cores"] for session in sessions}),
        "devices": sorted({session["devices"]["kind"] for session in sessions}),
        "versions": sessions[-1]["versions"],
        "date": max(session["started"] for session in sessions),
        "seeds": sorted({result.seed for result in everything}),
        "runs": len(everything),
        "failed": sum(bool(result.failed) for result in everything),
        "run_seconds": round(sum(_seconds(result) for result in everything)) or round(seconds),
        "experiments": sorted(result.folder.name for result in everything),
    }


def changed(git: dict[str, Any]) -> bool:
    """Whether a session had uncommitted changes of code, not only of pages and results that earlier claims wrote."""
    files = [*re.findall(r"^diff --git a/.* b/(.*)$", git.get("diff", ""), re.MULTILINE), *git.get("untracked", ())]
    told = [Path(file) for file in files]
    no_code = all(path.suffix == ".md" or "results" in path.parts for path in told)
    return bool(git.get("dirty")) and (bool(git.get("diff_cut")) or not no_code)


def _seconds(result: Result) -> float:
    return sum(stage.summary["seconds"] for stage in result.stages.values() if stage.summary)


def write(outcome: Outcome, beside: Path) -> list[Path]:
    """Write the outcome to results/NAME.json, and its text to NAME.md between two marks; returns both paths.

    Raises:
        UserError: the page lacks the marks.
    """
    data, page = beside / "results" / f"{outcome.name}.json", beside / f"{outcome.name}.md"
    data.parent.mkdir(exist_ok=True)
    write_json_atomic(data, outcome.to_dict())
    text = page.read_text("utf-8") if page.is_file() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{page} has no place for the result: the lines {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{markdown(outcome)}\n{END}{after}", "utf-8")
    return [data, page]


def markdown(outcome: Outcome) -> str:
    """The outcome in Markdown."""
    finding, where = outcome.finding, outcome.provenance
    lines = [f"**Verdict: {finding.verdict}.** {finding.reason}", ""]
    if finding.rows:
        lines += [_row(finding.columns), _row(["---"] * len(finding.columns)), *map(_row, finding.rows), ""]
    return "\n".join([*lines, source_line(where)])


def source_line(where: dict[str, Any]) -> str:
    """The provenance as a line of text."""
    minutes = where["run_seconds"] / 60
    runs = f"{where['runs']} runs of {minutes:.0f} minutes in all, " if where["runs"] else ""
    seeds = f"seeds {', '.join(map(str, where['seeds']))}, " if where["seeds"] else ""
    commits = ", ".join(commit[:10] for commit in where["commits"]) + (" with changes" if where["dirty"] else "")
    return f"{runs}{seeds}commit {commits}, {', '.join(where['cpu'])}, jax {where['versions']['jax']}, {where['date'][:10]}."


def _row(cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
