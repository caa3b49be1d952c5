"""report.html: the self-contained report of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import markupsafe

from lm import __version__
from lm.experiment import OBJECTIVES
from lm.stored import write_atomic
from lm.train.run_files import Run, check_sessions, read_run
from lm.web import charts, costs, story, watch
from lm.web.data_counts import data_counts
from lm.web.numbers import count, duration, plain, signed
from lm.web.rollout_pages import StagePages, write_rollout_pages
from lm.web.templates import templates
from lm.web.text import beginning, shown, visible

HERE = Path(__file__).parent


def write_report(run_dir: Path, rollout_steps: range | None = None) -> Path:
    """Write `report.html` of a run folder, finished or not, from the folder's files alone; returns its path.

    Also writes the pages of rollouts/, of the given steps only, if any are given (`write_rollout_pages`).

    Raises:
        lm.experiment.UserError: the folder is not a run, or one of its files is broken (names the line).
    """
    run = read_run(run_dir)
    check_sessions(run)
    page = render(run, write_rollout_pages(run, fill, rollout_steps))
    return write_page(run_dir / "report.html", page)


def render(run: Run, rollout_pages: Sequence[StagePages] = ()) -> str:
    """Render the page of a run as HTML."""
    return fill(
        "report.html.j2",
        run=run,
        sentence=_sentence(run),
        unfinished=_unfinished(run),
        headlines=story.headlines(run),
        columns=story.columns(run),
        models=[story.initial(run), *(stage.name for stage in story.policy_stages(run))],
        lessons=[(stage.name, OBJECTIVES[stage.kind].caption) for stage in run.stages],
        prompts=story.prompt_table(run),
        heldout=story.heldout_table(run),
        benchmarks=story.benchmark_table(run),
        curves=[
            (stage, found)
            for index, stage in enumerate(run.stages)
            if (found := charts.stage_charts(stage, story.mixture(run, index)))
        ],
        data=data_counts(run),
        watches=watch.watches(run),
        pairs=story.preference_pairs(run),
        choices=story.choices,
        rollouts=story.rollouts(run),
        rollout_pages=rollout_pages,
        examples=story.heldout_examples(run),
        knobs=story.knob_table(run),
        costs=costs.costs(run),
        cost_names=[*(label for label, _ in costs.COSTS.values()), "tokens per second"],
        goodput=costs.goodput(run),
        environment=story.environment_table(run),
    )


def fill(template: str, **values: Any) -> str:
    """Render a template of this folder: every value is escaped except drawings and the style sheet."""
    page = templates(HERE)
    page.filters |= {
        "visible": visible,
        "shown": shown,
        "beginning": beginning,
        "plain": plain,
        "signed": _signed,
        "leaf": _leaf,
    }
    css = markupsafe.Markup((HERE / "report.css").read_text("utf-8"))
    return page.get_template(template).render(version=__version__, css=css, **values)


def write_page(path: Path, page: str) -> Path:
    """Write a page atomically and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomic(path, page.encode())


def _sentence(run: Run) -> str:
    """One sentence: the model's size, its stages, time and machine."""
    size, seconds = story.num_params(run), story.total_seconds(run)
    names = [stage.name for stage in run.stages]
    through = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    model = f"A language model with {count(size)} parameters" if size else "A language model"
    machine = story.machine(run)
    taken = f" in {duration(seconds)}" if seconds and not _unfinished(run) else ""
    taken += f" on {machine}" if taken and machine else ""
    init = run.experiment.get("init")
    return f"{model}, trained from {f'the open weights {init}' if init else 'random weights'} by {through}{taken}."


def _unfinished(run: Run) -> str:
    """Progress of an unfinished run; empty for a finished one."""
    parts = []
    for stage in run.stages:
        if not stage.summary and stage.metrics:
            parts.append(f"{stage.name} is at step {stage.steps_done:,} of {stage.steps:,}")
        elif not stage.summary:
            parts.append(f"{stage.name} has not begun")
    return ", ".join(parts)


def _signed(value: float) -> str:
    return signed(f"{value:+.2f}") if math.isfinite(value) else "not finite"


def _leaf(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
