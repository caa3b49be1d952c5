"""What the tests of objectives share: golden cases, two precisions, finite differences."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from lm.experiment import Model
from lm.objectives.logprobs import TokenStats, token_logprobs
from lm.types import TokenBatch

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
DTYPES = ("float64", pytest.param("float32", marks=pytest.mark.slow))


@contextlib.contextmanager
def precision(dtype: str):
    """Whether jax computes in float64 or float32."""
    with jax.enable_x64(dtype == "float64"):
        yield TOLERANCE[dtype]


@dataclass(frozen=True)
class Case:
    name: str
    params: dict
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def golden_cases(golden: Path, family: str, dtype: str = "float64") -> list[Case]:
    """All cases of a family of losses; their float inputs have the dtype."""
    described = json.loads((golden / "losses" / f"{family}.json").read_text())["cases"]
    with np.load(golden / "losses" / f"{family}.npz") as arrays:
        inputs = {
            name.removeprefix("in/"): x.astype(dtype) if x.dtype.kind == "f" else x
            for name, x in arrays.items()
            if name.startswith("in/")
        }
        return [
            Case(name, case["params"], inputs, {out: arrays[f"{name}/{out}"] for out in case["outputs"]})
            for name, case in described.items()
        ]


def assert_close(actual, expected, tolerance: float, what: str, scale: float = 0.0):
    """Relative to the largest number of the array, or to `scale`, the size of the numbers that were summed."""
    expected = np.asarray(expected)
    size = max(float(np.max(np.abs(expected), initial=0.0)), scale)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * size + 1e-15, err_msg=what)


def numeric_gradient(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a scalar function, in float64: fourth order, so accurate to about 1e-10."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        at = []
        for shift in (-2, -1, 1, 2):
            moved = x.copy()
            moved[place] += shift * step
            at.append(float(function(moved)))
        gradient[place] = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)
    return gradient


@dataclass(frozen=True)
class GivenLogits:
    """As much of a language model as token_logprobs needs: its hidden states are these logits."""

    given: Float[Array, "B T V"]
    config = Model()  # no field: the same for all

    def with_whole_tables(self):
        return self

    def hidden(self, tokens, positions, segments):
        return self.given, {}

    def logits(self, hidden):
        return hidden


def shifted_logprobs(logits, tokens, temperature: float = 1.0, **wanted) -> TokenStats:
    """Statistics of `tokens` under `logits`, where logits[:, t] predict tokens[:, t + 1]."""
    ones = jnp.ones_like(tokens)
    return token_logprobs(
        GivenLogits(logits), TokenBatch(tokens, ones, ones, ones), temperature, **{"want_entropy": True} | wanted
    )


def assert_accumulates(loss, arrays: dict[str, np.ndarray], differentiable: str, pieces: int = 2):
    """Totals, weights and gradients summed over pieces of the batch equal those of the whole batch."""

    def total(x, rest):
        mean, metrics = loss(**{differentiable: x}, **rest)
        return mean.total, (mean, metrics)

    def run(part):
        rest = {name: jnp.asarray(a) for name, a in part.items() if name != differentiable}
        gradient, sums = jax.grad(total, has_aux=True)(jnp.asarray(part[differentiable]), rest)
        return gradient, sums

    gradient, sums = run(arrays)
    parts = [run({name: np.split(a, pieces)[i] for name, a in arrays.items()}) for i in range(pieces)]
    np.testing.assert_allclose(np.concatenate([g for g, _ in parts]), gradient, rtol=1e-10, atol=1e-14)
    added = jax.tree.map(lambda *xs: sum(xs), *[s for _, s in parts])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), added, sums)
