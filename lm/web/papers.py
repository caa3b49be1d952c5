"""papers.html: every claim with its verdict, numbers and charts, from the stored results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import markdown_it

from lm.papers.kept import Claim, claims
from lm.papers.reproduce import source_line
from lm.sweep.statistics import Curve, Point
from lm.web.bands import bands, finite
from lm.web.charts import SvgChart
from lm.web.report import fill, write_page

TONES = {"holds": "better", "does not hold": "worse"}
PARTS = ("Claim.", "The same.", "Scaled down.", "Refuted if")


def write_papers(home: Path, path: Path) -> Path:
    """Write the page from the claims and results in `home`; returns its path."""
    return write_page(path, render(claims(home), home))


def render(found: list[Claim], home: Path) -> str:
    """Render the page as HTML: claims with a result first, then those without."""
    ran = [claim for claim in found if claim.result]
    return fill(
        "papers.html.j2",
        ran=[
            (claim, paragraphs(home / f"{claim.name}.md"), _charts(claim), source_line(_source(claim))) for claim in ran
        ],
        waiting=[claim for claim in found if not claim.result],
        tones=TONES,
        counts={
            verdict: sum(claim.verdict == verdict for claim in ran)
            for verdict in ("holds", "does not hold", "undecided")
        },
    )


def _source(claim: Claim) -> dict[str, Any]:
    assert claim.result is not None
    return claim.result["provenance"]


def paragraphs(page: Path) -> list[str]:
    """The paragraphs of a claim's page before the result, as HTML: claim, what is the same, what is scaled down, what refutes it."""
    text = page.read_text("utf-8").split("## Result")[0]
    kept = [part for part in text.split("\n\n") if part.startswith(tuple(f"**{name}" for name in PARTS))]
    markdown = markdown_it.MarkdownIt("commonmark", {"html": False})
    return [markdown.render(part) for part in kept]


def _charts(claim: Claim) -> list[SvgChart]:
    assert claim.result is not None
    drawn = []
    for number, chart in enumerate(claim.result["charts"]):
        curves = [Curve(curve["label"], _points(curve["points"])) for curve in chart["curves"]]
        curves = [curve for curve in curves if curve.points]
        if curves:
            options = {name: chart[name] for name in ("x", "y", "log_x", "log_y")}
            drawn.append(bands(f"{chart['title']}", curves, salt=f"{claim.name} {number}", **options))
    return drawn


def _points(points: list[list[float | None]]) -> list[Point]:
    return finite([tuple(math.nan if value is None else value for value in point) for point in points])  # type: ignore[misc]
