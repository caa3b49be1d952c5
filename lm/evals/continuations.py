"""Log-likelihoods of continuations after contexts, packed into rows; each context is read once for all its continuations."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from lm.between_batches import between_batches
from lm.evals.rows import rounded
from lm.experiment import UserError
from lm.model.transformer import Transformer
from lm.objectives.logprobs import logprobs_at
from lm.parallel.distributed import fetch
from lm.parallel.rules import platform

# Tokens of one forward pass, which bound its memory. A CPU takes no longer for the same tokens in more passes, and the last one
# has less padding.
TOKENS, TOKENS_ON_CPU = 8192, 2048
SCORES = 1 << 28  # attention scores of one layer where rows have branches, by plain attention: bounds memory too
WIDTH = 256  # tokens of the shortest rows: short inputs lie several to a row, and few shapes compile
SCORED = 256  # the tokens that a forward pass scores are rounded up to a multiple of this, so that few shapes compile


@dataclass(frozen=True)
class Continuation:
    """Tokens to score after the tokens of a context, both at least one."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """Log-probability of a continuation in nats, and whether each of its tokens is the most likely one."""

    logp: float
    greedy: bool


class _Tree:
    """A context with several continuations: tokens that are read once, and the places that predict each continuation.

    The tokens are those of the context, whose branch is 0, and after them those of each branch: a continuation without its last
    token, which predicts nothing. Continuations of one token have no branch, and equal ones share theirs.
    """

    def __init__(self, context: tuple[int, ...]):
        self.context = len(context)
        self.tokens, self.branches, self.positions = list(context), [0] * len(context), list(range(len(context)))
        self.starts: dict[tuple[int, ...], int] = {}  # places of the first tokens of the branches
        self.scored: list[tuple[int, tuple[int, ...], range]] = []  # (request, targets, places of its branch)

    def fits(self, said: tuple[int, ...], most: int, pairs_per_token: int) -> bool:
        """Whether a further continuation belongs in this tree instead of another one, which reads the context again.

        It does if the tree has no more tokens with it, or at most `most` of them, and fits in the shortest row or takes less
        time: reading a token takes that of `pairs_per_token` pairs of tokens in attention.
        """
        old, new = len(self.tokens), 0 if said[:-1] in self.starts else len(said) - 1
        return not new or (old + new <= most and (old + new <= WIDTH or new * old <= pairs_per_token * self.context))

    @property
    def branched(self) -> bool:
        """Whether some tokens do not see others before them: one branch alone continues its context."""
        return max(self.branches) > 1

    def add(self, index: int, said: tuple[int, ...]) -> None:
        """Add the continuation of a request."""
        branch, size = said[:-1], len(said) - 1
        if branch not in self.starts:
            self.starts[branch] = len(self.tokens)
            self.tokens += branch
            self.branches += [1 + max(self.branches)] * size
            self.positions += range(self.context, self.context + size)
        start = self.starts[branch]
        self.scored.append((index, said, range(start, start + size)))


def score_continuations(
    model: Transformer,
    requests: Sequence[Continuation],
    done: Callable[[dict[int, Likelihood]], None] = lambda found: None,
) -> list[Likelihood]:
    """The likelihood of each continuation given its context.

    Tokens of a context before the last `max_len` + 1 of all are left out, as lm-evaluation-harness does. Continuations of one
    context, such as the choices of a question, read it once.

    Args:
        done: called after each forward pass with its results by index.

    Raises:
        UserError: a continuation alone is longer than the context of the model.
    """
    longest = model.config.max_len
    most = min(longest, math.isqrt(SCORES // model.config.num_heads))
    found: dict[int, Likelihood] = {}
    # A layer has about 12 d^2 parameters, 2 FLOPs each, and a pair 4 d FLOPs, which rows with branches take both ways.
    trees = _trees(requests, longest, most, 3 * model.config.embed_dim)
    for branched in (False, True):  # apart, so that rows with branches are at most as wide as SCORES allows
        for rows in _packed([one for one in trees if one.branched == branched], longest):
            between_batches()
            new = _score(model, rows, longest)
            done(new)
            found |= new
    return [found[index] for index in range(len(requests))]


def _trees(requests: Sequence[Continuation], longest: int, most: int, pairs_per_token: int) -> list[_Tree]:
    """The requests by their contexts, as many to a tree as `_Tree.fits` allows, at least one."""
    trees: dict[tuple[int, ...], list[_Tree]] = {}
    for index, one in enumerate(requests):
        if not one.context or not 0 < len(one.tokens) <= longest:
            raise UserError(
                f"a continuation has {len(one.tokens)} tokens after {len(one.context)}; it should have from 1 to model.max_len "
                f"{longest}, after at least 1"
            )
        context, said = tuple(one.context[-(longest + 1 - len(one.tokens)) :]), tuple(one.tokens)
        known = trees.setdefault(context, [])
        if not known or not known[-1].fits(said, most, pairs_per_token):
            known.append(_Tree(context))
        known[-1].add(index, said)
    return [tree for known in trees.values() for tree in known]


def _packed(trees: Sequence[_Tree], longest: int) -> Iterator[list[list[_Tree]]]:
    """Rows of trees for one forward pass after another: each begins with the longest tree left, and the longest that fit follow."""
    left = sorted(trees, key=lambda one: len(one.tokens))
    sizes = [len(one.tokens) for one in left]
    while left:
        width = _width(left[-1], longest)
        rows: list[list[_Tree]] = []
        while left and len(rows) < _most_rows(width):
            rows.append([])
            room = width
            while place := bisect.bisect_right(sizes, room):
                room -= sizes.pop(place - 1)
                rows[-1].append(left.pop(place - 1))
        yield rows


def _most_rows(width: int) -> int:
    """Rows of one forward pass."""
    return max(1, (TOKENS_ON_CPU if platform() == "cpu" else TOKENS) // width)


def _width(one: _Tree, longest: int) -> int:
    """Width of the rows of a forward pass whose longest tree is `one`."""
    return min(max(WIDTH, row_width(len(one.tokens), longest)), longest)


def row_width(size: int, longest: int) -> int:
    """Width of rows whose longest input has `size` tokens: few widths, at most an eighth wider than it."""
    step = max(16, 1 << max(0, (size - 1).bit_length() - 3))
    return min(rounded(-(-size // step) * step, longest), longest)


def _score(model: Transformer, rows: Sequence[Sequence[_Tree]], longest: int) -> dict[int, Likelihood]:
    """The likelihoods of the continuations in one batch of rows."""
    width = _width(rows[0][0], longest)
    # A batch that is not full, such as the last one, has a power of two of rows.
    count = min(_most_rows(width), 1 << (len(rows) - 1).bit_length())
    tokens, segments, positions, branches = np.zeros((4, count, width), np.int32)
    where: list[int] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []  # (request, number of its tokens)
    for row, trees in enumerate(rows):
        start = 0
        for number, one in enumerate(trees, start=1):
            part = slice(start, start + len(one.tokens))
            tokens[row, part], segments[row, part] = one.tokens, number
            positions[row, part] = one.positions
            if one.branched:
                branches[row, part] = one.branches
            for index, said, places in one.scored:
                where += (row * width + start + place for place in (one.context - 1, *places))
                targets += said
                owners.append((index, len(said)))
            start = part.stop
    padding = -len(where) % SCORED
    logp, correct = fetch(
        _logprobs(
            model, tokens, positions, segments, branches if branches.any() else None,
            np.pad(where, (0, padding)), np.pad(targets, (0, padding)),
        )
    )  # fmt: skip
    starts = np.cumsum([0, *(size for _, size in owners)])[:-1]
    sums = np.add.reduceat(logp.astype(np.float64)[: len(where)], starts)
    least = np.minimum.reduceat(correct[: len(where)], starts)
    return {index: Likelihood(float(sums[i]), bool(least[i])) for i, (index, _) in enumerate(owners)}


@jax.jit
def _logprobs(
    model: Transformer,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"] | None,
    where: Int[Array, " N"],
    targets: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-probabilities of targets predicted at the flat places `where`, and 1 where they are the most likely."""
    model = model.with_whole_tables()
    hidden, _ = model.hidden(tokens, positions, segments, branches=branches)
    return logprobs_at(model, hidden.reshape(-1, hidden.shape[-1])[where], targets)
