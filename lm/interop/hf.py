"""Safetensors checkpoints in and out, in the layout that Hugging Face transformers reads; one row a family."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from lm.experiment import Model, UserError
from lm.model.transformer import Transformer
from lm.parallel.rules import shardings

# model_type -> what the family fixes that its config does not say
FAMILIES: dict[str, dict[str, Any]] = {"llama": {"qk_norm": False}, "qwen3": {"qk_norm": True}}

# Ours, below `blocks` -> theirs, below `model.layers.N`
LAYER_NAMES = {
    "attn_norm/scale": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm/scale": "self_attn.q_norm.weight",
    "k_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
OTHER_NAMES = {"embed": "model.embed_tokens.weight", "norm/scale": "model.norm.weight", "head": "lm_head.weight"}


def read_config(config: dict[str, Any]) -> tuple[Model, int]:
    """Our Model and the vocabulary size that a config.json describes; older field names are read too.

    Raises:
        UserError: a family or a feature that the model does not have.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"config.json: model_type is {family!r}; there are {', '.join(FAMILIES)}")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise UserError(f"config.json: {field} is set; the model has no biases")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act is {config['hidden_act']!r}; the model has 'silu'")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    heads = config["num_attention_heads"]
    model = Model(
        num_layers=config["num_hidden_layers"],
        embed_dim=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_dim=config["intermediate_size"],
        max_len=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        rope_scaling=_rope_scaling(rope),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        **FAMILIES[family],
    )
    return model, config["vocab_size"]


def write_config(model: Model, vocab_size: int) -> dict[str, Any]:
    """The config.json of a model, in both the current and the older field names of rope.

    Raises:
        UserError: the model has what no family here has.
    """
    for field in ("window", "softcap"):
        if getattr(model, field):
            raise UserError(f"model.{field} is {getattr(model, field)}; no family here has it: {', '.join(FAMILIES)}")
    family = next(name for name, fixed in FAMILIES.items() if fixed["qk_norm"] == model.qk_norm)
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope = {"rope_type": "llama3", **dict(zip(names, model.rope_scaling, strict=True))}
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    return {
        "architectures": [architecture],
        "model_type": family,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim,
        "max_position_embeddings": model.max_len,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if model.rope_scaling else None,
        "rope_parameters": {"rope_theta": model.rope_theta, **rope},
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": model.param_dtype,
    }


def read(folder: Path, mesh: Mesh | None = None, **changes: Any) -> Transformer:
    """The model in a folder with config.json and *.safetensors.

    Args:
        changes: fields of Model to set otherwise, such as compute_dtype.

    Raises:
        UserError: a file is missing, or a tensor is missing or has another shape.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: a folder with config.json and *.safetensors is needed")
    config, vocab_size = read_config(json.loads(path.read_text()))
    config = dataclasses.replace(config, **changes)
    make = functools.partial(Transformer, config, vocab_size)
    wanted = jax.eval_shape(lambda: make(jax.random.key(0)))
    tensors = _read_tensors(Path(folder))
    leaves = {name: _stack(name, tensors, config, leaf) for name, leaf in _named(wanted).items()}
    model = jax.tree.unflatten(jax.tree.structure(wanted), list(leaves.values()))
    places = shardings(wanted, mesh) if mesh is not None else None
    return jax.device_put(model, places)


def write(model: Transformer, folder: Path) -> None:
    """Write config.json and model.safetensors, names and layout as transformers has them."""
    config = write_config(model.config, model.embed.shape[0])  # what cannot be written is said before anything is
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in _named(model).items():
        value = np.asarray(jax.device_get(leaf))
        if name in OTHER_NAMES:
            tensors[OTHER_NAMES[name]] = value.T.copy() if name == "head" else value
        else:
            inside = name.removeprefix("blocks/")
            for layer in range(model.config.num_layers):
                theirs = f"model.layers.{layer}.{LAYER_NAMES[inside]}"
                tensors[theirs] = np.ascontiguousarray(_to_theirs(inside, value[layer]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _rope_scaling(rope: dict[str, Any]) -> tuple[float, ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    if kind != "llama3":
        raise UserError(f"config.json: rope scaling {kind!r}; there are default and llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return tuple(float(rope[name]) for name in names)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path, `blocks/attn_norm/scale`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(k.name for k in path if k.name != "value"): leaf for path, leaf in paths}


def _read_tensors(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors file")
    found: dict[str, Callable[[], np.ndarray]] = {}
    for path in files:
        opened = safe_open(path, framework="numpy")
        found |= {name: functools.partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
    return found


def _stack(name: str, tensors: dict[str, Callable[[], np.ndarray]], config: Model, wanted: Any) -> np.ndarray:
    """One parameter of ours from theirs, all layers stacked."""

    def get(theirs: str) -> np.ndarray:
        if theirs not in tensors:
            raise UserError(f"the checkpoint has no tensor {theirs!r}")
        return tensors[theirs]()

    if name in OTHER_NAMES:
        value = get(OTHER_NAMES[name])
        value = value.T if name == "head" else value
    else:
        inside = name.removeprefix("blocks/")
        each = (get(f"model.layers.{i}.{LAYER_NAMES[inside]}") for i in range(config.num_layers))
        value = np.stack([_to_ours(inside, tensor, wanted.shape[1:]) for tensor in each])
    if value.shape != wanted.shape:
        raise UserError(f"the checkpoint's {name} has shape {value.shape}; config.json says {wanted.shape}")
    return value.astype(jnp.dtype(wanted.dtype))


def _to_ours(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Theirs is [out, in]; ours is [in, out] with heads as dimensions of their own."""
    return tensor.T.reshape(shape) if tensor.ndim == 2 else tensor


def _to_theirs(name: str, value: np.ndarray) -> np.ndarray:
    if value.ndim == 1:
        return value
    rows = value.shape[0] if name != "o" else value.shape[0] * value.shape[1]
    return value.reshape(rows, -1).T
