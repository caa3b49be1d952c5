"""Learning-rate schedules and the optax chain that moves the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num

from lm import experiment

Step = Num[Array, ""]

DECAYS: dict[str, Callable[[Array], Array]] = {
    "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),  # arXiv:1608.03983, eq. 5
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - jnp.sqrt(x),  # arXiv:2405.18392
}
"""Shapes from 1 to 0 while x goes from 0 to 1."""


def lr_factor(
    step: Step,
    *,
    total: int,
    warmup: int = 0,
    decay: int = 0,
    shape: str = "cosine",
    first: float = 0.0,
    last: float = 0.0,
) -> Float[Array, ""]:
    """Learning rate at `step` as a part of the peak.

    It rises linearly from `first` at step 0 to 1 at step `warmup`, and falls from 1 at step `total - decay` to `last`
    at step `total` and after.
    """
    step = jnp.asarray(step, jnp.result_type(float))
    rise = first + (1 - first) * jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
    fallen = jnp.clip((step - (total - decay)) / max(decay, 1), 0.0, 1.0)
    return rise * (last + (1 - last) * DECAYS[shape](fallen))


def schedule(config: experiment.Optimizer, total_updates: int) -> optax.Schedule:
    """Learning rate of each update, counted from 0.

    The update numbered i gets what lr_factor says of step i + 1: the first has peak_lr / warmup_steps and not 0, the
    last has final_lr_frac of the peak, if the schedule decays.
    """
    warmup = config.warmup_steps
    decay, shape = {
        "constant": (0, "linear"),
        "cosine": (max(total_updates - warmup, 0), "cosine"),
        "wsd": (round(config.decay_frac * total_updates), "1-sqrt"),
    }[config.schedule]
    last = config.final_lr_frac if decay else 1.0

    def learning_rate(update: Step) -> Float[Array, ""]:
        factor = lr_factor(update + 1, total=total_updates, warmup=warmup, decay=decay, shape=shape, last=last)
        return config.peak_lr * factor

    return learning_rate


def make_optimizer(
    config: experiment.Optimizer, total_updates: int, decay_mask: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    """What `config` asks for, over `total_updates` updates. decay_mask(params) says which leaves decay."""
    return clipped_adamw(
        schedule(config, total_updates),
        b2=config.b2,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        decay_mask=decay_mask or matrices,
    )


def clipped_adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float,
    eps: float = 1e-8,
    weight_decay: float,
    clip_norm: float,
    decay_mask: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (arXiv:1711.05101) with decoupled decay where decay_mask(params) is True."""
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return optax.chain(clip_by_global_norm(clip_norm), adamw)


def matrices(params: Any) -> Any:
    """True at the leaves that decay: matrices, and not what a path names `scale` or `bias`.

    The names tell, since the scales of stacked layers are [layers, dim]: they look like a matrix and are not.
    """

    def decays(path: tuple[Any, ...], leaf: Array) -> bool:
        names = {getattr(key, "name", getattr(key, "key", None)) for key in path}
        return leaf.ndim >= 2 and names.isdisjoint({"scale", "bias"})

    return jax.tree_util.tree_map_with_path(decays, params)


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm of all leaves together, in float32 at least."""
    squares = [jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum() for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale updates down to a global norm of at most max_norm.

    As in PyTorch the norm gets 1e-6 before it divides, which optax's own does not, so that runs can be compared.
    """

    def update(updates: Any, params: Any = None) -> Any:
        factor = jnp.minimum(1.0, max_norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates)

    return optax.stateless(update)
