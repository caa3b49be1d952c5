"""Assignment of pairs to annotators: every pair to N people, none twice to the same; choices are written to the log."""

from __future__ import annotations

import datetime
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lm.choices.log import CHOICES, Log, Record, is_strength
from lm.choices.pairs import Answer, Pair, on_the_left, shuffled
from lm.config.field import shown
from lm.experiment import UserError

LONGEST_COMMENT = 4_000
LONGEST_NAME = 60
LEASE = 15 * 60.0  # seconds for which a pair stays assigned to the annotator who sees it
LEASES_PER_ADDRESS = 20  # pairs assigned at a time to annotators at one address, whatever their names


@dataclass(frozen=True)
class LabelProgress:
    """Counts of judgements: this annotator's, done and total over all annotators, and pairs left for this annotator."""

    yours: int
    done: int
    total: int
    left: int


@dataclass(frozen=True)
class View:
    """What an annotator sees next. `pair` is None where none is left for them; others may still be `busy`."""

    pair: Pair | None
    left: Answer | None
    right: Answer | None
    busy: int
    progress: LabelProgress
    last: Record | None


@dataclass
class _Lease:
    since: float
    until: float
    address: str


def standing(records: Iterable[Record]) -> list[Record]:
    """The choices that were not undone, in order; the last one for each annotator and pair."""
    choices = {}
    for record in records:
        if record["kind"] == "choice":
            choices[record["id"]] = record
        else:
            choices.pop(record["of"], None)
    return list({(record["annotator"], record["pair"]): record for record in choices.values()}.values())


def clean_name(name: Any) -> str:
    """Normalise an annotator's name: Unicode NFC, single spaces, none at the ends.

    Raises UserError if it is empty, too long or not a text.
    """
    cleaned = " ".join(unicodedata.normalize("NFC", name).split()) if isinstance(name, str) else ""
    if not 0 < len(cleaned) <= LONGEST_NAME or not cleaned.isprintable():
        raise UserError(f"the name is {shown(name)}; it must have 1 to {LONGEST_NAME} letters")
    return cleaned


class Desk:
    """Assigns pairs and records choices; thread-safe, one request at a time.

    An assigned pair is leased to the annotator for LEASE seconds. Later it may go to another; a late choice is
    still recorded, so a pair can have more judgements than requested but no choice is lost.

    An annotator has one pair at a time, and an address at most LEASES_PER_ADDRESS: then its oldest lease ends. Where all
    pairs are leased, an annotator at another address takes one from the address with the most leases, if it has several.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        log: Log,
        *,
        per_pair: int = 1,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.log = log
        self.per_pair = per_pair
        self._seed, self._clock = seed, clock
        self._pairs = {pair.key: pair for pair in shuffled(pairs, seed)}
        self._mutex = threading.Lock()
        self._leases: dict[str, dict[str, _Lease]] = {}  # pair, person
        self._chosen: dict[str, dict[str, Record]] = {}  # person, pair: in the order of the file
        self._votes: Counter[str] = Counter()
        for record in standing(log.records):
            self._count(record)

    def __len__(self) -> int:
        return len(self._pairs)

    def strangers(self) -> str:
        """A line about choices in the log whose pairs are not in this task; "" where there are none."""
        count = sum(record["pair"] not in self._pairs for record in standing(self.log.records))
        return f"{self.log.path}: {count} choices of pairs that are not in this task; they stay" if count else ""

    def records(self) -> list[Record]:
        """All records of the log."""
        with self._mutex:
            return list(self.log.records)

    def show(self, annotator: str, address: str = "") -> View:
        """The annotator's current pair, else the next one for them."""
        with self._mutex:
            return self._show(annotator, address)

    def choose(
        self, annotator: str, pair: Any, choice: Any, strength: Any = None, comment: Any = "", address: str = ""
    ) -> View:
        """Record a choice and return the next view. The same choice sent again changes nothing.

        Raises:
            UserError: no such pair or choice, or this annotator has judged the pair differently.
            OSError: the choice could not be written; nothing has changed.
        """
        _check(choice, strength, comment)
        with self._mutex:
            if not isinstance(pair, str) or pair not in self._pairs:
                raise UserError(f"there is no pair {shown(pair)} in this task: load the page again")
            known = self._chosen.get(annotator, {}).get(pair)
            given = {"choice": choice, "strength": strength, "comment": comment}
            if known is None:
                self._count(self.log.append(self._record(annotator, self._pairs[pair], given)))
                self._release(annotator)
            elif any(known.get(name) != value for name, value in given.items()):
                raise UserError(
                    f"{annotator} has already judged this pair ({known['choice']}): undo it to judge it again"
                )
            return self._show(annotator, address)

    def decide(self, annotator: str, judge: Callable[[Pair, Answer, Answer], str]) -> None:
        """Let a program judge every pair that it has not judged yet: judge(pair, left, right) -> choice.

        Raises:
            OSError: a choice could not be written; earlier ones are.
        """
        with self._mutex:
            known = set(self._chosen.get(annotator, {}))
            for pair in [pair for key, pair in self._pairs.items() if key not in known]:
                choice = judge(pair, *self._sides(annotator, pair))
                _check(choice, None, "")
                self._count(
                    self.log.append(self._record(annotator, pair, {"choice": choice, "strength": None, "comment": ""}))
                )

    def undo(self, annotator: str, of: Any, address: str = "") -> View:
        """Undo the choice with the id `of` and show its pair again. Undoing it twice changes nothing.

        Raises:
            UserError: the choice is not this annotator's last one.
            OSError: it could not be written; nothing has changed.
        """
        if type(of) is not int:
            raise UserError(f"the choice to undo is {shown(of)}; it must be a choice's number")
        with self._mutex:
            last = self._last(annotator)
            if any(record["kind"] == "undo" and record["of"] == of for record in reversed(self.log.records)):
                return self._show(annotator, address)
            if last is None or last["id"] != of:
                raise UserError(f"choice {shown(of)} is not the last one of {annotator}: load the page again")
            self.log.append({"kind": "undo", "time": _now(), "annotator": annotator, "of": of})
            del self._chosen[annotator][last["pair"]]
            self._votes[last["pair"]] -= last["choice"] != "skip"
            self._release(annotator)
            if last["pair"] in self._pairs:
                self._lease(annotator, last["pair"], address)
            return self._show(annotator, address)

    def _record(self, annotator: str, pair: Pair, given: Mapping[str, Any]) -> Record:
        lease = self._leases.get(pair.key, {}).get(annotator)
        sides = [
            {"answer": side.answer, **({} if side.source is None else {"source": side.source})}
            for side in self._sides(annotator, pair)
        ]
        return {
            "kind": "choice",
            "time": _now(),
            "annotator": annotator,
            "pair": pair.key,
            **given,
            "seconds": None if lease is None else round(self._clock() - lease.since, 2),
            "prompt": pair.prompt,
            "left": sides[0],
            "right": sides[1],
        }

    def _show(self, annotator: str, address: str) -> View:
        pair = self._current(annotator) or self._next(annotator) or self._passed_on(annotator, address)
        sides: tuple[Answer | None, Answer | None] = (None, None)
        if pair is not None:
            self._lease(annotator, pair.key, address)
            sides = self._sides(annotator, pair)
        mine = self._chosen.get(annotator, {})
        open_to_me = sum(key not in mine and self._votes[key] < self.per_pair for key in self._pairs)
        progress = LabelProgress(
            yours=len(mine),
            done=sum(min(self._votes[key], self.per_pair) for key in self._pairs),
            total=len(self._pairs) * self.per_pair,
            left=open_to_me,
        )
        return View(pair, *sides, open_to_me if pair is None else 0, progress, self._last(annotator))

    def _current(self, annotator: str) -> Pair | None:
        """The pair leased to this annotator, unless the lease has expired."""
        key = next((key for key, kept in self._leases.items() if annotator in kept), None)
        if key is None or self._leases[key][annotator].until > self._clock():
            return self._pairs.get(key or "")
        self._release(annotator)
        return None

    def _next(self, annotator: str) -> Pair | None:
        """The first pair that needs a judgement and that this annotator has not judged."""
        mine, now = self._chosen.get(annotator, {}), self._clock()
        for key, pair in self._pairs.items():
            busy = sum(lease.until > now for lease in self._leases.get(key, {}).values())
            if key not in mine and self._votes[key] + busy < self.per_pair:
                return pair
        return None

    def _passed_on(self, annotator: str, address: str) -> Pair | None:
        """The oldest lease of the address with the most leases, if it has several."""
        held = self._held()
        most = max(
            (holder for holder in held if holder != address), key=lambda holder: len(held[holder]), default=address
        )
        if most == address or len(held[most]) < 2:
            return None
        mine = self._chosen.get(annotator, {})
        for _, key, holder in sorted(held[most]):
            if key not in mine and self._votes[key] < self.per_pair:
                self._release(holder)
                return self._pairs[key]
        return None

    def _held(self) -> dict[str, list[tuple[float, str, str]]]:
        """Current leases by address: (start, pair, annotator)."""
        found: dict[str, list[tuple[float, str, str]]] = {}
        for key, kept in self._leases.items():
            for person, lease in kept.items():
                found.setdefault(lease.address, []).append((lease.since, key, person))
        return found

    def _sides(self, annotator: str, pair: Pair) -> tuple[Answer, Answer]:
        """The left and right answer as this annotator sees the pair."""
        if on_the_left(pair, annotator, self._seed):
            return pair.first, pair.second
        return pair.second, pair.first

    def _lease(self, annotator: str, key: str, address: str) -> None:
        now = self._clock()
        kept = self._leases.setdefault(key, {})
        lease = kept.setdefault(annotator, _Lease(now, now, address))
        lease.until, lease.address = now + LEASE, address
        others = sorted(one for one in self._held()[address] if one[2] != annotator)
        for _, _, person in others[: max(0, len(others) + 1 - LEASES_PER_ADDRESS)]:
            self._release(person)

    def _release(self, annotator: str) -> None:
        for key in [key for key, kept in self._leases.items() if annotator in kept]:
            del self._leases[key][annotator]
            if not self._leases[key]:
                del self._leases[key]

    def _count(self, record: Record) -> None:
        self._chosen.setdefault(record["annotator"], {})[record["pair"]] = record
        self._votes[record["pair"]] += record["choice"] != "skip"

    def _last(self, annotator: str) -> Record | None:
        return next(reversed(self._chosen.get(annotator, {}).values()), None)


def _check(choice: Any, strength: Any, comment: Any) -> None:
    if choice not in CHOICES:
        raise UserError(f"the choice is {shown(choice)}; it must be one of {', '.join(CHOICES)}")
    if not is_strength(strength):
        raise UserError(f"the strength is {shown(strength)}; it must be one of 1, 2, 3, or none")
    if not isinstance(comment, str) or len(comment) > LONGEST_COMMENT:
        raise UserError(f"the comment must be a text of at most {LONGEST_COMMENT} characters")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
