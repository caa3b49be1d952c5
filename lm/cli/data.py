"""Show what a stage is trained on: decoded batches, with the loss mask in colour.

  lm data quickstart --stage sft           two rows of the first batch
  lm data quickstart --stage sft --step 7  the rows that step 7 sees
  lm data FOLDER --sft.sources.0.path FILE rows as a published model reads them
  lm data quickstart --against FILE        which items of FILE it would train on

Tokens with loss are green. Where the output is not a terminal, or
NO_COLOR is set, they stand in ⟦ ⟧."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm.cli.arguments import EXPERIMENT_HELP, WEIGHTS_HELP, add_cache, at_least, check_stage, resolve_model
from lm.experiment import COLLECTED, Model, Source, Stage
from lm.web.text import visible

if TYPE_CHECKING:
    from lm.data.prompts import Prompts
    from lm.data.split import Places
    from lm.data.text_tokenizer import TextTokenizer
    from lm.types import TokenBatch

TAKES_OVERRIDES = True
GREEN, DIM, BOLD, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
Decode = Callable[[Sequence[int]], str]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm data EXPERIMENT|FOLDER [options] [--a.b.c VALUE ...]"
    parser.add_argument("experiment", metavar="EXPERIMENT", help=f"{EXPERIMENT_HELP}; {WEIGHTS_HELP}")
    parser.add_argument("--stage", metavar="NAME", help="only this stage; else all of them")
    parser.add_argument("--step", metavar="N", type=at_least(0), default=0, help="which batch, from 0 (%(default)s)")
    parser.add_argument(
        "--rows", metavar="N", type=at_least(1), default=2, help="rows, pairs or prompts of a batch (%(default)s)"
    )
    parser.add_argument(
        "--against",
        metavar="FILE",
        action="append",
        help="compare the items of a benchmark's file with the training data instead; can be repeated",
    )
    parser.add_argument(
        "--words",
        metavar="N",
        type=at_least(3, 1000),
        default=13,
        help="with --against: length of the n-grams (%(default)s)",
    )
    add_cache(parser)


def call(arguments: argparse.Namespace) -> int:
    experiment = resolve_model(arguments.experiment, arguments.overrides, Model())
    check_stage(arguments.stage, (stage.name for stage in experiment.stages), arguments.experiment)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    from lm.data.selection import check_files, held_out_elsewhere
    from lm.stored import cache_at
    from lm.train.stages import make_tokenizer

    check_files(experiment)
    with cache_at(arguments.cache):
        if arguments.against:
            sources = [
                one for stage in experiment.stages if arguments.stage in (None, stage.name) for one in stage.sources
            ]
            print("\n".join(against_lines(arguments.against, sources, held_out_elsewhere(experiment), arguments.words)))
            return 0
        if experiment.tokenizer.path is None:
            print("training the tokenizer …", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = make_tokenizer(experiment, Path(folder))
        elsewhere = held_out_elsewhere(experiment)
        print(legend(colour))
        for stage in experiment.stages:
            if arguments.stage in (None, stage.name):
                shown = arguments.step, arguments.rows, colour, elsewhere
                for line in stage_lines(stage, tokenizer, experiment.seed, *shown):
                    print(line)
    return 0


def on_interrupt(_: argparse.Namespace) -> str:
    """What an interrupted command has kept."""
    return "Files that were tokenised to their end are in the cache: the same command goes on after them"


def against_lines(files: Sequence[str], sources: Sequence[Source], elsewhere: Places, words: int) -> Iterator[str]:
    """What the training rows of sources have of the items of each file, and examples."""
    from lm.data.sources import rows_of
    from lm.evals.overlap import item_texts, overlaps

    for file in files:
        rows = rows_of(Source(file))
        found = overlaps([item_texts(rows[index]) for index in range(len(rows))], sources, elsewhere, words)
        yield f"{file}: {found.describe()}, {found.read / 1e6:,.1f} MB"
        yield from (f"  {line}" for line in found.examples())


def stage_lines(
    stage: Stage,
    tokenizer: TextTokenizer,
    seed: int,
    step: int,
    rows: int,
    colour: bool,
    elsewhere: Places | None = None,
) -> Iterator[str]:
    """Lines on a stage's data at a step: a heading, the counts of its data, and the batch's first rows.

    Args:
        elsewhere: keys held out by other sources of the experiment, left out of training.
    """
    from lm.data.pipeline import make_feed
    from lm.data.sources import NOWHERE
    from lm.rollout.episodes import make_tasks

    elsewhere = NOWHERE if elsewhere is None else elsewhere

    yield _paint(f"\n=== {stage.name}, step {step} ===", BOLD, colour)
    makers = [source.path for source in stage.sources if source.path.startswith(COLLECTED)]
    if makers:
        yield f"{makers[0]} is written by that stage of the run"
    elif stage.objective.samples:
        prompts = make_tasks(stage, tokenizer, seed, elsewhere).feed
        yield prompts.report()
        yield from prompt_lines(prompts.batch(step), tokenizer.show, rows, colour)
    else:
        feed = make_feed(stage, tokenizer, seed, elsewhere=elsewhere)
        yield feed.report()
        yield from batch_lines(feed.batch(step), tokenizer.show, rows, colour, paired=stage.objective.data == "pairs")


def batch_lines(batch: TokenBatch, decode: Decode, rows: int, colour: bool, paired: bool = False) -> Iterator[str]:
    """The first `rows` rows (or pairs) of a batch, each under its number and counts."""
    from lm.types import LabelledBatch

    names = ("chosen", "rejected") if paired else ("",)
    for index in range(min(rows * len(names), len(batch.tokens))):
        number, side = divmod(index, len(names))
        trained, real = int((batch.weights[index] > 0).sum()), int((batch.segments[index] > 0).sum())
        title = f"{'pair' if paired else 'row'} {number} {names[side]}".rstrip()
        if isinstance(batch, LabelledBatch):
            title += " desirable" if batch.desirable[index] else " undesirable"
        padding = len(batch.tokens[index]) - real
        yield _paint(f"\n--- {title}: {real} tokens, {trained} trained on, {padding} padding ---", BOLD, colour)
        tokens, weights, segments = (x[index].tolist() for x in (batch.tokens, batch.weights, batch.segments))
        yield render_row(tokens, weights, segments, decode, colour)


def prompt_lines(prompts: Prompts, decode: Decode, rows: int, colour: bool) -> Iterator[str]:
    """The first prompts of a rollout, each with the verifier's expected answer."""
    from lm.rollout.verifiers import expected_answer

    for index in range(min(rows, len(prompts.tokens))):
        length = int(prompts.lengths[index])
        yield _paint(f"\n--- prompt {index}: {length} tokens ---", BOLD, colour)
        real = prompts.tokens[index][len(prompts.tokens[index]) - length :]
        yield render_row(real, [0.0] * length, [1] * length, decode, colour)
        if right := expected_answer(prompts.rows[index]):
            yield _paint(f"right answer: {visible(right)}", BOLD, colour)


def render_row(
    tokens: Sequence[int], weights: Sequence[float], segments: Sequence[int], decode: Decode, colour: bool
) -> str:
    """Render a row as text: spans with loss green or in ⟦ ⟧, the rest dim or plain, padding left out.

    tokens, weights, segments: [T], as in lm.types.TokenBatch. A line marks where the next packed segment begins.
    """
    parts: list[str] = []
    real = [(int(t), w > 0, int(s)) for t, w, s in zip(tokens, weights, segments, strict=True) if s > 0]
    for number, (_, members) in enumerate(itertools.groupby(real, key=lambda item: item[2])):
        if number:
            parts.append("\n" + _paint(f"··· segment {number + 1} ···", BOLD, colour) + "\n")
        for trained, span in itertools.groupby(members, key=lambda item: item[1]):
            parts.append(_mark(visible(decode([token for token, _, _ in span])), trained, colour))
    return "".join(parts)


def legend(colour: bool) -> str:
    """The legend of the marks."""
    trained, read = _mark("trained on", True, colour), _mark("only read", False, colour)
    spelt = "text that only spells a control token has a backslash in it: <\\|im_end|\\>"
    return f"{trained}  {read}  (padding left out; ··· between packed examples; {spelt})"


def _mark(text: str, trained: bool, colour: bool) -> str:
    if colour:
        return _paint(text, GREEN if trained else DIM, True)
    return f"⟦{text}⟧" if trained else text


def _paint(text: str, code: str, colour: bool) -> str:
    """Colour a text line by line, so that a pager shows every line correctly."""
    return "\n".join(f"{code}{line}{PLAIN}" if line else line for line in text.split("\n")) if colour else text
