"""Floating-point operations of a step, from shapes, and the peak of each chip: numerator and denominator of MFU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

from lm.experiment import Model
from lm.model.parameter import leaf_name

# Prefix of a jax device's `device_kind` -> its dense bfloat16 operations per second, by the vendors' data sheets.
# The longest matching prefix counts. A device of v3 and 7x is half a chip.
PEAK_FLOPS = {
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak operations per second of a device; None for a device that is not in the table, such as a CPU."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def forward_flops_per_token(config: Model, vocab_size: int, length: int) -> float:
    """Operations of a forward pass per token, for rows of `length` tokens.

    Two operations for each weight of a matrix product. Attention counts the keys and values that a query attends to on
    average under the causal mask and the model's window: (length + 1) / 2 without a window. Nothing else is counted.
    Source: PaLM, arXiv 2204.02311, appendix B, except for the causal mask.
    """
    weights, heads = layer_matrices(config), config.num_heads * config.head_dim
    windows = Counter(min(config.layer(number).window or length, length) for number in range(config.num_layers))
    layers = 0.0
    for window, count in windows.items():
        seen = (window * (window + 1) / 2 + (length - window) * window) / length
        attention = 2 * 2 * heads * seen
        layers += count * (2 * weights + attention)
    return layers + 2 * config.embed_dim * vocab_size


def layer_matrices(config: Model) -> int:
    """Number of parameters in the matrices of a layer."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = (3 if config.gated_mlp else 2) * config.mlp_dim
    return config.embed_dim * (2 * heads + 2 * kv_heads + mlp)


def update_flops_per_token(models: dict[str, Any], trained: dict[str, Any], length: int) -> float:
    """Operations of a training update per token of a row, over all models that a loss reads with a gradient.

    Each weight of a matrix counts 2 forward, 2 for the gradient of the matrix's input, and 2 for the gradient of the matrix.
    Attention's gradients of queries, keys and values count twice its forward pass. A frozen matrix has no gradient of its own,
    but its input has one if anything trains in its layer or below. Layers are stacked, so a trained parameter trains in all
    layers, and then the inputs of every layer's matrices have gradients.

    Recomputation by rematerialisation and the sampling of a GRPO or PPO step are not counted.

    Args:
        models: by role; may be abstract.
        trained: the same with None for each parameter that does not train, as from `lm.train_step.partition`.
    """
    return sum(_update_of_one(models[role], trained[role], length) for role in models)


def _update_of_one(model: Any, trained: Any, length: int) -> float:
    """Three forward passes minus the gradients that are not needed; 0 if only a score head trains, which is no matrix."""
    body, trained_body = getattr(model, "body", model), getattr(trained, "body", trained)
    if not hasattr(body, "blocks"):
        return 0.0
    c, vocab_size = body.config, body.embed.weight.get_value().shape[0] if body is model else 0
    layers, head = forward_flops_per_token(c, 0, length), 2.0 * c.embed_dim * vocab_size
    in_layers = trains_in_layers(trained)
    table = trained_body.embed if c.tied_head else trained_body.head
    missing = 2.0 * (c.num_layers * layer_matrices(c) - _matrices(trained_body.blocks))
    missing += 0 if in_layers else 2 * layers - 2.0 * c.num_layers * layer_matrices(c)
    missing += 0 if jax.tree.leaves(table) else head
    missing += 0 if in_layers or jax.tree.leaves(trained_body.norm) else head
    factors, fixed = _factors(trained_body.blocks), _factors(body.blocks) - _factors(trained_body.blocks)
    return 3 * forward_flops_per_token(c, vocab_size, length) - missing + 6.0 * factors + 4.0 * fixed


def trains_in_layers(trained: Any) -> bool:
    """Whether the backward pass goes through the layers of a language model or scorer, given its trained parameters."""
    body = getattr(trained, "body", trained)
    return bool(jax.tree.leaves((body.embed, body.blocks)))


def _matrices(blocks: Any) -> int:
    """Numbers in the matrices of stacked blocks that are not None."""
    return _count(blocks, {"weight"})


def _factors(blocks: Any) -> int:
    """Numbers in the factors of adapters of stacked blocks that are not None."""
    return _count(blocks, {"a", "b"})


def _count(blocks: Any, names: set[str]) -> int:
    return sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(blocks) if leaf_name(path).split("/")[-1] in names
    )
