"""Learning-rate schedules, and the optax chain that updates the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
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
    """Learning rate at `step` as a fraction of the peak.

    It rises linearly from `first` at step 0 to 1 at step `warmup`, and falls from 1 at step `total - decay` to `last`
    at step `total` and after.
    """
    step = jnp.asarray(step, jnp.result_type(float))
    rise = first + (1 - first) * jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
    fallen = jnp.clip((step - (total - decay)) / max(decay, 1), 0.0, 1.0)
    return rise * (last + (1 - last) * DECAYS[shape](fallen))


def schedule(config: experiment.Optimizer, total_updates: int) -> optax.Schedule:
    """Learning rate of each update, counted from 0, as an optax schedule.

    Update i has the learning rate of step i + 1 in `lr_factor`: the first has peak_lr / warmup_steps instead of 0, and the
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
    """The optimizer of `config`, over `total_updates` updates. decay_mask(params) selects the leaves with weight decay.

    Use it with `apply_updates` of this module, which reads the parameters from their master weights.
    """
    rule = clipped(
        with_state_dtype(config.state_dtype, OPTIMIZERS[config.kind](config.b2)),
        schedule(config, total_updates),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        decay_mask=decay_mask or matrices,
    )
    return with_master_weights(rule) if config.master_weights else rule


def clipped(
    direction: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    weight_decay: float,
    clip_norm: float,
    decay_mask: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """Clip by global norm, apply the direction, and step with decoupled weight decay (arXiv:1711.05101) where the mask is True."""
    return optax.chain(
        clip_by_global_norm(clip_norm),
        direction,
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def with_state_dtype(dtype: str, direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """The direction with its moments stored in `dtype` between updates, independent of the parameters' dtype.

    They are computed in float32 or wider, from gradients in float32 or wider. bfloat16 halves their memory, but has only 8
    significant bits: with b2 above about 0.99 the second moment stops changing.
    """

    def kept(state: Any) -> Any:
        if dtype == "float32":
            return state
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: Any) -> Any:
        return kept(direction.init(at_least_float32(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = direction.update(at_least_float32(updates), at_least_float32(state), params)
        return updates, kept(state)

    return optax.GradientTransformation(init, update)


class MasterWeights(NamedTuple):
    """Optimizer state of parameters below float32: float32 master weights, and the state of the rule that updates them."""

    master: Any
    rule: Any


def with_master_weights(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply the rule to float32 master weights kept in its state; no effect on parameters in float32 or wider.

    A bfloat16 parameter has 8 significant bits: an update below 1/512 of its value is lost, and with it most of training. The
    master weights get the updates, weight decay included, and `apply_updates` rounds the parameters from them
    (mixed-precision training, arXiv:1710.03740, section 3.1).
    """

    def init(params: Any) -> Any:
        if not _below_float32(params):
            return rule.init(params)
        master = jax.tree.map(lambda x: jnp.array(x, _wide(x), copy=True), params)
        return MasterWeights(master, rule.init(master))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not isinstance(state, MasterWeights):
            return rule.update(updates, state, params)
        updates, kept = rule.update(at_least_float32(updates), state.rule, state.master)
        master = optax.apply_updates(state.master, updates)
        changes = jax.tree.map(lambda new, old: _rounded(new, old) - old.astype(new.dtype), master, params)
        return changes, MasterWeights(master, kept)

    def _rounded(new: Array, old: Array) -> Array:
        return new.astype(old.dtype).astype(new.dtype)

    return optax.GradientTransformation(init, update)


def apply_updates(params: Any, updates: Any, opt_state: Any) -> Any:
    """The parameters after an update whose new optimizer state is `opt_state`.

    If the state holds master weights, the parameters are exactly the rounded master weights. The sum of parameter and update
    would differ where a parameter is close to 0.
    """
    if isinstance(opt_state, MasterWeights):
        return jax.tree.map(lambda old, master: master.astype(old.dtype), params, opt_state.master)
    return optax.apply_updates(params, updates)


def at_least_float32(tree: Any) -> Any:
    """The tree with every floating-point leaf below float32 in float32."""
    return jax.tree.map(lambda x: x.astype(_wide(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _below_float32(tree: Any) -> bool:
    return any(_wide(x) != x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


def adam(b2: float, b1: float = 0.9, eps: float = 1e-8) -> optax.GradientTransformation:
    """Update direction of Adam (arXiv:1412.6980)."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def muon(b2: float, momentum: float = 0.95) -> optax.GradientTransformation:
    """Update direction of Muon for the matrices of the blocks, and of Adam for all other parameters.

    Momentum orthogonalised by five Newton-Schulz steps (Jordan et al. 2024, kellerjordan.github.io/posts/muon), scaled so
    that its entries are as large as Adam's (0.2) and both share one learning rate (arXiv:2502.16982, eq. 4).
    """

    def as_large_as_adams(updates: Any, params: Any = None) -> Any:
        def scaled(side: optax.contrib.MuonDimensionNumbers, x: Array) -> Array:
            sizes = (math.prod(x.shape[axis] for axis in axes) for axes in (side.reduction_axis, side.output_axis))
            return 0.2 * max(sizes) ** 0.5 * x

        return jax.tree.map(scaled, as_matrices(updates), updates, is_leaf=_is_side)

    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=as_matrices),
        optax.stateless(as_large_as_adams),
    )

    def labels(params: Any) -> Any:
        sides = as_matrices(params)
        return jax.tree.map(lambda side: "adam" if side is None else "muon", sides, is_leaf=_is_side)

    return optax.partition({"muon": orthogonal, "adam": adam(b2)}, labels)


OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {"adamw": adam, "muon": muon}
"""experiment.Optimizer.kind -> (b2 -> transformation of gradients to directions of about unit size)."""


def as_matrices(params: Any) -> Any:
    """Each parameter's shape as a matrix for Muon: the axis `embed` against all others, layer by layer; None without Muon.

    Muon is not used for vectors, the embedding and the head (parameters with an axis `vocab`), and parameters without
    axis names.
    """

    def sides(leaf: Any) -> Any:
        names = leaf.get_metadata("out_sharding") if isinstance(leaf, nnx.Variable) else ()
        side = "rank" if "rank" in names else "embed"
        inner = [axis for axis, name in enumerate(names) if name == side]
        outer = [axis for axis, name in enumerate(names) if name not in (side, "layers")]
        used = inner and outer and "vocab" not in names
        numbers = optax.contrib.MuonDimensionNumbers(tuple(inner), tuple(outer)) if used else None
        return jax.tree.map(lambda _: numbers, leaf)

    return jax.tree.map(sides, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _is_side(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.contrib.MuonDimensionNumbers)


def matrices(params: Any) -> Any:
    """Weight decay mask: True for matrices, except those whose path contains `scale`, `bias` or `magnitude`.

    The names decide, not the shapes: the scales of stacked layers have the shape of a matrix, [layers, dim]. An adapter's
    factors decay, which draws its product to 0 and the model to its base.
    """

    def decays(path: tuple[Any, ...], leaf: Array) -> bool:
        names = {getattr(key, "name", getattr(key, "key", None)) for key in path}
        return leaf.ndim >= 2 and names.isdisjoint({"scale", "bias", "magnitude"})

    return jax.tree_util.tree_map_with_path(decays, params)


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm over all leaves of a tree, in float32 or wider.

    The order of summation depends on the names of the matrices alone, not of the modules that hold them, so that moving a
    matrix to another module changes no bit.
    """
    leaves = sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda item: _without_parts(item[0]))
    squares = [jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum() for _, x in leaves]
    return jnp.sqrt(sum(squares))


def _without_parts(path: tuple[Any, ...]) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.replace("/attention/", "/").replace("/mlp/", "/")


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Gradient clipping: scale updates down to a global norm of at most max_norm.

    As in PyTorch, and unlike in optax, 1e-6 is added to the norm before dividing, so that runs can be compared.
    """

    def update(updates: Any, params: Any = None) -> Any:
        factor = jnp.minimum(1.0, max_norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates)

    return optax.stateless(update)
