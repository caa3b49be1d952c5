"""Summary of all choices: agreement, side and length bias, and win rates of sources."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lm.choices.desk import standing
from lm.choices.log import CHOICES, Record
from lm.choices.pairs import pair_key, text_of
from lm.label.statistics import MISSING, Share, bradley_terry, cohen_kappa, krippendorff_alpha, share

SCORES = {"left": 1.0, "right": 0.0, "tie": 0.5, "both bad": 0.5}  # of the left answer


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha; for every two annotators (first, second, shared pairs, agreement, Cohen's kappa)."""

    alpha: float
    units: int
    two: list[tuple[str, str, int, float, float]]


@dataclass(frozen=True)
class Competitor:
    """Results of one source of answers: won, lost, neither; win rate (neither counts half); log-odds strength."""

    name: str
    won: int
    lost: int
    neither: int
    wins: Share
    strength: tuple[float, float, float] | None


@dataclass(frozen=True)
class Summary:
    """All numbers of the summary: counts by annotator and choice; `left`, `longer`: shares of the choices with a preference."""

    pairs: int
    people: dict[str, dict[str, int]]
    seconds: dict[str, float]
    agreement: Agreement
    left: Share
    longer: Share
    sources: list[Competitor]
    finite: bool


def summarise(records: Iterable[Record]) -> Summary:
    """Compute the summary of the choices that were not undone."""
    choices = standing(records)
    people = sorted({record["annotator"] for record in choices})
    decided = [record for record in choices if record["choice"] in ("left", "right")]
    uneven = [record for record in decided if len(_answer(record, "left")) != len(_answer(record, "right"))]
    sources, finite = _sources(choices)
    return Summary(
        pairs=len({record["pair"] for record in choices if record["choice"] != "skip"}),
        people={name: _counted([r["choice"] for r in choices if r["annotator"] == name]) for name in people},
        seconds={name: _median_seconds(choices, name) for name in people},
        agreement=_agreement(choices, people),
        left=_share([float(record["choice"] == "left") for record in decided], decided),
        longer=_share([float(_longer_was_chosen(record)) for record in uneven], uneven),
        sources=sources,
        finite=finite,
    )


def verdict(record: Record) -> str | None:
    """A choice independent of the sides: "0" or "1" (the answers sorted), "tie" or "both bad"; None if skipped."""
    if record["choice"] in ("left", "right"):
        left, right = (repr(record[side]["answer"]) for side in ("left", "right"))
        return str(int((left < right) == (record["choice"] == "left")))
    return None if record["choice"] == "skip" else record["choice"]


def _agreement(choices: Sequence[Record], people: Sequence[str]) -> Agreement:
    units = {pair: unit for unit, pair in enumerate(dict.fromkeys(record["pair"] for record in choices))}
    kinds = {kind: number for number, kind in enumerate(("0", "1", "tie", "both bad"))}
    ratings = np.full((len(people), len(units)), MISSING)
    for record in choices:
        judged = verdict(record)
        if judged is not None:
            ratings[people.index(record["annotator"]), units[record["pair"]]] = kinds[judged]
    two = []
    for i, j in itertools.combinations(range(len(people)), 2):
        both = (ratings[i] != MISSING) & (ratings[j] != MISSING)
        if both.any():
            a, b = ratings[i, both], ratings[j, both]
            two.append((people[i], people[j], int(both.sum()), float(np.mean(a == b)), cohen_kappa(a, b)))
    shared = int(((ratings != MISSING).sum(0) >= 2).sum())
    return Agreement(krippendorff_alpha(ratings), shared, two)


def _sources(choices: Sequence[Record]) -> tuple[list[Competitor], bool]:
    """The sources, best first, and whether there are more than two with finite strengths."""
    met = [(_source(r, "left"), _source(r, "right"), r) for r in choices if r["choice"] in SCORES]
    met = [(left, right, record) for left, right, record in met if left and right and left != right]
    names = sorted({name for *both, _ in met for name in both})
    left = np.array([names.index(name) for name, _, _ in met], int)
    right = np.array([names.index(name) for _, name, _ in met], int)
    scores = np.array([SCORES[record["choice"]] for *_, record in met])
    groups = [pair_key(record["prompt"], "") for *_, record in met]
    found = bradley_terry(left, right, scores, groups, len(names)) if len(names) > 2 else None
    sources = []
    for number, name in enumerate(names):
        mine = np.flatnonzero((left == number) | (right == number))
        own = np.where(left[mine] == number, scores[mine], 1 - scores[mine])
        sources.append(
            Competitor(
                name,
                int((own == 1).sum()),
                int((own == 0).sum()),
                int((own == 0.5).sum()),
                share(own, [groups[i] for i in mine]),
                None if found is None else (found.values[number], found.low[number], found.high[number]),
            )
        )
    return sorted(sources, key=lambda source: -(source.strength or source.wins)[0]), found is not None


def _share(scores: Sequence[float], records: Sequence[Record]) -> Share:
    return share(np.array(scores, float), [pair_key(record["prompt"], "") for record in records])


def _counted(kinds: Sequence[str]) -> dict[str, int]:
    return {kind: kinds.count(kind) for kind in CHOICES}


def _median_seconds(choices: Sequence[Record], name: str) -> float:
    taken = [r["seconds"] for r in choices if r["annotator"] == name and r.get("seconds") is not None]
    return float(np.median(taken)) if taken else math.nan


def _longer_was_chosen(record: Record) -> bool:
    return (len(_answer(record, "left")) > len(_answer(record, "right"))) == (record["choice"] == "left")


def _answer(record: Record, side: str) -> str:
    return text_of(record[side]["answer"])


def _source(record: Record, side: str) -> str:
    return record[side].get("source") or ""
