"""Which rows an experiment trains on and which it measures on, and the plain texts and rows taken from them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from lm.data.order import mixture_shares
from lm.data.sources import Rows, load_rows, split_key, split_rows, texts_of, why_missing
from lm.data.tokenizer import TRAINING_BYTES
from lm.experiment import MADE, Experiment, Source, UserError

Split = Literal["train", "heldout"]
TOKENIZER_ROWS = 500  # generated rows that a tokenizer learns from


def select(source: Source, split: Split) -> tuple[Rows, Sequence[int]]:
    """The rows of a source and the indices of one side of its split. Raises UserError if that side is empty."""
    rows = load_rows(source.path)
    train, heldout = split_rows(rows, source.holdout)
    indices = heldout if split == "heldout" else train
    if not len(indices):
        what = "holds out not one row; raise it" if split == "heldout" else "leaves no row for training; lower it"
        raise UserError(f"{source.path}: holdout {source.holdout} {what} (there are {len(rows)} rows)")
    return rows, indices


def heldout_texts(source: Source, max_bytes: int) -> list[str]:
    """Held-out documents in fixed order, max_bytes of UTF-8 in all (the last one may be cut): for bits per byte."""
    rows, indices = select(source, "heldout")
    texts: list[str] = []
    room = max_bytes
    for index in indices:
        text = rows[index].get("text")
        if not isinstance(text, str):
            raise UserError(f"{rows.where(index)}: bits per byte need the column text; found {', '.join(rows[index])}")
        encoded = text.encode(errors="replace")
        if piece := encoded[: max(0, room)].decode(errors="ignore"):
            texts.append(piece)
        room -= len(encoded)
        if room <= 0:
            break
    return texts


def heldout_rows(source: Source, count: int) -> list[dict[str, Any]]:
    """The first `count` held-out rows in fixed order, no two of which ask the same; fewer where there are no more."""
    rows, indices = select(source, "heldout")
    chosen: dict[str | None, dict[str, Any]] = {}
    for index in indices:
        chosen.setdefault(split_key(rows[index]), rows[index])
        if len(chosen) == count:
            break
    return list(chosen.values())


def tokenizer_texts(experiment: Experiment) -> list[str]:
    """Training text of every source of every stage, for `Tokenizer.train`: the same share of bytes for each.

    Generated sources have few words: a few hundred rows show them all, and leave the vocabulary to the others.
    """
    used = [source for stage in experiment.stages for source in stage.sources if source.weight > 0]
    sources = {source.path: source for source in used if not source.path.startswith(MADE)}
    share = TRAINING_BYTES // max(1, len(sources))
    texts: list[str] = []
    for source in sources.values():
        rows, indices = select(source, "train")
        if rows.generated:
            texts += [text for place in range(TOKENIZER_ROWS) for text in texts_of(rows[indices[place]])]
        else:
            texts += _evenly(rows, np.asarray(indices), share)
    return texts


def _evenly(rows: Rows, indices: Int[np.ndarray, " N"], characters: int) -> list[str]:
    """Texts of the rows, evenly spread and about so many characters in all; only what is taken is read."""
    known = rows.measures
    ends = np.cumsum(known.texts[indices])
    number = int(ends[-1])
    keep = min(number, -(-number * characters // max(1, int(known.characters[indices].sum()))))
    wanted = np.arange(keep) * number // max(1, keep)
    texts: list[str] = []
    for place, those in itertools.groupby(wanted.tolist(), key=lambda text: int(np.searchsorted(ends, text, "right"))):
        found = texts_of(rows[indices[place]])
        texts += [found[text - int(ends[place])] for text in those]  # counted from the row's last
    return texts


def check_sources(experiment: Experiment) -> None:
    """Raise UserError for weights and holdouts that make no sense, and where one part of the experiment holds out
    what another trains on, naming both."""
    for stage in experiment.stages:
        shares(stage.sources, stage.name)
    users = [(stage.name, source) for stage in experiment.stages for source in stage.sources]
    users += [(f"evaluation {item.name}", item.source) for item in experiment.evals]
    seen: dict[str, tuple[str, float]] = {}
    for user, source in users:
        if not 0.0 <= source.holdout <= 1.0:
            raise UserError(f"{user}: holdout of {source.path} is {source.holdout}; it must be from 0 to 1")
        first, holdout = seen.setdefault(_content(source.path), (user, source.holdout))
        if holdout != source.holdout:
            raise UserError(
                f"{source.path} has holdout {source.holdout} in {user}, and {first} has {holdout} for the same rows: "
                "what one holds out the other trains on; give both the same holdout"
            )


def check_files(experiment: Experiment) -> None:
    """Raise UserError for a source, of a stage or an evaluation, whose file is not there; says which flag names it."""
    sources = {f"{s.name}.sources.{i}": source for s in experiment.stages for i, source in enumerate(s.sources)}
    sources |= {f"evals.{item.name}.source": item.source for item in experiment.evals}
    for name, source in sources.items():
        if missing := why_missing(source.path):
            raise UserError(f"{missing} (--{name}.path FILE names another)")


def shares(sources: Sequence[Source], user: str = "stage") -> list[Fraction]:
    """The sources' weights as `lm.data.order.mixture` takes them."""
    weights = [source.weight for source in sources]
    if not weights:
        raise UserError(f"{user}: sources is empty; name at least one source")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError(f"{user}: the weights of the sources are {weights}; they must be 0 or more, and one above 0")
    return mixture_shares(weights)


def fingerprint(sources: Sequence[Source], rows: Sequence[Rows], tokenizer_fingerprint: str) -> str:
    """sha256 over what a feed is made of: contents, weights, holdouts and the tokenizer."""
    parts = [[r.fingerprint, s.weight, s.holdout] for s, r in zip(sources, rows, strict=True)]
    return hashlib.sha256(json.dumps([parts, tokenizer_fingerprint]).encode()).hexdigest()


def order_key(seed: int, name: str, number: int) -> int:
    """A 64-bit key for the order of source `number`, another for each seed and stage."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()[:8], "big")


def _content(path: str) -> str:
    """One name for paths that share keys: the same file, or generators that ask the same questions."""
    if path.startswith("tfds:python_docs"):
        return "gen:docs"
    if path.startswith(("gen:", "tfds:")):
        return {"gen:preferences": "gen:instruct"}.get(path, path)
    return str(Path(path).expanduser().resolve())
