"""Choices as rows of preferences: what a preference stage trains on as it is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lm.choices.desk import standing
from lm.choices.log import Record

SIDES = ("left", "right")


class Exported(NamedTuple):
    """Rows of preferences, and of how many judged pairs none was made: nobody preferred one, or as many the other."""

    rows: list[dict[str, Any]]
    undecided: int
    even: int


def preferences(records: Iterable[Record], ties: bool = False) -> Exported:
    """One row for each pair of which more people prefer one answer, in the order in which pairs were first judged.

    Columns `prompt`, `chosen`, `rejected`, and `pair`; `votes` for each choice, ties and both bad among them;
    `strength`, the mean of those given with the choices of the chosen one, or null, and where it is given the same as
    `margin`, which a reward model can learn from; `sources` of both, if any. Ties, both bad and skipped ones decide nothing:
    a pair with no other choice has no row.

    Args:
        ties: pairs that somebody called a tie and nobody decided, or as many each way, are rows too, with `tie` true.
    """
    by_pair: dict[str, list[Record]] = {}
    for record in standing(records):
        by_pair.setdefault(record["pair"], []).append(record)
    rows, undecided, even = [], 0, 0
    for pair, choices in by_pair.items():
        decided = [record for record in choices if record["choice"] in SIDES]
        votes = [(_text(_preferred(record)), record) for record in decided]
        for_first = [record for text, record in votes if text == votes[0][0]]
        for_second = [record for text, record in votes if text != votes[0][0]]
        tied = [record for record in choices if record["choice"] == "tie"]
        if ties and (tied or decided) and len(for_first) == len(for_second):
            rows.append(_row(pair, [tied[0] | {"choice": "left"}] if tied else for_first, [], choices) | {"tie": True})
        elif not decided:
            undecided += 1
        elif len(for_first) == len(for_second):
            even += 1
        else:
            winners, losers = sorted((for_first, for_second), key=len, reverse=True)
            rows.append(_row(pair, winners, losers, choices))
    return Exported(rows, undecided, even)


def write_preferences(path: Path, exported: Exported) -> None:
    """The rows as JSON lines; whoever reads the file sees the old one or the new one, whole."""
    half = path.with_name(path.name + ".tmp")
    with half.open("w", encoding="utf-8") as stream:
        for row in exported.rows:
            stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(half, path)


def _row(pair: str, winners: list[Record], losers: list[Record], choices: list[Record]) -> dict[str, Any]:
    chosen, rejected = _preferred(winners[0]), _other(winners[0])
    strengths = [record["strength"] for record in winners if record.get("strength") is not None]
    kinds = [record["choice"] for record in choices]
    votes = {"chosen": len(winners), "rejected": len(losers)}
    row = {
        "prompt": winners[0]["prompt"],
        "chosen": chosen["answer"],
        "rejected": rejected["answer"],
        "pair": pair,
        "votes": votes | {kind.replace(" ", "_"): kinds.count(kind) for kind in ("tie", "both bad", "skip")},
        "strength": sum(strengths) / len(strengths) if strengths else None,
    }
    if strengths:
        row["margin"] = row["strength"]
    if "source" in chosen and "source" in rejected:
        row["sources"] = [chosen["source"], rejected["source"]]
    return row


def _preferred(record: Record) -> dict[str, Any]:
    return record[record["choice"]]


def _other(record: Record) -> dict[str, Any]:
    return record[SIDES[1 - SIDES.index(record["choice"])]]


def _text(side: dict[str, Any]) -> str:
    return json.dumps(side["answer"], sort_keys=True)
