"""Config of the model, its tokenizer and the device mesh."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from lm.config.field import knob


@dataclass(frozen=True)
class Tokenizer:
    vocab_size: int = knob(
        2048, "maximum size of the sentencepiece vocabulary with special tokens; at least 262", least=1, most=2**20
    )
    path: str | None = knob(
        None,
        "sentencepiece .model file or folder of a published model to use; none: a tokenizer is trained on the data of the stages",
    )
    typed_control: Literal["text", "token"] = knob(
        "text",
        "of a published model, what a control token typed by a user is encoded as: its text, or (as in its own library) the token",
    )
    chat_template: str | None = knob(None, "file of a chat template to use instead of the published model's own")


def _window_knob() -> Any:
    """The `window` field, shared by `Layer` and `Model`."""
    text = "sliding-window attention: tokens that a query attends to, itself included; 0: full causal attention"
    return knob(0, text, least=0, most=2**26)


def _softcap_knob() -> Any:
    """The `softcap` field, shared by `Layer` and `Model`."""
    text = "soft cap on attention scores: softcap * tanh(score / softcap); 0 disables it"
    return knob(0.0, text, least=1e-3, most=1e6, special=0)


@dataclass(frozen=True)
class Layer:
    """Settings that may differ between the layers of a repeating pattern; parameter shapes are the same in every layer."""

    window: int = _window_knob()
    softcap: float = _softcap_knob()
    rope_theta: float = knob(10_000.0, "RoPE base frequency (theta)", least=1, most=1e12)
    rope_scaling: tuple[float, ...] = knob((), "RoPE scaling of this layer, as model.rope_scaling", least=0, most=2**26)


LAYER_FIELDS = tuple(field.name for field in fields(Layer))


@dataclass(frozen=True)
class Model:
    num_layers: int = knob(6, "number of transformer blocks", least=1, most=2**14)
    embed_dim: int = knob(256, "width of the residual stream", least=1, most=2**20)
    num_heads: int = knob(4, "number of query heads", least=1, most=2**14)
    num_kv_heads: int = knob(2, "number of key and value heads; must divide num_heads", least=1, most=2**14)
    head_dim: int = knob(64, "width of one attention head; even", least=2, most=2**14)
    mlp_dim: int = knob(704, "width of the MLP's hidden layer", least=1, most=2**22)
    max_len: int = knob(512, "maximum sequence length in tokens", least=2, most=2**26)
    rope_theta: float = knob(10_000.0, "RoPE base frequency (theta)", least=1, most=1e12)
    rope_scaling: tuple[float, ...] = knob(
        (),
        "RoPE scaling by its count of numbers (lm/config/rope.py): LinearRope 1, DynamicRope 2, Llama3Rope 4, YarnRope 6, LongRope 3 + the rotated dimensions; empty: none",
        least=0,
        most=2**26,
    )
    rope_dim: int = knob(
        0, "dimensions of a head that RoPE rotates, the first ones; 0: all", least=2, most=2**14, special=0
    )
    norm_eps: float = knob(1e-6, "epsilon added to the mean square in RMSNorm", least=1e-12, most=1)
    norm_plus_one: bool = knob(False, "RMSNorm multiplies by 1 + scale instead of scale, as in Gemma")
    norms: Literal["pre", "post", "sandwich"] = knob(
        "pre", "norms of a block: before attention and MLP (pre), after them (OLMo 2), or both (Gemma 2)"
    )
    qk_norm: bool = knob(True, "RMSNorm on queries and keys, before RoPE")
    qk_norm_of: Literal["head", "heads"] = knob(
        "head", "qk_norm is computed over each head, or over all heads together (OLMo 2)"
    )
    qkv_bias: bool = knob(False, "bias in the query, key and value projections, as in Qwen 2")
    output_bias: bool = knob(False, "bias in the attention output projection")
    mlp_bias: bool = knob(False, "bias in the MLP projections")
    gated_mlp: bool = knob(True, "gated MLP, down(activation(gate) * up); false: down(activation(up))")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = knob("silu", "activation function of the MLP")
    embed_scale: float = knob(1.0, "multiplier of the token embeddings; sqrt(embed_dim) in Gemma", least=1e-6, most=1e6)
    tied_head: bool = knob(True, "tied embeddings: the output projection is the transposed embedding")
    attention: Literal["auto", "plain", "splash", "cudnn", "blocks"] = knob(
        "auto",
        "attention kernel in training; auto: splash on TPU (for multiples of 128), cudnn on GPU (in bfloat16), blocks on one CPU, else plain",
    )
    window: int = _window_knob()
    softcap: float = _softcap_knob()
    pattern: tuple[Layer, ...] = knob(
        (), "repeating layer pattern with its own window, softcap and RoPE per layer; empty: all layers use the model's"
    )
    query_pre_attn_scalar: float = knob(
        0.0, "divide attention scores by the square root of this; 0: of head_dim", least=1e-3, most=2**26, special=0
    )
    final_softcap: float = knob(
        0.0, "soft cap c on the logits, c * tanh(logit / c); 0 disables it", least=1e-3, most=1e6, special=0
    )
    attention_blocks: tuple[int, ...] = knob(
        (),
        "splash kernel: block sizes of queries and keys, forward and backward, in tokens; empty: the chip's default",
        least=128,
        most=2**16,
    )
    remat: Literal["none", "full", "minimal", "dots", "offload"] = knob(
        "none",
        "rematerialisation: a block keeps everything (none), its input (full), also q, k, v and attention output (minimal), also matrix products (dots), or as minimal in host memory (offload)",
    )
    scan_unroll: int = knob(
        1, "blocks unrolled per iteration of the scan over layers; num_layers is fastest on CPU", least=1, most=2**14
    )
    param_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of the parameters")
    compute_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of activations and matrix multiplications")
    logits_dtype: Literal["float32", "bfloat16"] = knob(
        "float32", "dtype of the logits; the softmax is always computed in float32"
    )
    max_logits: int = knob(
        2**27,
        "maximum number of logits on a device; beyond it, they are computed in chunks, and again in the backward pass",
        least=1,
        most=2**40,
    )

    @property
    def rotated(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return self.rope_dim or self.head_dim

    @property
    def period(self) -> tuple[Layer, ...]:
        """The layers of the repeating pattern; a single layer where `pattern` is empty."""
        return self.pattern or (Layer(**{name: getattr(self, name) for name in LAYER_FIELDS}),)

    def layer(self, number: int) -> Layer:
        """Settings of layer `number`, counted from 0."""
        return self.period[number % len(self.period)]


@dataclass(frozen=True)
class Mesh:
    slices: int = knob(1, "TPU slices, which hold copies and split the batch; -1: all", least=1, most=2**20, special=-1)
    data: int = knob(
        -1, "data parallelism: devices that split the batch; -1: the rest", least=1, most=2**20, special=-1
    )
    fsdp: int = knob(1, "FSDP: devices that split batch and parameters; -1: the rest", least=1, most=2**20, special=-1)
    expert: int = knob(1, "as fsdp; reserved for splitting experts; -1: the rest", least=1, most=2**20, special=-1)
    context: int = knob(
        1, "context parallelism: devices that split the tokens of a row; -1: the rest", least=1, most=2**20, special=-1
    )
    tensor: int = knob(
        1,
        "tensor parallelism: devices that split heads, MLP and vocabulary; -1: the rest",
        least=1,
        most=2**20,
        special=-1,
    )


@dataclass(frozen=True)
class RolloutMesh:
    tensor: int = knob(
        0,
        "devices that split heads, MLP and vocabulary of the sampler, while the others split the completions; 0: the mesh of training",
        least=1,
        most=2**20,
        special=0,
    )
    devices: int = knob(
        0,
        "devices that only sample while the others train, with objective.max_staleness; 0: sampling and training take turns on all",
        least=1,
        most=2**20,
        special=0,
    )
