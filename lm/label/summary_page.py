"""The summary page."""

from __future__ import annotations

import math
from pathlib import Path

from lm.label.statistics import Share
from lm.label.summary import Summary
from lm.web.numbers import duration, percent, signed
from lm.web.templates import templates
from lm.web.text import visible

HERE = Path(__file__).parent


def render_summary(summary: Summary) -> str:
    """Render the summary as HTML; every value is escaped."""
    page = templates(HERE)
    page.filters |= {"visible": visible, "share": _share, "figure": _figure, "percent": percent, "duration": _duration}
    return page.get_template("summary.html.j2").render(summary=summary)


def _share(value: Share) -> str:
    if not value.n:
        return "–"
    return f"{percent(value.value)} ({percent(value.low)} to {percent(value.high)})"


def _figure(value: float) -> str:
    return signed(f"{round(value, 2) + 0.0:.2f}") if math.isfinite(value) else "–"


def _duration(value: float) -> str:
    return duration(value) if math.isfinite(value) else "–"
