"""Prompts for rollouts: left padded, each with the assistant's header at its end, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from lm.data import chat, packing
from lm.data.order import mixture
from lm.data.selection import WITHHELD, Split, fingerprint, order_key, select, shares, withheld
from lm.data.sources import NOWHERE, Rows
from lm.data.split import Places
from lm.data.supply import LOOKED_AT, Order
from lm.data.tokenizer import Tokenizer
from lm.experiment import Source, UserError


class Prompts(NamedTuple):
    """Prompts aligned to the right, their lengths, and the rows that they come from."""

    tokens: Int32[np.ndarray, "B P"]
    lengths: Int32[np.ndarray, " B"]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class _Part:
    """One source of prompts: which of its rows, in which order, and the longest prompt seen."""

    rows: Rows
    indices: Sequence[int]
    order: Order
    longest: int
    withheld: int = 0


@dataclass(frozen=True)
class PromptFeed:
    """Batches of prompts of a mixture. `rows` is how many there are in all: None in training, which has no end."""

    parts: tuple[_Part, ...]
    shares: tuple[Fraction, ...]
    batch_size: int
    prompt_len: int
    tokenizer: Tokenizer
    fingerprint: str
    rows: int | None

    def batch(self, step: int) -> Prompts:
        """Prompts step * batch_size … of the mixture; held-out ones in fixed order, and after the last the first again."""
        rows: list[dict[str, Any]] = []
        wheres: list[str] = []
        for number in range(step * self.batch_size, (step + 1) * self.batch_size):
            part, index = self._find(number)
            rows.append(part.rows[index])
            wheres.append(part.rows.where(index))
        return encode_prompts(rows, self.prompt_len, self.tokenizer, wheres)

    def report(self) -> str:
        """One line a source: prompts, the longest, the room there is, and how many are left out for another source's split."""
        lines = []
        for part in self.parts:
            count = f"first {LOOKED_AT}" if _endless(part.rows, part.order) else str(len(part.indices))
            left_out = f"; {part.withheld} more left out, {WITHHELD}" if part.withheld else ""
            lines.append(
                f"{part.rows.path}: {count} prompts, the longest {part.longest} of {self.prompt_len} tokens{left_out}"
            )
        return "\n".join(lines)

    def _find(self, number: int) -> tuple[_Part, int]:
        if self.rows is None:
            source, place = mixture(number, self.shares)
            part = self.parts[source]
            epoch, place = divmod(place, len(part.indices))
            return part, part.indices[part.order.place(epoch, place, len(part.indices))]
        number %= self.rows
        for part in self.parts:
            if number < len(part.indices):
                break
            number -= len(part.indices)
        return part, part.indices[number]


def make_prompt_feed(
    sources: Sequence[Source],
    batch_size: int,
    prompt_len: int,
    tokenizer: Tokenizer,
    seed: int,
    split: Split = "train",
    columns: Sequence[str] = (),
    elsewhere: Places = NOWHERE,
) -> PromptFeed:
    """The prompts of a rollout stage, each of at most prompt_len tokens.

    `columns` are what every row must carry (`lm.rollout.verifiers.NEEDS`). Every row of a file is looked at here, of a
    generator the first few hundred. Raises UserError if a prompt is too long or a column is missing.
    """
    parts = []
    for number, source in enumerate(sources):
        rows, indices = select(source, split, elsewhere)
        order = Order(None if split == "heldout" else order_key(seed, "prompts", number))
        checked = [indices[k] for k in range(LOOKED_AT)] if _endless(rows, order) else indices
        longest = _longest(rows, checked, prompt_len, tokenizer, columns)
        left_out = withheld(source, rows, elsewhere) if split == "train" else 0
        parts.append(_Part(rows, indices, order, longest, left_out))
    return PromptFeed(
        parts=tuple(parts),
        shares=tuple(shares(sources)),
        batch_size=batch_size,
        prompt_len=prompt_len,
        tokenizer=tokenizer,
        fingerprint=fingerprint(sources, [part.rows for part in parts], tokenizer.fingerprint, elsewhere),
        rows=sum(len(part.indices) for part in parts) if split == "heldout" else None,
    )


def encode_prompts(
    rows: Sequence[Mapping[str, Any]], prompt_len: int, tokenizer: Tokenizer, wheres: Sequence[str] | None = None
) -> Prompts:
    """The prompts of rows, rendered up to the assistant's header and left padded to prompt_len.

    `wheres` name the rows in errors. Raises UserError if one is too long.
    """
    wheres = wheres or [f"prompt {number}" for number in range(1, len(rows) + 1)]
    prompts = [_tokens(row, where, tokenizer) for row, where in zip(rows, wheres, strict=True)]
    _check_lengths([len(prompt) for prompt in prompts], wheres, prompt_len)
    tokens, lengths = packing.left_pad(prompts, prompt_len, tokenizer.pad_id)
    return Prompts(tokens, lengths, [dict(row) for row in rows])


def _tokens(row: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> list[int]:
    return chat.render(chat.prompt_messages(row, where), tokenizer, generation_prompt=True).tokens


def _longest(rows: Rows, indices: Sequence[int], prompt_len: int, tokenizer: Tokenizer, columns: Sequence[str]) -> int:
    lengths = []
    for index in indices:
        row, where = rows[index], rows.where(index)
        for column in columns:
            if row.get(column) is None:
                raise UserError(
                    f"{where}: the verifier needs the column {column}; the columns found are {', '.join(row)}"
                )
        lengths.append(len(_tokens(row, where, tokenizer)))
    _check_lengths(lengths, [rows.where(index) for index in indices], prompt_len)
    return max(lengths)


def _check_lengths(lengths: Sequence[int], wheres: Sequence[str], prompt_len: int) -> None:
    too_long = sum(length > prompt_len for length in lengths)
    if too_long:
        longest = max(lengths)
        raise UserError(
            f"{too_long} of {len(lengths)} prompts are longer than the {prompt_len} tokens that there are for them; the "
            f"longest has {longest} ({wheres[lengths.index(longest)]}): raise seq_len by {longest - prompt_len}, or lower "
            "max_new_tokens by as much"
        )


def _endless(rows: Rows, order: Order) -> bool:
    return rows.generated and order.key is not None
