"""A page with the results of several models on the same tasks, and all their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm.web.report import fill, write_page

if TYPE_CHECKING:
    from lm.train.playground import Playground


def write_playground_page(found: Playground, path: Path) -> Path:
    """Write the page; returns its path."""
    return write_page(path, render(found))


def render(found: Playground) -> str:
    """Render the page as HTML."""
    tasks = [
        (answers[0][0].prompt, [(one.name, given) for one, given in zip(found.results, answers, strict=True)])
        for answers in zip(*(one.answers for one in found.results), strict=True)
    ]
    return fill(
        "playground.html.j2",
        found=found,
        sizes=list(found.results[0].rates),
        tasks=tasks,
        percent=lambda value: f"{100 * value:.1f} %",
    )
