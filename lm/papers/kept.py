"""Reads the stored results of papers' claims (`results/NAME.json` beside them)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.papers.paper import load
from lm.stored import read_record


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
            result = read_record(kept, {"verdict": str, "provenance": dict, "charts": list}) if kept.is_file() else None
            found.append(Claim(page.stem, paper.title, paper.source, result))
    return found
