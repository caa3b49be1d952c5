"""Export of choices to preference rows, which a preference stage reads directly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lm.choices.desk import standing
from lm.choices.log import Record
from lm.stored import write_atomic

SIDES = ("left", "right")
TIE, SKIP = "tie", "skip"


class Exported(NamedTuple):
    """Preference rows, and the number of judged pairs without one: most votes prefer no answer, or neither has a majority."""

    rows: list[dict[str, Any]]
    undecided: int
    even: int


def preferences(records: Iterable[Record], ties: bool = False) -> Exported:
    """Convert choices to rows: one for each pair where more than half of the votes prefer one answer, in vote order.

    Every choice except a skip is a vote: left, right, tie and both bad all count, so one vote for an answer does not outweigh
    two ties, nor one.

    Columns `prompt`, `chosen`, `rejected`, and `pair`; `votes` for each choice, ties and both bad among them;
    `strength`, the mean strength given with votes for the chosen answer, or null, and the same as `margin`, only where
    one was given; `sources` of both, if any.

    With `ties`, also a row with `tie` true for each undecided pair with at least one tie vote where
    both answers have equally many votes or more than half are tie or both bad: `chosen` is the answer that the first
    tie voter saw on the left.
    """
    by_pair: dict[str, list[Record]] = {}
    for record in standing(records):
        by_pair.setdefault(record["pair"], []).append(record)
    rows, undecided, even = [], 0, 0
    for pair, choices in by_pair.items():
        votes = [record for record in choices if record["choice"] != SKIP]
        liked = Counter(_text(_preferred(record)) for record in votes if record["choice"] in SIDES)
        best, count = max(liked.items(), key=lambda item: item[1], default=("", 0))
        neither = len(votes) - liked.total()
        tied = next((record for record in votes if record["choice"] == TIE), None)
        if 2 * count > len(votes):
            rows.append(_decided(pair, choices, best))
        elif ties and tied is not None and (2 * count == liked.total() or 2 * neither > len(votes)):
            rows.append(_row(pair, choices, tied["left"], tied["right"]) | {"tie": True})
        elif 2 * neither > len(votes) or not votes:
            undecided += 1
        else:
            even += 1
    return Exported(rows, undecided, even)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, atomically: a reader sees the old or the new file."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _decided(pair: str, choices: list[Record], liked: str) -> dict[str, Any]:
    """The row of a pair whose majority prefers the answer `liked`."""
    winners = [record for record in choices if record["choice"] in SIDES and _text(_preferred(record)) == liked]
    strengths = [record["strength"] for record in winners if record.get("strength") is not None]
    row = _row(pair, choices, _preferred(winners[0]), _other(winners[0]))
    if strengths:
        row["strength"] = row["margin"] = sum(strengths) / len(strengths)
    return row


def _row(pair: str, choices: list[Record], chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    kinds = [record["choice"] for record in choices]
    liked = [_text(_preferred(record)) for record in choices if record["choice"] in SIDES]
    votes = {"chosen": liked.count(_text(chosen)), "rejected": liked.count(_text(rejected))}
    row = {
        "prompt": choices[0]["prompt"],
        "chosen": chosen["answer"],
        "rejected": rejected["answer"],
        "pair": pair,
        "votes": votes | {kind.replace(" ", "_"): kinds.count(kind) for kind in (TIE, "both bad", SKIP)},
        "strength": None,
    }
    if "source" in chosen and "source" in rejected:
        row["sources"] = [chosen["source"], rejected["source"]]
    return row


def _preferred(record: Record) -> dict[str, Any]:
    return record[record["choice"]]


def _other(record: Record) -> dict[str, Any]:
    return record[SIDES[1 - SIDES.index(record["choice"])]]


def _text(side: dict[str, Any]) -> str:
    return json.dumps(side["answer"], sort_keys=True)
