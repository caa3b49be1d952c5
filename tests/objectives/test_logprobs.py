"""lm/objectives/logprobs.py: right numbers, right place, right size in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from objective_checks import DTYPES, assert_close, golden_cases, numeric_gradient, precision, shifted_logprobs

from lm.experiment import Model
from lm.model.transformer import Transformer
from lm.objectives.logprobs import TokenStats, token_logprobs
from lm.types import TokenBatch, pytree

STATISTICS = ("logp", "lse", "correct", "entropy", "mean_logp", "log_sum_sq")


@pytree
class Tiny:
    """As much of a language model as token_logprobs needs; each hidden state knows the tokens so far."""

    embed: Float[Array, "V D"]
    head: Float[Array, "D V"]
    config = Model()  # no field: the same for all

    def with_whole_tables(self):
        return self

    def hidden(self, tokens, positions, segments):
        states = jnp.tanh(jnp.cumsum(self.embed[tokens], axis=1) + 0.1 * positions[..., None])
        return states * (segments > 0)[..., None], {}

    def logits(self, hidden):
        return hidden @ self.head


def tiny(rows: int = 3, time: int = 11, vocab: int = 17, width: int = 5) -> tuple[Tiny, TokenBatch]:
    rng = np.random.default_rng(0)
    model = Tiny(jnp.asarray(rng.normal(size=(vocab, width))), jnp.asarray(rng.normal(size=(width, vocab))))
    tokens = jnp.asarray(rng.integers(0, vocab, (rows, time)), jnp.int32)
    weights = jnp.asarray(rng.random((rows, time)))
    positions = jnp.broadcast_to(jnp.arange(time), tokens.shape)
    return model, TokenBatch(tokens, weights, jnp.ones_like(tokens), positions)


def by_hand(logits: np.ndarray, tokens: np.ndarray, temperature: float) -> dict[str, np.ndarray]:
    """The same statistics, one token after another."""
    out = {name: np.zeros(tokens.shape) for name in STATISTICS}
    for b, t in np.ndindex(*tokens.shape):
        if t > 0:
            scores = logits[b, t - 1] / temperature
            out["lse"][b, t] = np.log(np.exp(scores).sum())
            logp = scores - out["lse"][b, t]
            out["logp"][b, t] = logp[tokens[b, t]]
            out["correct"][b, t] = np.argmax(logp) == tokens[b, t]
            out["entropy"][b, t] = -(np.exp(logp) * logp).sum()
            out["mean_logp"][b, t] = logp.mean()
            out["log_sum_sq"][b, t] = np.log((np.exp(logp) ** 2).sum())
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_a_loop_over_tokens(dtype, temperature):
    rng = np.random.default_rng(1)
    logits, tokens = 2 * rng.normal(size=(2, 6, 9)), rng.integers(0, 9, (2, 6))
    tokens[:, 3] = logits[:, 2].argmax(-1)
    expected = by_hand(logits, tokens, temperature)
    with precision(dtype) as tolerance:
        stats = shifted_logprobs(
            jnp.asarray(logits, dtype), jnp.asarray(tokens), temperature, want_mean_logp=True, want_log_sum_sq=True
        )
        for name, values in expected.items():
            assert getattr(stats, name).dtype == dtype
            assert_close(getattr(stats, name), values, tolerance, name)


def test_gradient_equals_finite_differences():
    rng = np.random.default_rng(2)
    logits, tokens = rng.normal(size=(2, 4, 5)), rng.integers(0, 5, (2, 4))
    coefficients = {name: rng.normal(size=(2, 4)) for name in ("logp", "lse", "entropy", "mean_logp")}

    def mixed(stats: dict, xp):
        return sum(xp.sum(c * stats[name]) for name, c in coefficients.items())

    def ours(logits):
        stats = shifted_logprobs(logits, jnp.asarray(tokens), 0.7, want_mean_logp=True)
        return mixed({name: getattr(stats, name) for name in coefficients}, jnp)

    with precision("float64"):
        expected = numeric_gradient(lambda x: mixed(by_hand(x, tokens, 0.7), np), logits)
        assert_close(jax.grad(ours)(jnp.asarray(logits)), expected, 1e-8, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_logprobs_and_entropy(golden, dtype):
    for case in golden_cases(golden, "sft", dtype):
        with precision(dtype) as tolerance:
            stats = shifted_logprobs(jnp.asarray(case.inputs["logits"]), jnp.asarray(case.inputs["input_ids"]))
            real = (case.inputs["labels"][:, 1:] != -100) & (case.name != "all_masked")
            for ours, theirs in ((stats.logp, "token_logprobs"), (stats.entropy, "token_entropy")):
                assert_close(ours[:, 1:] * real, case.outputs[theirs] * real, tolerance, f"{case.name} {theirs}")


def test_bfloat16_logits_are_normalised_in_float32():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 64)), jnp.bfloat16)
    tokens = jnp.zeros((2, 5), jnp.int32)
    stats = shifted_logprobs(logits, tokens)
    exact = shifted_logprobs(logits.astype(jnp.float32), tokens)
    assert stats.logp.dtype == jnp.float32
    np.testing.assert_array_equal(stats.logp, exact.logp)


def test_a_token_is_scored_by_what_stands_before_it():
    model, batch = tiny()
    before = token_logprobs(model, batch).logp
    changed = TokenBatch(batch.tokens.at[:, 6].add(1) % 17, batch.weights, batch.segments, batch.positions)
    after = token_logprobs(model, changed).logp
    np.testing.assert_array_equal(before[:, 0], 0)
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert (after[:, 6:] != before[:, 6:]).all()


def test_statistics_not_asked_for_are_not_there():
    stats = token_logprobs(*tiny())
    assert stats.entropy is None and stats.mean_logp is None


def mixed_stats(stats: TokenStats, weights) -> Array:
    return sum(jnp.sum(jnp.sin(1 + i + jnp.arange(weights.size)).reshape(weights.shape) * weights * x)
               for i, x in enumerate(jax.tree.leaves(stats)))  # fmt: skip


@pytest.mark.parametrize("max_logits", [1, 3 * 17 * 2, 3 * 17 * 4, 3 * 17 * 10])
def test_chunks_change_nothing(max_logits):
    with precision("float64") as tolerance:
        model, batch = tiny()

        def loss(model, max_logits):
            stats = token_logprobs(
                model, batch, 0.8, max_logits=max_logits, want_entropy=True, want_mean_logp=True, want_log_sum_sq=True
            )
            return mixed_stats(stats, batch.weights), stats

        run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        plain, chunked = run(model, 2**27), run(model, max_logits)
        jax.tree.map(lambda a, b: assert_close(a, b, tolerance, "chunked"), chunked, plain)


def largest(jaxpr) -> int:
    """Elements of the largest array that a jaxpr makes, inside loops too."""
    sizes = [1]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(equation.params)]
        sizes += [largest(sub) for sub in inner if hasattr(sub, "eqns")]
    return max(sizes)


@pytest.mark.slow
def test_chunks_in_bfloat16_add_up_their_gradients_in_float32():
    config = Model(
        num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32, max_len=512,
        compute_dtype="bfloat16", tied_head=False,
    )  # fmt: skip
    model = Transformer(config, 64, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 512), 0, 8)  # few tokens, so that terms of one sign add up
    positions = jnp.broadcast_to(jnp.arange(512), tokens.shape)
    batch = TokenBatch(tokens, jnp.ones(tokens.shape), jnp.ones_like(tokens), positions)

    def head_gradient(max_logits):
        loss = lambda model: token_logprobs(model, batch, max_logits=max_logits).logp.sum()  # noqa: E731
        return np.asarray(jax.jit(jax.grad(loss))(model).head.weight[...], np.float64)

    one, many = head_gradient(4 * 512 * 64), head_gradient(4 * 8 * 64)
    assert np.linalg.norm(one - many) < 0.002 * np.linalg.norm(one)


def test_all_logits_are_never_in_memory_together():
    model, batch = tiny(rows=2, time=64, vocab=128, width=4)
    everything = 2 * 64 * 128

    def loss(model, max_logits):
        return token_logprobs(model, batch, max_logits=max_logits, want_entropy=True).logp.sum()

    def size(max_logits):
        return largest(jax.make_jaxpr(jax.grad(lambda m: loss(m, max_logits)))(model).jaxpr)

    assert size(everything) >= everything
    assert size(everything // 8) <= everything // 8
