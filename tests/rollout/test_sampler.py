"""What the sampler says it sampled with is what the trainer computes; filters and stops do what their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.algorithms.grpo import spread
from lm.data.packing import left_pad
from lm.objectives.logprobs import token_logprobs
from lm.parallel.mesh import make_mesh
from lm.rollout.sampler import choose, completion_keys, filter_logits, inverse_cdf
from lm.rollout.slots import sample_tokens
from lm.types import NOTHING_SHARED, SharedPrompt
from tests.helpers import VOCAB, layout, tiny_model
from tests.rollout.rows import as_batch, generate

EOS, PAD = 1, 0


def prompts(rows=8, width=12, seed=0):
    rng = np.random.default_rng(seed)
    return left_pad([rng.integers(2, VOCAB, rng.integers(1, width + 1)).tolist() for _ in range(rows)], width, PAD)


def sample(model, tokens, lengths, temperature=1.0, seed=0, n=16, **options):
    return generate(
        model,
        tokens,
        lengths,
        jax.random.key(seed),
        temperature,
        max_new_tokens=n,
        end_ids=(EOS,),
        pad_id=PAD,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_sampler_and_trainer_agree(temperature):
    model, (tokens, lengths) = tiny_model(), prompts()
    out = jax.device_get(sample(model, tokens, lengths, temperature))
    batch = as_batch(tokens, lengths, out, np.ones(len(tokens)))
    logp = token_logprobs(model, jax.tree.map(jnp.asarray, batch), temperature).logp
    assert np.abs((logp - batch.old_logp) * batch.weights).max() < 1e-4
    assert batch.weights.sum() == out.mask.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 100.0}, {"top_k": 1}, {"top_p": 0.2}])
def test_rows_without_a_token_are_never_sampled_and_stay_in_the_normaliser(options):
    real, (tokens, lengths) = 20, prompts(rows=4)
    tokens = tokens % real
    model = tiny_model(tied_head=False)
    model.head.weight = model.head.weight.replace(model.head.weight[...].at[:, real:].multiply(30.0))  # the likeliest
    assert np.asarray(sample(model, tokens, lengths, **options).tokens).max() >= real
    out = jax.device_get(sample(model, tokens, lengths, vocab_size=real, **options))
    assert out.tokens.max() < real and (options.get("temperature") != 100 or len(np.unique(out.tokens)) > real // 2)
    batch = as_batch(tokens, lengths, out, np.ones(len(tokens)))
    logp = token_logprobs(model, jax.tree.map(jnp.asarray, batch), options.get("temperature") or 1.0).logp
    np.testing.assert_allclose(logp * batch.weights, batch.old_logp * batch.weights, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_ragged_prompts_are_answered_as_alone():
    model, (tokens, lengths) = tiny_model(), prompts(rows=4)
    assert len(set(lengths.tolist())) > 2
    together = sample(model, tokens, lengths, 0.0)
    for row, length in enumerate(lengths):
        alone = sample(model, tokens[row : row + 1, -length:], lengths[row : row + 1], 0.0)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


@pytest.mark.slow
def test_a_prompt_read_once_for_its_group_is_answered_as_read_for_each():
    model, (tokens, lengths) = tiny_model(), prompts()
    once = sample(model, tokens, lengths, 0.0, group_size=3)
    often = sample(model, np.repeat(tokens, 3, axis=0), np.repeat(lengths, 3), 0.0)
    np.testing.assert_array_equal(once.tokens, often.tokens)
    np.testing.assert_allclose(once.logp, often.logp, atol=1e-6)
    assert len({row.tobytes() for row in np.asarray(sample(model, tokens, lengths, group_size=3).tokens[:3])}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2}, {"data": 8}])  # two prompts a device; too few prompts
def test_groups_are_answered_alike_on_many_devices(sizes):
    model, (tokens, lengths) = tiny_model(), prompts(rows=4)
    alone = sample(model, tokens, lengths, group_size=4)
    with jax.set_mesh(make_mesh(layout(**sizes))):
        spread_out = sample(model, tokens, lengths, group_size=4)
    np.testing.assert_array_equal(alone.tokens, spread_out.tokens)


@pytest.mark.parametrize(("updates", "group"), [(1, 6), (2, 3), (3, 2), (4, None)])
def test_each_update_knows_which_of_its_rows_share_a_prompt(updates, group):
    tokens, lengths = prompts(rows=2)
    out = jax.device_get(sample(tiny_model(), tokens, lengths, group_size=6))
    batch = as_batch(np.repeat(tokens, 6, axis=0), np.repeat(lengths, 6), out, np.ones(12), group_size=6)
    pieces = spread(batch, updates)
    assert sum(piece.weights.sum() for piece in pieces) == out.mask.sum()
    for piece in pieces:
        assert piece.shared == (SharedPrompt(group, 12) if group else NOTHING_SHARED)
        for row in range(len(piece.tokens) if group else 0):
            for field in (piece.tokens, piece.segments, piece.positions):
                np.testing.assert_array_equal(field[row, :12], field[row - row % group, :12])
        assert not piece.weights[:, :12].any()


def test_rows_end_at_eos_and_stay_ended():
    model, (tokens, lengths) = tiny_model(), prompts(rows=64)
    out = sample(model, tokens, lengths, 2.0, n=40)
    ended = 0
    for row, mask in zip(np.asarray(out.tokens), np.asarray(out.mask), strict=True):
        size = mask.sum()
        assert mask[:size].all() and EOS not in row[: size - 1]
        assert (row[size:] == PAD).all()
        ended += size < 40
        assert size == 40 or row[size - 1] == EOS
    assert ended > 0


def test_other_temperatures_do_not_compile_again():
    model, (tokens, lengths) = tiny_model(), prompts()
    sample(model, tokens, lengths, 0.5)
    size = sample_tokens._cache_size()
    for temperature in (0.0, 0.9, 1.3):
        sample(model, tokens, lengths, temperature, seed=3)
    assert sample_tokens._cache_size() == size


@pytest.mark.slow
def test_random_numbers_belong_to_the_completion():
    """Of the group's size and of the number of prompts nothing depends."""
    model, (tokens, lengths) = tiny_model(), prompts(rows=4)
    few, many = (sample(model, tokens[:p], lengths[:p], group_size=g).tokens for p, g in ((2, 3), (4, 5)))
    np.testing.assert_array_equal(few.reshape(2, 3, -1), many.reshape(4, 5, -1)[:2, :3])


@pytest.mark.parametrize("size", [3, 128, 1000])
def test_sampling_by_pieces_of_the_vocabulary_is_the_inverse_cdf(size):
    rng = np.random.default_rng(size)
    odds = rng.random((200, size)) * (rng.random((200, size)) < 0.3)
    odds[:, size // 2] += 0.1
    uniform = rng.random(200).astype(np.float32)
    uniform[:2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    found = np.asarray(inverse_cdf(jnp.float32(odds), jnp.asarray(uniform)))
    assert (odds[np.arange(200), found] > 0).all()
    mass = np.cumsum(odds, axis=-1) / odds.sum(-1, keepdims=True)
    before = np.where(found > 0, mass[np.arange(200), found - 1], 0)
    assert (before <= uniform + 1e-5).all() and (mass[np.arange(200), found] >= uniform - 1e-5).all()


@pytest.mark.slow
def test_frequencies_are_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05, 0.0]))
    rows = jnp.broadcast_to(logits, (20_000, 5))
    number = jnp.arange(len(rows))
    keys = completion_keys(jax.random.key(0), number // 8, number % 8)
    token, logp = choose(rows, keys, 0 * number, jnp.float32(1.0))
    counts = np.bincount(token, minlength=5) / len(token)
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05, 0.0], atol=0.015)
    np.testing.assert_allclose(logp, logits[token], atol=1e-5)
    token, _ = choose(rows, keys, 0 * number + 1, jnp.float32(0.5))
    sharper = np.array([0.5, 0.3, 0.15, 0.05, 0.0]) ** 2
    np.testing.assert_allclose(np.bincount(token, minlength=5) / len(token), sharper / sharper.sum(), atol=0.015)


@pytest.mark.parametrize(
    "options, kept",
    [((2, 1.0), 2), ((0, 0.49), 1), ((0, 0.79), 2), ((0, 0.81), 3), ((3, 0.6), 2), ((0, 1e-9), 1), ((99, 1.0), 5)],
)
def test_top_k_and_top_p_keep_the_smallest_set(options, kept):
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.04, 0.3, 0.01]]))
    assert int(jnp.isfinite(filter_logits(logits, *options)).sum()) == kept
