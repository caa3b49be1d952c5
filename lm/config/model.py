"""Fields of the model, its vocabulary and its mesh."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from lm.config.field import knob


@dataclass(frozen=True)
class Tokenizer:
    vocab_size: int = knob(
        2048,
        "most pieces of the sentencepiece BPE vocabulary, bytes and special tokens included, at least 262; fewer are learnt "
        "where the training text has no more",
        least=1,
        most=2**20,
    )
    path: str | None = knob(None, "use this sentencepiece .model and learn nothing")


def _window_knob() -> Any:
    """The field of the attention window, of a layer of the pattern and of a model whose layers are alike."""
    text = "how many tokens a query sees, its own among them; 0: all of its segment before it"
    return knob(0, text, least=0, most=2**26)


def _softcap_knob() -> Any:
    """The field of the soft cap on attention scores, of both."""
    text = "attention scores become softcap * tanh(score / softcap); 0 disables it"
    return knob(0.0, text, least=1e-3, most=1e6, special=0)


@dataclass(frozen=True)
class Layer:
    """What one layer of a repeating pattern has of its own; all layers of a model have the same shapes."""

    window: int = _window_knob()
    softcap: float = _softcap_knob()
    rope_theta: float = knob(10_000.0, "base of the rotary position frequencies", least=1, most=1e12)
    rope_scaling: tuple[float, ...] = knob((), "as model.rope_scaling", above=0, most=2**26)


LAYER_FIELDS = tuple(field.name for field in fields(Layer))


@dataclass(frozen=True)
class Model:
    num_layers: int = knob(6, "transformer blocks", least=1, most=2**14)
    embed_dim: int = knob(256, "width of the residual stream", least=1, most=2**20)
    num_heads: int = knob(4, "query heads", least=1, most=2**14)
    num_kv_heads: int = knob(2, "key and value heads; must divide num_heads", least=1, most=2**14)
    head_dim: int = knob(64, "width of one head", least=2, most=2**14)
    mlp_dim: int = knob(704, "width of the SwiGLU hidden layer", least=1, most=2**22)
    max_len: int = knob(512, "longest sequence, in tokens", least=2, most=2**26)
    rope_theta: float = knob(10_000.0, "base of the rotary position frequencies", least=1, most=1e12)
    rope_scaling: tuple[float, ...] = knob(
        (),
        "factor by which positions are divided (linear), or Llama 3.1's factor, low and high frequency factor, original "
        "length; empty: none",
        above=0,
        most=2**26,
    )
    norm_eps: float = knob(1e-6, "added to the mean square inside RMSNorm", least=1e-12, most=1)
    norm_plus_one: bool = knob(False, "norms multiply by 1 + scale, as in Gemma")
    norms: Literal["pre", "post", "sandwich"] = knob(
        "pre", "where the norms of a block stand: before attention and MLP, after them (OLMo 2), or both (Gemma 2)"
    )
    qk_norm: bool = knob(True, "RMSNorm on every query and key head, before rope")
    qk_norm_of: Literal["head", "heads"] = knob("head", "what qk_norm norms: each head, or all heads together (OLMo 2)")
    qkv_bias: bool = knob(False, "biases of the query, key and value projections, as in Qwen 2")
    output_bias: bool = knob(False, "a bias of the attention's output projection")
    mlp_bias: bool = knob(False, "biases of the MLP's matrices")
    gated_mlp: bool = knob(True, "the MLP has a gate: down(activation(gate) * up); false: down(activation(up))")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = knob("silu", "the MLP's nonlinearity")
    embed_scale: float = knob(
        1.0, "embeddings are multiplied by this; Gemma's is the square root of embed_dim", least=1e-6, most=1e6
    )
    tied_head: bool = knob(True, "the output projection is the embedding, transposed")
    attention: Literal["auto", "plain", "splash", "blocks"] = knob(
        "auto",
        "kernel of training; auto: splash on a TPU for rows and heads that are multiples of 128, blocks on one CPU, "
        "else plain",
    )
    window: int = _window_knob()
    softcap: float = _softcap_knob()
    pattern: tuple[Layer, ...] = knob(
        (),
        "layers that follow each other and repeat, each with its own window, softcap, rope_theta and rope_scaling; empty: "
        "all layers are alike, as the four fields of model say",
    )
    query_pre_attn_scalar: float = knob(
        0.0,
        "attention scores are divided by the square root of this; 0: of head_dim",
        least=1e-3,
        most=2**26,
        special=0,
    )
    final_softcap: float = knob(
        0.0,
        "logits become final_softcap * tanh(logit / final_softcap); 0 disables it",
        least=1e-3,
        most=1e6,
        special=0,
    )
    attention_blocks: tuple[int, ...] = knob(
        (),
        "splash kernel: queries and keys of a block, forward, then backward; empty: what suits the chip",
        least=128,
        most=2**16,
    )
    remat: Literal["none", "full", "minimal", "dots", "offload"] = knob(
        "none",
        "what of a block is kept for the backward pass: all, its input alone, also q, k, v and attention, also "
        "matrix products, or as minimal but in the host's memory",
    )
    scan_unroll: int = knob(
        1, "blocks unrolled per iteration of the layer scan; num_layers is fastest on CPU", least=1, most=2**14
    )
    param_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype the parameters are kept in")
    compute_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of activations and matrix products")
    logits_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of the logits; the softmax is float32 anyway")
    max_logits: int = knob(
        2**27,
        "most logits on a device at a time; a loss with more makes them in pieces, and twice",
        least=1,
        most=2**40,
    )

    @property
    def period(self) -> tuple[Layer, ...]:
        """The layers that repeat; one where all are alike."""
        return self.pattern or (Layer(**{name: getattr(self, name) for name in LAYER_FIELDS}),)

    def layer(self, number: int) -> Layer:
        """What layer `number`, from 0, has of its own."""
        return self.period[number % len(self.period)]


@dataclass(frozen=True)
class Mesh:
    slices: int = knob(
        1,
        "pods joined by the data-centre network; each holds a copy and takes its share of the batch",
        least=1,
        most=2**20,
        special=-1,
    )
    data: int = knob(
        -1, "devices that hold copies and split the batch; -1 takes all that are left", least=1, most=2**20, special=-1
    )
    fsdp: int = knob(1, "devices that split the batch and the parameters", least=1, most=2**20, special=-1)
    expert: int = knob(
        1, "as fsdp; the axis that experts, where a model has them, are split over", least=1, most=2**20, special=-1
    )
    context: int = knob(
        1, "devices that split the tokens of a row, and the parameters", least=1, most=2**20, special=-1
    )
    tensor: int = knob(1, "devices that split heads, mlp and vocabulary", least=1, most=2**20, special=-1)
