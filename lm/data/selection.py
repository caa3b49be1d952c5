"""Selection of rows: which rows of a source are trained on, which are held out, and texts for the tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from lm.data import dataset_folder
from lm.data.order import mixture_shares
from lm.data.readers import Row
from lm.data.sources import GENERATED, NOWHERE, Rows, rows_of, split_rows, texts_of, why_missing
from lm.data.split import Places, has_key, split_key, split_place
from lm.data.tokenizer import TRAINING_BYTES
from lm.experiment import COLLECTED, Experiment, Source, UserError, resolve_sources

Split = Literal["train", "heldout"]
WITHHELD = "held out by another source"  # reason why rows are left out of training
TOKENIZER_ROWS = 500  # generated rows that a tokenizer is trained on


class EmptySplit(UserError):
    """Raised where the requested side of a source's split has no row."""


def select(source: Source, split: Split, elsewhere: Places = NOWHERE) -> tuple[Rows, Sequence[int]]:
    """A source's rows and the indices of one side of its split. Raises EmptySplit if that side has no row.

    Args:
        elsewhere: keys held out by other sources (`held_out_elsewhere`), left out of training here.
    """
    rows = rows_of(source)
    train, heldout = split_rows(rows, source.holdout, elsewhere)
    indices = heldout if split == "heldout" else train
    if not len(indices):
        raise EmptySplit(_why_empty(source, rows, split, withheld(source, rows, elsewhere)))
    return rows, indices


def _why_empty(source: Source, rows: Rows, split: Split, withheld: int) -> str:
    """One line that says why a side of the split has no row, and what would work."""
    what = "holds out no row; raise it" if split == "heldout" else "leaves no row for training; lower it"
    line = f"{source.path}: holdout {source.holdout} {what}"
    if withheld and split == "train":
        line = (
            f"{source.path}: no row is left for training: another source of the experiment holds out all {withheld} rows that "
            f"holdout {source.holdout} leaves; where both should read the same rows, name the same file in both"
        )
    if rows.generated:
        return line
    keys = len(np.unique(rows.measures.places))
    if keys == 1 < len(rows):
        row = rows[0]
        by = "key" if has_key(row) else "question"
        shown = split_key(row)
        return f"{line} (all {len(rows)} rows have the same {by}, {shown!r:.60}, and are on one side)"
    known = "" if keys == len(rows) else f", {keys} different prompts"
    return f"{line} (there are {len(rows)} rows{known})"


def withheld(source: Source, rows: Rows, elsewhere: Places) -> int:
    """Number of a source's training rows that other sources hold out; 0 for generated rows."""
    if rows.generated or not len(elsewhere):
        return 0
    places = rows.measures.places
    return int((np.isin(places, elsewhere) & (places >= source.holdout)).sum())


def held_out_elsewhere(experiment: Experiment) -> Places:
    """Keys (as places in the split) that one source holds out and another, with a smaller holdout, could train on.

    Sources written by a Collect stage of the run contribute nothing here, so that every start of the run agrees. A
    generator contributes the prompts of evals, which are its first held-out rows; different generators have different prompts.
    """
    experiment = resolve_sources(experiment)
    trained = [source for stage in experiment.stages for source in stage.sources]
    least = min((source.holdout for source in trained), default=1.0)
    found = [NOWHERE]
    for source in dict.fromkeys([*trained, *(item.source for item in experiment.evals)]):
        others = [one for one in trained if one.holdout < source.holdout]
        made = _is_generator(source.path) and all(_is_generator(one.path) for one in others)
        if not others or made or source.path.startswith(COLLECTED):
            continue
        rows = rows_of(source)
        if rows.generated:
            places = np.array([split_place(split_key(rows[i])) for i in split_rows(rows, source.holdout)[1]])
        else:
            places = rows.measures.places
        found.append(np.array(places[(places >= least) & (places < source.holdout)]))
    return np.unique(np.concatenate(found))


def trained_places(sources: Sequence[Source], elsewhere: Places) -> Places:
    """Keys (as places in the split) of the rows that these sources train on, generated rows excluded."""
    found = [NOWHERE]
    for source in sources:
        rows = rows_of(source)
        if not rows.generated:
            found.append(rows.measures.places[np.asarray(split_rows(rows, source.holdout, elsewhere)[0], np.int64)])
    return np.unique(np.concatenate(found))


def held_out_but_trained(
    collected: Source, asked: Sequence[Source], trained: Sequence[Source], elsewhere: Places
) -> tuple[int, int]:
    """(number of held-out prompts of a collected source, number of these that earlier stages train on).

    Args:
        asked: the sources of the collected prompts, to recognise generated prompts.
        trained: the sources of stages that train before the collected source is read.
    """
    places = rows_of(collected).measures.places
    held_out = np.unique(places[places < collected.holdout])
    known, contents = np.isin(held_out, trained_places(trained, elsewhere)), {_content(one.path) for one in asked}
    for source in trained:
        if rows_of(source).generated and _content(source.path) in contents:
            known |= held_out >= source.holdout
    return len(held_out), int(known.sum())


def heldout_rows(source: Source) -> Iterator[tuple[Row, str]]:
    """Held-out rows in fixed order, each with its location for messages. Raises UserError if there are none."""
    rows, indices = select(source, "heldout")
    for index in indices:
        yield rows[index], rows.where(index)


def tokenizer_texts(experiment: Experiment, elsewhere: Places = NOWHERE) -> list[str]:
    """Training texts of all sources of all stages, for `SubwordTokenizer.train`: the same share of bytes for each.

    Generated sources have few words: a few hundred rows contain all of them, and leave the vocabulary to the other sources.
    """
    used = [source for stage in experiment.stages for source in stage.sources if source.weight > 0]
    sources = {(source.path, source.columns): source for source in used if not source.path.startswith(COLLECTED)}
    share = TRAINING_BYTES // max(1, len(sources))
    texts: list[str] = []
    for source in sources.values():
        rows, indices = select(source, "train", elsewhere)
        if rows.generated:
            texts += [text for place in range(TOKENIZER_ROWS) for text in texts_of(rows[indices[place]])]
        else:
            texts += _evenly(rows, np.asarray(indices), share)
    if not any(texts) and sources:
        first = rows_of(next(iter(sources.values())))
        found = ", ".join(map(str, first[0])) or "none"
        raise UserError(
            f"{first.where(0)}: no text to train a tokenizer or a model on; the columns found are {found:.200}"
        )
    return texts


def _evenly(rows: Rows, indices: Int[np.ndarray, " N"], characters: int) -> list[str]:
    """Evenly spread texts of the rows, about `characters` in all; only the texts returned are read."""
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
    """Raise UserError for invalid weights and holdouts, and where one part of the experiment holds out
    rows that another trains on, naming both."""
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
                f"{source.path} has holdout {source.holdout} in {user} and {holdout} in {first}: "
                "one would train on rows that the other holds out; give both the same holdout"
            )


def check_files(experiment: Experiment) -> None:
    """Raise UserError for a source of a stage or eval whose file is missing; names the flag of its path."""
    sources = {f"{s.name}.sources.{i}": source for s in experiment.stages for i, source in enumerate(s.sources)}
    sources |= {f"evals.{item.name}.source": item.source for item in experiment.evals}
    for name, source in sources.items():
        if missing := why_missing(source.path):
            raise UserError(f"{missing} (--{name}.path FILE names another)")


def shares(sources: Sequence[Source], user: str = "stage") -> list[Fraction]:
    """The sources' weights as the shares for `lm.data.order.mixture`."""
    weights = [source.weight for source in sources]
    if not weights:
        raise UserError(f"{user}: sources is empty; name at least one source")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError(f"{user}: the weights of the sources are {weights}; they must be 0 or more, and one above 0")
    return mixture_shares(weights)


def fingerprint(
    sources: Sequence[Source], rows: Sequence[Rows], tokenizer_fingerprint: str, elsewhere: Places = NOWHERE
) -> str:
    """SHA-256 over everything that determines a feed: contents, weights, holdouts, keys held out elsewhere, tokenizer."""
    parts: list[list[Any]] = [[r.fingerprint, s.weight, s.holdout] for s, r in zip(sources, rows, strict=True)]
    for part, source, of in zip(parts, sources, rows, strict=True):
        taken = elsewhere if of.generated else np.intersect1d(elsewhere, of.measures.places)
        if len(taken := taken[taken >= source.holdout]):
            part.append(hashlib.sha256(taken.tobytes()).hexdigest())
        part += [of.reading()] if of.reading() else []
    return hashlib.sha256(json.dumps([parts, tokenizer_fingerprint]).encode()).hexdigest()


def order_key(seed: int, name: str, number: int) -> int:
    """A 64-bit key of the order of source `number`, different for each seed and stage."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()[:8], "big")


def _content(path: str) -> str:
    """One name for all paths with the same keys: the same file, or generators with the same prompts."""
    if path.startswith("tfds:python_docs"):
        return "gen:docs"
    if path.startswith((*GENERATED, "tfds:")):
        return {"gen:preferences": "gen:instruct"}.get(path, path)
    if "\0" in path:
        return path
    found = dataset_folder.find(path)
    return os.path.realpath(found.name if found else os.path.expanduser(path))


def _is_generator(path: str) -> bool:
    return _content(path).startswith(GENERATED)
