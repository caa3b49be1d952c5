"""Log-likelihoods of continuations: packed, shared and cut as one alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.evals import continuations
from lm.evals.continuations import WIDTH, Continuation, _trees, score_continuations
from lm.experiment import UserError
from tests.helpers import VOCAB, tiny_model

LONGEST = 32


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_len=LONGEST)


@jax.jit
def log_probabilities(model, row, segments):
    hidden, _ = model.hidden(row, jnp.arange(row.shape[1])[None], segments)
    return jax.nn.log_softmax(model.logits(hidden[0]).astype(jnp.float32))


def alone(model, context, tokens):
    """Reference: the logits of a row that holds nothing else; padding after it, so that one program does for all."""
    row = [*context, *tokens][-(LONGEST + 1) : -1]
    padded, real = np.zeros((1, LONGEST), np.int32), np.arange(LONGEST)[None] < len(row)
    padded[0, : len(row)] = row
    logp = np.asarray(log_probabilities(model, padded, real.astype(np.int32)))[len(row) - len(tokens) : len(row)]
    chosen = logp[np.arange(len(tokens)), np.array(tokens)]
    return float(chosen.sum()), bool((chosen >= logp.max(-1)).all())


def requests(count, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Continuation(draw.integers(0, VOCAB, draw.integers(1, 40)).tolist(), draw.integers(0, VOCAB, draw.integers(1, 9)).tolist())
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.slow
def test_packed_continuations_have_the_likelihood_of_each_alone(model, monkeypatch):
    monkeypatch.setattr(continuations, "TOKENS_ON_CPU", 4 * LONGEST)  # several forward passes
    asked = requests(40)
    for one, found in zip(asked, score_continuations(model, asked), strict=True):
        logp, greedy = alone(model, one.context, one.tokens)
        assert found.logp == pytest.approx(logp, abs=1e-4) and found.greedy == greedy


def test_short_continuations_fill_the_rows(model, monkeypatch):
    monkeypatch.setattr(continuations, "TOKENS_ON_CPU", 4 * LONGEST)
    draw = np.random.default_rng(2)
    asked = [Continuation([place], [2] * int(size)) for place, size in enumerate(draw.integers(1, 20, 60))]
    passes: list[dict] = []
    score_continuations(model, asked, passes.append)
    tokens = sum(len(one.context) + len(one.tokens) - 1 for one in asked)
    assert len(passes) <= np.ceil(1.05 * tokens / (4 * LONGEST))


def test_single_tokens_after_one_context_are_read_once(model):
    context = requests(1)[0].context
    seen: list[dict] = []
    asked = [Continuation(context, [token]) for token in range(VOCAB)]
    found = score_continuations(model, asked, seen.append)
    assert len(seen) == 1 and sorted(seen[0]) == list(range(VOCAB))
    assert sum(np.exp(one.logp) for one in found) == pytest.approx(1, abs=1e-5)
    assert sum(one.greedy for one in found) == 1


@pytest.mark.parametrize("scores", [continuations.SCORES, 0])
def test_continuations_of_one_context_do_not_see_each_other(model, monkeypatch, scores):
    monkeypatch.setattr(continuations, "SCORES", scores)  # with 0 each is read alone
    draw = np.random.default_rng(1)
    contexts = [one.context for one in requests(3)]
    said = [draw.integers(0, VOCAB, size).tolist() for size in (1, 4, 7, 2, 4)]
    asked = [Continuation(context, tokens) for context in contexts for tokens in [*said, said[1][:3], [*said[1], 5]]]
    for one, found in zip(asked, score_continuations(model, asked), strict=True):
        logp, greedy = alone(model, one.context, one.tokens)
        assert found.logp == pytest.approx(logp, abs=1e-4) and found.greedy == greedy


def test_a_short_context_is_read_again_where_attention_to_all_its_continuations_takes_longer(model):
    pairs_per_token, long = 3 * model.config.embed_dim, 10_000
    said = [[1 + place % 9, *(place // 9**digit % 9 for digit in range(1, 5)), *range(15)] for place in range(300)]

    def sizes(context):
        return [
            len(tree.tokens)
            for tree in _trees([Continuation(context, one) for one in said], long, long, pairs_per_token)
        ]

    short = sizes([1])
    assert max(short) <= WIDTH and len(short) <= np.ceil(300 * 19 / (WIDTH - 20))  # they fill the shortest rows
    assert sizes([1] * 4000) == [4000 + 300 * 19]


@pytest.mark.parametrize("one", [Continuation([], [1]), Continuation([1], []), Continuation([1], [1] * (LONGEST + 1))])
def test_what_cannot_be_scored_is_refused(model, one):
    with pytest.raises(UserError, match="a continuation has"):
        score_continuations(model, [one])
