"""Gradients of the KL estimators k1, k2 and k3 as losses (Schulman 2020; Tang and Munos 2025, arXiv:2506.09477).

Every expectation is a sum over the whole vocabulary, so that nothing is left to chance but the policies.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lm.objectives.kl import KL_ESTIMATORS
from lm.papers.paper import Chart, Evidence, Finding, Paper
from lm.sweep.statistics import Curve

VOCABULARY, POLICIES, STEPS, RATE = 16, 200, 300, 0.5
EXACT = 1e-9  # relative, in double precision


def kl(p, q):
    """KL(p ‖ q) of two rows of logits, in nats."""
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return (jnp.exp(log_p) * (log_p - log_q)).sum()


def loss(name, policy, reference):
    """E[k] over samples from the policy; the gradient does not flow through the sampling, as in a training step."""
    log_p, log_q = jax.nn.log_softmax(policy), jax.nn.log_softmax(reference)
    samples = jax.lax.stop_gradient(jnp.exp(log_p))
    return (samples * KL_ESTIMATORS[name](log_p - log_q)).sum()


def in_reward(name, policy, reference):
    """-E[(-k) log π], whose gradient is the policy gradient of the reward -k."""
    log_p, log_q = jax.nn.log_softmax(policy), jax.nn.log_softmax(reference)
    samples = jax.lax.stop_gradient(jnp.exp(log_p))
    return (samples * jax.lax.stop_gradient(KL_ESTIMATORS[name](log_p - log_q)) * log_p).sum()


# What the gradient of each is said to be.
CLAIMS = {
    ("loss", "k1"): ("zero", lambda p, q: 0.0 * p),
    ("loss", "k2"): ("that of KL(π ‖ ref)", jax.grad(kl)),
    ("loss", "k3"): ("that of KL(ref ‖ π)", jax.grad(lambda p, q: kl(q, p))),
    ("reward", "k1"): ("that of KL(π ‖ ref)", jax.grad(kl)),
    ("reward", "k3"): (
        "that of KL(π ‖ ref) less that of KL(ref ‖ π)",
        lambda p, q: jax.grad(kl)(p, q) - jax.grad(lambda p, q: kl(q, p))(p, q),
    ),
}


def errors(policies, references) -> dict:
    """Largest deviation of each gradient from the claimed one, relative to the gradient of KL(π ‖ ref)."""
    found = {}
    for (place, name), (_, claimed) in CLAIMS.items():
        made = {"loss": loss, "reward": in_reward}[place]
        gradient = jax.vmap(jax.grad(lambda p, q, made=made, name=name: made(name, p, q)))(policies, references)
        right = jax.vmap(claimed)(policies, references)
        size = jnp.linalg.norm(jax.vmap(jax.grad(kl))(policies, references), axis=1)
        found[place, name] = float((jnp.linalg.norm(gradient - right, axis=1) / size).max())
    return found


def descent(name: str, policies, references) -> np.ndarray:
    """KL(π ‖ ref) of each policy during gradient descent on one loss, [STEPS + 1, policies]."""
    step = jax.jit(jax.vmap(lambda p, q: p - RATE * jax.grad(lambda p: loss(name, p, q))(p)))
    measured = jax.jit(jax.vmap(kl))
    path = [measured(policies, references)]
    for _ in range(STEPS):
        policies = step(policies, references)
        path.append(measured(policies, references))
    return np.asarray(path)


def judge(evidence: Evidence) -> Finding:
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 2)
        policies, references = (2 * jax.random.normal(key, (POLICIES, VOCABULARY), jnp.float64) for key in keys)
        wrong = errors(policies, references)
        paths = {name: descent(name, policies, references) for name in ("k1", "k2", "k3")}
    rows = [(f"{name} in the {place}", CLAIMS[place, name][0], f"{wrong[place, name]:.1e}") for place, name in CLAIMS]
    curves = [Curve(name, _band(path)) for name, path in paths.items()]
    start, ends = paths["k1"][0].mean(), {name: path[-1].mean() for name, path in paths.items()}
    fell = ", ".join(f"{name} to {end:.3f}" for name, end in ends.items())
    return Finding(
        verdict="holds" if max(wrong.values()) < EXACT else "does not hold",
        reason=f"Over {POLICIES} pairs of random policies on {VOCABULARY} tokens every gradient is what is claimed, to a "
        f"relative {max(wrong.values()):.0e}. Descent on each loss takes KL(π ‖ ref) from {start:.3f} nats in {STEPS} "
        f"steps: {fell}. k1, the unbiased estimator of the value, does nothing as a loss.",
        columns=("estimator", "its gradient is", "largest relative error"),
        rows=rows,
        charts=[Chart("Descent on the loss", "steps", "KL(π ‖ ref), nats", curves)],
    )


def _band(path: np.ndarray) -> list[tuple[float, float, float, float]]:
    low, high = np.quantile(path, [0.025, 0.975], axis=1)
    return [(i, float(path[i].mean()), float(low[i]), float(high[i])) for i in range(0, len(path), 10)]


paper = Paper(
    "KL estimators as losses: k1 has no gradient, k2 has the right one, k3 that of the other direction",
    "J. Schulman, Approximating KL Divergence, 2020; Y. Tang and R. Munos, arXiv:2506.09477, 2025",
    judge,
)
