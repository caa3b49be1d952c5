"""Pages beside the report with everything that a stage sampled, from its trajectory files: rollouts/STAGE/0001.html, ….

They are plain pages without a script, so that they open from a folder. The report links to them; `lm report RUN --rollouts
FIRST-LAST` writes those of these steps alone, all of them however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.experiment import UserError
from lm.stored import write_atomic
from lm.train.run_files import Run

Line = dict[str, Any]
COLUMNS = ["group", "messages", "rewards", "reward", "advantage", "trained", "finish"]
PAGE_CHARACTERS = 300_000
STAGE_CHARACTERS = 6_000_000  # of a stage's pages, unless steps are asked for


@dataclass(frozen=True)
class TrajectoryGroup:
    """The trajectories of one prompt at a step; `number` is its place in the step, from 1."""

    step: int
    number: int
    trajectories: list[Line]

    @property
    def prompt(self) -> list[Line]:
        """The turns before the model's first."""
        return [turn for turn in self.trajectories[0]["messages"] if turn["author"] == "prompt"]

    @property
    def mean(self) -> float:
        """The mean reward."""
        return sum(one["reward"] for one in self.trajectories) / len(self.trajectories)

    @property
    def characters(self) -> int:
        """About how long the group is on a page."""
        return sum(200 + sum(len(turn["content"]) for turn in one["messages"]) for one in self.trajectories)


@dataclass(frozen=True)
class Page:
    """A page of groups: the steps from `first` to `last`, at `href` from the report."""

    href: str
    first: int
    last: int


@dataclass(frozen=True)
class StagePages:
    """The pages of a stage, and how many of the steps with a file they show."""

    stage: str
    pages: list[Page]
    shown: int
    kept: int
    missing: list[int]


def write_rollout_pages(run: Run, fill: Callable[..., str], steps: range | None = None) -> list[StagePages]:
    """Write the pages of every stage with trajectory files, and remove others; `fill` makes a page of template and values.

    Args:
        steps: those shown, all of them; None: as many as fit in STAGE_CHARACTERS, evenly spread, the last among them.

    Raises:
        UserError: a trajectory file is damaged or missing, or none is of the steps asked for.
    """
    for stage in run.stages:
        if (run.folder / "stages" / stage.name / "trajectories").exists():
            from lm.train.trajectory_files import check_kept  # pyarrow, which a report without rollouts does not need

            check_kept(run.folder / "stages" / stage.name)
    kept = {
        stage.name: sorted((run.folder / "stages" / stage.name / "trajectories").glob("step-*.parquet"))
        for stage in run.stages
    }
    if steps is not None:
        _check_steps(run, [path for files in kept.values() for path in files], steps)
    return [_write_stage(run, stage, files, fill, steps) for stage, files in kept.items() if files]


def _check_steps(run: Run, files: list[Path], steps: range) -> None:
    from lm.train.trajectory_files import step_of  # pyarrow, which a report without rollouts does not need

    there = {step_of(path) for path in files}
    if there.isdisjoint(steps):
        known = f"those kept are from step {min(there)} to {max(there)}" if there else "none is kept"
        raise UserError(
            f"--rollouts {steps.start}-{steps.stop - 1}: {run.folder} has no rollout of these steps; {known}"
        )


def _write_stage(run: Run, stage: str, files: list[Path], fill: Callable[..., str], steps: range | None) -> StagePages:
    from lm.train.trajectory_files import step_of  # pyarrow, which a report without rollouts does not need

    folder = run.folder / "rollouts" / stage
    folder.mkdir(parents=True, exist_ok=True)
    chosen = _spread(files) if steps is None else [path for path in files if step_of(path) in steps]
    most = STAGE_CHARACTERS // max(1, len(chosen)) if steps is None else None
    pages, written = [], set[str]()
    parts = list(_pages(group for path in chosen for group in _groups(path, most)))
    for number, groups in enumerate(parts, start=1):
        name = f"{number:04}.html"
        page = Page(f"rollouts/{stage}/{name}", groups[0].step, groups[-1].step)
        html = fill("rollouts.html.j2", run=run, stage=stage, page=page, groups=groups, number=number, last=len(parts))
        write_atomic(folder / name, html.encode())
        pages.append(page)
        written.add(name)
    for path in folder.iterdir():
        if path.name not in written and path.suffix in (".html", ".tmp"):
            path.unlink()
    there = {step_of(path) for path in files}
    missing = sorted(set(range(min(there), max(there))) - there)
    return StagePages(stage, pages, len(chosen), len(files), missing)


def _spread(files: list[Path]) -> list[Path]:
    """Files evenly spread over all, the last among them, so that their texts are about STAGE_CHARACTERS at the most."""
    characters = sum(group.characters for group in _groups(files[-1], None))
    every = -(-characters * len(files) // STAGE_CHARACTERS)
    return files[::-1][:: max(1, every)][::-1]


def _groups(path: Path, most: int | None) -> Iterator[TrajectoryGroup]:
    """The groups of a step, from the first, until they have more than `most` characters."""
    from lm.train.trajectory_files import read_trajectories, step_of

    groups: dict[int, list[Line]] = {}
    for row in read_trajectories(path, COLUMNS):
        groups.setdefault(row["group"], []).append(row)
    used = 0
    for number, rows in groups.items():
        group = TrajectoryGroup(step_of(path), number + 1, rows)
        if most is not None and used and used + group.characters > most:
            return
        used += group.characters
        yield group


def _pages(groups: Iterator[TrajectoryGroup]) -> Iterator[list[TrajectoryGroup]]:
    """Neighbouring groups, a page each."""
    page: list[TrajectoryGroup] = []
    used = 0
    for group in groups:
        if page and used + group.characters > PAGE_CHARACTERS:
            yield page
            page, used = [], 0
        page.append(group)
        used += group.characters
    if page:
        yield page
