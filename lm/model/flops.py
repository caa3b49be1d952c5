"""How many floating-point operations a step costs by its shapes: what MFU holds against the chips' peak."""

from __future__ import annotations

from collections import Counter

from lm.experiment import Model

# Dense bfloat16 operations a second of one jax device, by the makers' data sheets; its `device_kind` begins like this.
# The longest beginning that fits counts. Of v3 and 7x a device is half a chip.
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
    """Peak of one device; None for one that is not in the table, for instance a CPU."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def forward_flops_per_token(config: Model, vocab_size: int, length: int) -> float:
    """Of one forward pass, for a token of a row of `length` tokens.

    Two for each weight of a matrix product; a query is multiplied with the keys that a causal mask, and the model's
    window, show it on average, (length + 1) / 2 without a window, and so are the values. Nothing else is counted.
    Source: PaLM, arXiv 2204.02311, appendix B, but for the causal half.
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
    """Numbers in the matrices of one layer."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = (3 if config.gated_mlp else 2) * config.mlp_dim
    return config.embed_dim * (2 * heads + 2 * kv_heads + mlp)


def layer_vectors(config: Model) -> int:
    """Numbers in the norms and biases of one layer."""
    c, heads, kv_heads = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = c.embed_dim * (4 if c.norms == "sandwich" else 2)
    qk_norms = (2 * c.head_dim if c.qk_norm_of == "head" else heads + kv_heads) if c.qk_norm else 0
    biases = c.qkv_bias * (heads + 2 * kv_heads) + c.output_bias * c.embed_dim
    mlp_biases = c.mlp_bias * ((2 if c.gated_mlp else 1) * c.mlp_dim + c.embed_dim)
    return norms + qk_norms + biases + mlp_biases


def update_flops_per_token(
    config: Model, vocab_size: int, length: int, others: int, models: int = 1, scorers: int = 0
) -> float:
    """Of a training update: forward, twice that backward, and `others` forward passes without a gradient (a reference).

    Not counted are what rematerialisation computes again, and the sampling of a GRPO or PPO step.

    Args:
        models, scorers: how many language models have a gradient, and how many scorers, which have no vocabulary.
    """
    whole, body = (forward_flops_per_token(config, size, length) for size in (vocab_size, 0))
    return (3 * models + others) * whole + 3 * scorers * body
