"""Prompts of rollouts: left padded, each ending with the assistant's header, as a pure function of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from lm.data import bad_rows, chat, packing
from lm.data.bad_rows import ADVICE, REASONS, BadRow, ColumnNeed
from lm.data.order import mixture
from lm.data.selection import WITHHELD, Split, fingerprint, order_key, select, shares, withheld
from lm.data.sources import NOWHERE, Rows
from lm.data.split import Places
from lm.data.supply import LOOKED_AT, Order, Tally, excerpt, left_out_note
from lm.data.text_tokenizer import Rendered, TextTokenizer, Tools
from lm.data.tokens import unread_columns
from lm.experiment import Source, UserError

# (row, its location for errors) -> the prompt's turns
MessagesOf = Callable[[Mapping[str, Any], str], list[dict[str, Any]]]


class Prompts(NamedTuple):
    """Left-padded prompts, their lengths, and the rows that they come from."""

    tokens: Int32[np.ndarray, "B P"]
    lengths: Int32[np.ndarray, " B"]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class _Part:
    """One source of prompts: row indices and order, the longest prompt, and a tally of kept and dropped rows."""

    rows: Rows
    indices: Sequence[int]
    order: Order
    longest: int
    tally: Tally


@dataclass(frozen=True)
class PromptFeed:
    """Batches of prompts from a mixture. `rows` is their total number; None in training, which is endless."""

    parts: tuple[_Part, ...]
    shares: tuple[Fraction, ...]
    batch_size: int
    prompt_len: int
    tokenizer: TextTokenizer
    fingerprint: str
    rows: int | None
    messages: MessagesOf = chat.prompt_messages

    def batch(self, step: int) -> Prompts:
        """The prompts of a step: step * batch_size … of the mixture; held-out prompts in fixed order, starting over at the end."""
        rows: list[dict[str, Any]] = []
        wheres: list[str] = []
        for number in range(step * self.batch_size, (step + 1) * self.batch_size):
            part, index = self._find(number)
            rows.append(part.rows[index])
            wheres.append(part.rows.where(index))
        return encode_prompts(rows, self.prompt_len, self.tokenizer, wheres, self.messages)

    def report(self) -> str:
        """Lines for the log: for each source its prompts, the longest, the limit, dropped rows, and remarks."""
        lines = []
        for part in self.parts:
            count = f"first {part.tally.examples}" if part.tally.partial else str(len(part.indices))
            line = f"{part.rows.path}: {count} prompts, the longest {part.longest} of {self.prompt_len} tokens"
            why = f", {part.tally.dropped} dropped ({part.tally.describe_dropped()})" if part.tally.dropped else ""
            lines.append(line + why)
            lines += [f"{part.rows.path}: {remark}" for remark in part.tally.remarks()]
        return "\n".join(lines)

    def sources(self) -> list[dict[str, Any]]:
        """The counts of `report` as plain objects, one a source."""
        return [part.tally.to_json(part.rows.path, "prompts") for part in self.parts]

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
    tokenizer: TextTokenizer,
    seed: int,
    split: Split = "train",
    columns: Sequence[ColumnNeed] = (),
    elsewhere: Places = NOWHERE,
    max_new_tokens: int = 0,
    messages: MessagesOf = chat.prompt_messages,
    also_read: Sequence[str] = (),
) -> PromptFeed:
    """The feed of prompts of a stage that samples, each prompt of at most prompt_len tokens.

    `columns` are required in every row (`lm.rollout.verifiers.NEEDS`); `max_new_tokens` is only used for advice in errors.
    `messages` extracts the prompt's turns from (row, location); `also_read` are columns that it reads beside the prompt's. Every row of a file is checked here, and the first few
    hundred rows of a generator. Raises UserError if a prompt is too long or a column is missing, unless the source drops
    such rows.
    """
    parts = []
    for number, source in enumerate(sources):
        rows, indices = select(source, split, elsewhere)
        order = Order(None if split == "heldout" else order_key(seed, "prompts", number))
        endless = _endless(rows, order)
        checked = [indices[k] for k in range(LOOKED_AT)] if endless else indices
        found = _look_at(rows, checked, tokenizer, columns, messages, also_read)
        kept, tally = _fitting(rows, checked, found, prompt_len, max_new_tokens)
        tally = replace(tally, partial=endless)
        if split == "train" and (number_withheld := withheld(source, rows, elsewhere)):
            tally = tally.with_dropped(WITHHELD, number_withheld)
        longest = int(max(found.lengths[found.lengths <= prompt_len]))
        parts.append(_Part(rows, indices if endless else kept, order, longest, tally))
    return PromptFeed(
        parts=tuple(parts),
        shares=tuple(shares(sources)),
        batch_size=batch_size,
        prompt_len=prompt_len,
        tokenizer=tokenizer,
        fingerprint=fingerprint(sources, [part.rows for part in parts], tokenizer.fingerprint, elsewhere),
        rows=sum(len(part.indices) for part in parts) if split == "heldout" else None,
        messages=messages,
    )


def encode_prompts(
    rows: Sequence[Mapping[str, Any]],
    prompt_len: int,
    tokenizer: TextTokenizer,
    wheres: Sequence[str] | None = None,
    messages: MessagesOf = chat.prompt_messages,
) -> Prompts:
    """Encode the prompts of rows, rendered up to the assistant's header and left padded to prompt_len.

    `wheres` name the rows in errors. Raises UserError if a prompt is too long.
    """
    wheres = wheres or [f"prompt {number}" for number in range(1, len(rows) + 1)]
    prompts = [render_prompt(messages, row, tokenizer, where).tokens for row, where in zip(rows, wheres, strict=True)]
    _check_lengths([len(prompt) for prompt in prompts], wheres, prompt_len)
    tokens, lengths = packing.left_pad(prompts, prompt_len, tokenizer.pad_id)
    return Prompts(tokens, lengths, [dict(row) for row in rows])


def render_prompt(messages: MessagesOf, row: Mapping[str, Any], tokenizer: TextTokenizer, where: str) -> Rendered:
    """A row's prompt up to the header of the answer, with the row's tools.

    Environments may have a column of that name for themselves; only a chat template is told of it.
    """
    told = tokenizer.has_template or messages is chat.prompt_messages
    asked, tools = messages(row, where), offered_tools(messages, row, where) if told else None
    variables = chat.variables_of(row, where) if tokenizer.has_template else chat.NO_VARIABLES
    return chat.render(asked, tokenizer, generation_prompt=True, where=where, tools=tools, variables=variables)


def offered_tools(messages: MessagesOf, row: Mapping[str, Any], where: str) -> Tools:
    """The definitions of an environment's own tools (the attribute `tools` of its `messages`), else those of the row."""
    return getattr(messages, "tools", None) or chat.tools_of(row, where)


class _Found(NamedTuple):
    """For every checked row its prompt's length in tokens (0 for a bad row) and an index into REASONS; unread columns.

    `left_out` counts the prompts by what the chat template leaves out of them.
    """

    lengths: Int64[np.ndarray, " N"]
    flaws: Int64[np.ndarray, " N"]
    errors: dict[int, str]
    unread: tuple[str, ...]
    left_out: Counter[str]


def _look_at(
    rows: Rows,
    indices: Sequence[int],
    tokenizer: TextTokenizer,
    columns: Sequence[ColumnNeed],
    messages: MessagesOf,
    also_read: Sequence[str],
) -> _Found:
    """Measure prompts. Raises BadRow for the first row without a prompt or a column, unless the source drops bad rows."""
    lengths, flaws = np.zeros((2, len(indices)), np.int64)
    errors, unread, left_out = dict[int, str](), dict[str, None](), Counter[str]()
    others = [*bad_rows.names_of_needs(columns), *also_read]
    for number, index in enumerate(indices):
        row, where = rows[index], rows.where(index)
        try:
            bad_rows.check_columns(row, columns, where)
            found = render_prompt(messages, row, tokenizer, where)
            lengths[number] = len(found.tokens)
            left_out.update(found.left_out)
        except BadRow as error:
            if not rows.drop:
                raise BadRow(f"{error}{ADVICE}", error.reason) from error
            lengths[number], flaws[number] = 0, error.reason
            errors.setdefault(error.reason, str(error))
        else:
            if rows.parts:
                unread |= dict.fromkeys(unread_columns(row, "prompts", others, tokenizer.template_words))
    return _Found(lengths, flaws, errors, tuple(unread), left_out)


def _fitting(
    rows: Rows, indices: Sequence[int], found: _Found, prompt_len: int, max_new_tokens: int
) -> tuple[Any, Tally]:
    """The rows whose prompts fit, and a tally. Raises UserError for a prompt too long unless the source drops bad rows."""
    if not rows.drop:
        _check_lengths(found.lengths.tolist(), [rows.where(i) for i in indices], prompt_len, max_new_tokens, ADVICE)
    long = found.lengths > prompt_len
    left = (found.flaws == 0) & ~long
    counts = {REASONS[flaw]: int((found.flaws == flaw).sum()) for flaw in np.unique(found.flaws).tolist() if flaw}
    firsts = {REASONS[flaw]: first for flaw, first in found.errors.items()}
    if long.any():
        why = f"longer than the {prompt_len} tokens available for a prompt"
        index = int(indices[int(np.argmax(long))])
        counts[why], firsts[why] = int(long.sum()), excerpt(rows[index], rows.where(index))
    tally = Tally(
        len(indices), int(found.lengths[left].sum()), 0, 0, int((~left).sum()), reasons=counts, firsts=firsts,
        unread=found.unread, notes=(*rows.notes, *map(left_out_note, found.left_out.values(), found.left_out)),
    )  # fmt: skip
    if not left.any():
        raise UserError(
            f"{rows.path}: none of {len(indices)} prompts is left: {tally.describe_dropped()}; the first: "
            f"{next(iter(firsts.values()))}"
        )
    kept = (
        [indices[number] for number in np.flatnonzero(left).tolist()] if rows.generated else np.asarray(indices)[left]
    )
    return kept, tally


def _check_lengths(
    lengths: Sequence[int], wheres: Sequence[str], prompt_len: int, max_new_tokens: int = 0, advice: str = ""
) -> None:
    too_long = sum(length > prompt_len for length in lengths)
    if too_long:
        longest = max(lengths)
        excess = longest - prompt_len
        lower = ", or lower max_new_tokens by as much" if excess < max_new_tokens else ""
        more = f"; bad_rows drop leaves {'it' if too_long == 1 else 'them'} out, counted" if advice else ""
        raise UserError(
            f"{too_long} of {len(lengths)} prompts {'is' if too_long == 1 else 'are'} longer than the {prompt_len} tokens "
            f"available for them; the longest has {longest} ({wheres[lengths.index(longest)]}): raise seq_len by "
            f"{excess}{lower}{more}"
        )


def _endless(rows: Rows, order: Order) -> bool:
    return rows.generated and order.key is not None
