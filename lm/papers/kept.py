"""Reads the stored results of papers' claims (`results/NAME.json` beside them)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.papers.paper import load
from lm.shapes import anything, is_flag, is_list, is_none, is_number, is_text, list_of
from lm.stored import read_record

CHART = {
    **dict.fromkeys(("title", "x", "y"), is_text),
    **dict.fromkeys(("log_x", "log_y"), is_flag),
    "curves": [{"label": is_text, "points": [list_of(4, (is_number, is_none))]}],
}
PROVENANCE = {
    "commits": [is_text], "dirty": anything, "cpu": [is_text], "versions": {"jax": anything}, "date": is_text,
    "seeds": is_list, "runs": is_number, "run_seconds": is_number,
}  # fmt: skip
RESULT = {
    "verdict": is_text, "reason": is_text, "columns": [is_text], "rows": [is_list], "charts": [CHART], "provenance": PROVENANCE,
}  # fmt: skip
"""A stored result, as far as pages read it."""


@dataclass(frozen=True)
class Claim:
    """A paper's claim with its stored result, None if it has not been run."""

    name: str
    title: str
    source: str
    result: dict[str, Any] | None

    @property
    def verdict(self) -> str:
        return self.result["verdict"] if self.result else "not run yet"


def claims(home: Path) -> list[Claim]:
    """The claims in a folder (every NAME.py with a NAME.md), sorted by name."""
    found = []
    for page in sorted(home.glob("*.md")):
        file, kept = page.with_suffix(".py"), home / "results" / f"{page.stem}.json"
        if file.is_file():
            paper = load(str(file))
            result = read_record(kept, RESULT) if kept.is_file() else None
            found.append(Claim(page.stem, paper.title, paper.source, result))
    return found
