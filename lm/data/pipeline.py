"""Feeds of batches: `batch(step)` as a pure function of stage, seed and step, for training and held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from lm import experiment as values
from lm.data import packing
from lm.data.order import mixture
from lm.data.selection import (
    WITHHELD,
    Split,
    fingerprint,
    order_key,
    select,
    shares,
    withheld,
)
from lm.data.sources import NOWHERE
from lm.data.split import Places
from lm.data.supply import Order, Supply, answers, conversations, pairs, windows
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import UserError
from lm.types import LabelledBatch, PairBatch, TokenBatch, array_fields

SUPPLIES = {"text": windows, "conversations": conversations, "pairs": pairs, "labelled": answers}
"""Kind of data that an objective reads → function that makes its rows."""


@dataclass(frozen=True)
class Feed:
    """Batches of a weighted mixture of sources; weights are shares of rows.

    `rows` is the total number of rows (or pairs); None in training, which is endless. `rows_each` is the number of rows of an
    example in a batch, 2 for pairs. With `judged` (labelled answers), a batch also has `mismatched`: each prompt with the
    answer of the previous row (for the first row, of the last).
    """

    names: tuple[str, ...]
    supplies: tuple[Supply, ...]
    shares: tuple[Fraction, ...]
    batch_size: int
    seq_len: int
    pad_id: int
    fingerprint: str
    rows: int | None
    rows_each: int = 1
    judged: bool = False

    def batch(self, step: int, only: np.ndarray | None = None) -> TokenBatch:
        """The batch of a step: rows step * batch_size … of the mixture, [B, T] (pairs: [2B, T], chosen and rejected alternate).

        Held-out rows appear once each, in a fixed order, followed by empty rows of weight 0. Raises UserError if
        the loss mask of a training batch is all zero.

        Args:
            only: indices of the batch's rows to make, ascending (those of this process); None: all.
        """
        each = self.rows_each
        wanted = range(self.batch_size * each) if only is None else only.tolist()
        partners = [(n - 1) % self.batch_size for n in wanted] if self.judged else []
        numbers = dict.fromkeys([*(row // each for row in wanted), *partners])
        made = {n: self._rows_at(step * self.batch_size + n) for n in numbers}
        rows = [made[row // each][row % each] for row in wanted]
        batch = _batch_of(rows)
        if self.rows is None and not batch.weights.any():
            if only is None:
                sources = ", ".join(self.names)
                raise UserError(f"step {step}: the loss mask of the whole batch is zero; sources: {sources}")
            self.batch(step)  # raises if the rows of the other processes have no loss either
        if not self.judged:
            return batch
        others = [packing.mismatch(row, made[n][0], self.pad_id) for row, n in zip(rows, partners, strict=True)]
        desirable = np.array([row.desirable for row in rows], np.float32)
        return LabelledBatch(**vars(batch), desirable=desirable, mismatched=_batch_of(others))

    def at(self, numbers: Sequence[int]) -> TokenBatch:
        """The batch of the rows (or pairs) at these positions of the mixture: step * batch_size + place."""
        return _batch_of([row for number in numbers for row in self._rows_at(number)])

    def examples(self, step: int) -> list[tuple[int, int]]:
        """The example behind each pair of a training batch: (source, index in that source), the same in every epoch."""
        found = []
        for number in range(step * self.batch_size, (step + 1) * self.batch_size):
            source, place = mixture(number, self.shares)
            supply = self.supplies[source]
            assert supply.example is not None
            found.append((source, supply.example(*divmod(place, supply.rows))))
        return found

    def report(self) -> str:
        """Lines for the log: for each source its examples, tokens, truncated, dropped, rows in an epoch, and remarks."""
        lines = []
        for name, supply in zip(self.names, self.supplies, strict=True):
            rows = "" if supply.tally.partial else f", {supply.rows} rows of {self.seq_len}"
            lines.append(f"{name}: {supply.tally.describe(supply.unit)}{rows}")
            lines += [f"{name}: {remark}" for remark in supply.tally.remarks()]
        return "\n".join(lines)

    def sources(self) -> list[dict[str, Any]]:
        """The counts of `report` as plain objects, one a source."""
        return [supply.tally.to_json(name, supply.unit) for name, supply in zip(self.names, self.supplies, strict=True)]

    def _rows_at(self, number: int) -> list[packing.PackedRow]:
        if self.rows is None:
            source, place = mixture(number, self.shares)
            supply = self.supplies[source]
            return supply.row(*divmod(place, supply.rows))
        for supply in self.supplies:
            if number < supply.rows:
                return supply.row(0, number)
            number -= supply.rows
        empty, zero = packing.join([], self.seq_len, self.pad_id), np.float32(0)
        if self.judged:
            return [empty._replace(desirable=zero)]
        return [empty._replace(margins=zero, ties=zero)] * 2 if self.rows_each == 2 else [empty]


def _batch_of(rows: list[packing.PackedRow]) -> TokenBatch:
    """Stack rows into a batch; rows of pairs give a PairBatch."""
    kind = TokenBatch if rows[0].margins is None else PairBatch
    arrays: dict[str, Any] = {name: np.stack([getattr(row, name) for row in rows]) for name in array_fields(kind)}
    return kind(**arrays)


def make_feed(
    stage: values.Stage, tokenizer: TextTokenizer, seed: int, split: Split = "train", elsewhere: Places = NOWHERE
) -> Feed:
    """The feed of a stage that does not sample, over its training or its held-out examples.

    Every source is read, split and (except training generators) tokenised here. Raises UserError for an invalid source.

    Args:
        elsewhere: keys held out by other sources (`held_out_elsewhere`), left out of training here.
    """
    build = SUPPLIES[stage.objective.data]
    supplies, contents = [], []
    for number, source in enumerate(stage.sources):
        rows, indices = select(source, split, elsewhere)
        order = Order(None if split == "heldout" else order_key(seed, stage.name, number))
        supply: Supply = build(rows, indices, stage.seq_len, tokenizer, order, **stage.objective.data_options)
        if split == "train" and (number_withheld := withheld(source, rows, elsewhere)):
            supply = replace(supply, tally=supply.tally.with_dropped(WITHHELD, number_withheld))
        supplies.append(supply)
        contents.append(rows)
    return Feed(
        names=tuple(source.path for source in stage.sources),
        supplies=tuple(supplies),
        shares=tuple(shares(stage.sources, stage.name)),
        batch_size=stage.batch_size,
        seq_len=stage.seq_len,
        pad_id=tokenizer.pad_id,
        fingerprint=fingerprint(stage.sources, contents, tokenizer.fingerprint, elsewhere),
        rows=sum(supply.rows for supply in supplies) if split == "heldout" else None,
        rows_each=values.rows_per_example(stage),
        judged=stage.objective.data == "labelled",
    )
