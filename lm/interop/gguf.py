"""Reads models from GGUF files, dequantised; their tokenizers are read by `lm/data/hub/gguf.py`."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lm.config.field import shown
from lm.experiment import Model, UserError
from lm.interop.config import read_config, write_config
from lm.interop.gguf_file import package, read_metadata, read_tensors
from lm.interop.hf import Store, assemble
from lm.interop.origin import Origin
from lm.interop.places import Place, parameter_places
from lm.interop.rope import ORIGINAL
from lm.interop.tensors import Tensor, refuse_tensors
from lm.model.attention import rope_frequencies
from lm.model.families import FAMILIES
from lm.model.transformer import Transformer

ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2", "phi3": "phi3", "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}  # fmt: skip
"""general.architecture -> model_type of config.json."""
FIELDS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
"""Metadata below the name of the architecture -> field of config.json."""
ROPE_FIELDS = {"rope.scaling.factor": "factor", "rope.scaling.original_context_length": ORIGINAL}
HARMLESS = ("vocab_size", "rope.scaling.finetuned")
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
"""The same in all published models with ROPE_FACTORS; GGUF files do not contain it."""
GEMMA_HEAD = 256
"""Head size of the Gemma models that scale attention scores by its square root; for others a GGUF file lacks the scale."""


def describe(path: Path) -> tuple[Model, int]:
    """The model and vocabulary size of a GGUF file. Raises UserError if it cannot be read, or its family is unknown."""
    return read_config(_config(Path(path)), str(path))


def check(path: Path) -> None:
    """Raise UserError unless the tensors of a file are those of its metadata; no values are read."""
    _opened(Path(path))


def files(path: Path) -> list[Path]:
    """The files that determine the model."""
    return [Path(path)]


def dtype(path: Path) -> str:
    """Dtype of the parameters: float32, to which tensors are dequantised."""
    return "float32"


def read_origin(path: Path, tokenizer: Path | None = None) -> Origin:
    """What an export of a model trained from a file keeps: the published configuration, written as a config.json."""
    model, vocab_size = describe(path)
    return Origin(json.dumps(write_config(model, vocab_size, ARCHITECTURES[_architecture(path)[1]])), {})


def read(path: Path, mesh: Mesh | None = None, store: Store | None = None, **changes: Any) -> Transformer:
    """Read the model of a GGUF file; every tensor must be used.

    Args:
        store: called with each parameter before the next one is read; the model keeps what it returns.
        changes: fields of Model to override, such as compute_dtype.

    Raises:
        UserError: the file is damaged or has an unsupported feature, or a tensor is missing, unexpected or not finite.
    """
    return assemble(*_opened(Path(path), **changes), mesh, store)


def _opened(path: Path, **changes: Any) -> tuple[Transformer, list[Place], dict[str, Tensor]]:
    """The abstract model of a file, the places of its parameters, and its tensors by their names in safetensors."""
    described = _config(path)
    model, vocab_size = read_config(described, str(path))
    model = dataclasses.replace(model, **changes)
    wanted = jax.eval_shape(lambda: Transformer(model, vocab_size, jax.random.key(0)))
    places = parameter_places(wanted, FAMILIES[described["model_type"]])
    table = package().get_tensor_name_map(_architecture(path)[0], model.num_layers)
    names = {table.get_name(name, (".weight", ".bias")): name for place in places for name in place.names}
    change = _llama if described["model_type"] == "llama" else _gemma if model.norm_plus_one else _same
    tensors = {
        names.get(name, name): dataclasses.replace(one, read=functools.partial(change, name, one, model))
        for name, one in read_tensors(path).items()
        if name != ROPE_FACTORS
    }
    refuse_tensors(
        str(path), tensors, {name: place.their_shape for place in places for name in place.names}, "the metadata"
    )
    return wanted, places, tensors


def _same(name: str, tensor: Tensor, model: Model) -> np.ndarray:
    return tensor.read()


def _gemma(name: str, tensor: Tensor, model: Model) -> np.ndarray:
    """Scales of norms minus 1: GGUF files store 1 + scale, and the model adds the 1 itself."""
    return tensor.read() - 1 if "norm" in name else tensor.read()


def _llama(name: str, tensor: Tensor, model: Model) -> np.ndarray:
    """Rows of queries and keys reordered into halves: GGUF files store the two rows of a rotated pair side by side."""
    value, heads = tensor.read(), {"attn_q": model.num_heads, "attn_k": model.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return value
    pairs = value.reshape(heads, model.head_dim // 2, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)


# ---- metadata ------------------------------------------------------------------------------------------------------


def _architecture(path: Path) -> tuple[int, str]:
    """The package's number for the architecture, and the architecture's name."""
    name = read_metadata(path).get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{path}: general.architecture is {shown(name)}; there are {', '.join(ARCHITECTURES)}")
    return next(number for number, known in package().MODEL_ARCH_NAMES.items() if known == name), name


def _config(path: Path) -> dict[str, Any]:
    """The metadata of a model as a config.json. Raises UserError for unknown metadata."""
    _, name = _architecture(path)
    found, tensors = read_metadata(path), read_tensors(path)
    if found.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path} is one of {shown(found['split.count'])} files of a model: merge them (llama-gguf-split)"
        )
    own = {key.removeprefix(f"{name}."): _rounded(value) for key, value in found.items() if key.startswith(f"{name}.")}
    config = {theirs: own.pop(key) for key, theirs in FIELDS.items() if key in own}
    rotated, width = own.pop("rope.dimension_count", None), own.pop("attention.value_length", None)
    heads, embedded = (config.get(key) for key in ("num_attention_heads", "hidden_size"))
    if "head_dim" not in config and type(heads) is type(embedded) is int and heads > 0:
        config["head_dim"] = embedded // heads
    other = [one for one in (rotated, width) if one not in (None, config.get("head_dim"))]
    if other:
        raise UserError(
            f"{path}: heads have a width of {config.get('head_dim')}, and values or rotated parts {other[0]}"
        )
    scaling = {theirs: own.pop(key) for key, theirs in ROPE_FIELDS.items() if key in own}
    kind = own.pop("rope.scaling.type", "none")
    strange = [key for key, value in own.items() if key not in HARMLESS and value not in (0, None, False, "", [])]
    if strange:
        raise UserError(
            f"{path}: the reader does not know {name}.{strange[0]} {shown(own[strange[0]])}, which may change the model"
        )
    embedding = tensors.get("token_embd.weight")
    config |= {
        "model_type": ARCHITECTURES[name],
        "architectures": [FAMILIES[ARCHITECTURES[name]].architecture],
        "vocab_size": embedding.shape[0] if embedding and embedding.shape else None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_scaling": None if kind == "none" else {"rope_type": kind, **scaling},
    }
    if ROPE_FACTORS in tensors:
        config["rope_scaling"] = _llama3(path, config, tensors[ROPE_FACTORS])
    if name == "llama" and "blk.0.attn_q.bias" in tensors:
        config["attention_bias"] = True
    if name.startswith("gemma") and config.get("head_dim") != GEMMA_HEAD:
        raise UserError(
            f"{path}: of Gemma models, GGUF files with heads of {GEMMA_HEAD} are read, found {config.get('head_dim')}"
        )
    return config


def _rounded(value: Any) -> Any:
    """A float32 number as its shortest decimal, as in config.json."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama3(path: Path, config: dict[str, Any], factors: Tensor) -> dict[str, Any]:
    """The RoPE scaling with the frequency divisors of a file. Raises UserError unless it is that of Llama 3."""
    given = factors.read()
    scaling = {**LLAMA3, "factor": _rounded(float(given.max(initial=1)))}
    model, _ = read_config({**config, "rope_scaling": scaling}, str(path))
    plain, scaled = (rope_frequencies(model.head_dim, model.rope_theta, one) for one in ((), model.rope_scaling))
    if given.shape != plain.shape or not np.allclose(np.asarray(plain / scaled), given, rtol=1e-3):
        raise UserError(
            f"{path}: {ROPE_FACTORS} is not the RoPE scaling of Llama 3, the one with such factors that is read"
        )
    return scaling
