"""Safetensors checkpoints in and out, in the layout that Hugging Face transformers reads; one row a family."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from lm.experiment import Model, UserError
from lm.interop.config import FAMILIES, read_config, write_config
from lm.interop.tensors import INDEX, READ, Tensor, listed, read_folder
from lm.model.transformer import Transformer
from lm.parallel.rules import shardings
from lm.stored import read_json

__all__ = ["FAMILIES", "LAYER_NAMES", "OTHER_NAMES", "read", "read_config", "write", "write_config"]

# Ours, below `blocks` -> theirs, below `model.layers.N`
LAYER_NAMES = {
    "attn_norm/scale": "input_layernorm.weight",
    "attention/q/weight": "self_attn.q_proj.weight",
    "attention/k/weight": "self_attn.k_proj.weight",
    "attention/v/weight": "self_attn.v_proj.weight",
    "attention/o/weight": "self_attn.o_proj.weight",
    "attention/q_norm/scale": "self_attn.q_norm.weight",
    "attention/k_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/weight": "mlp.gate_proj.weight",
    "mlp/up/weight": "mlp.up_proj.weight",
    "mlp/down/weight": "mlp.down_proj.weight",
}
OTHER_NAMES = {
    "embed/weight": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
EMBED, HEAD = OTHER_NAMES["embed/weight"], OTHER_NAMES["head/weight"]
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)", re.DOTALL)
FREQUENCIES = "self_attn.rotary_emb.inv_freq"  # which old checkpoints of Llama have in every layer


def read(folder: Path, mesh: Mesh | None = None, **changes: Any) -> Transformer:
    """The model in a folder with config.json and *.safetensors: all of its tensors, and nothing that would be left out.

    Args:
        changes: fields of Model to set otherwise, such as compute_dtype.

    Raises:
        UserError: a file is missing or damaged, config.json has what the model has not, a tensor is missing, unexpected, of
            another shape or dtype, or not finite.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: a folder with config.json and *.safetensors is needed")
    described, vocab_size = read_config(read_json(path), str(path))
    tensors = read_folder(folder)
    _refuse_other_tensors(folder, tensors, described, vocab_size)
    config = dataclasses.replace(described, **changes)
    make = functools.partial(Transformer, config, vocab_size)
    wanted = jax.eval_shape(lambda: make(jax.random.key(0)))
    leaves = {name: _stack(name, tensors, config, leaf) for name, leaf in _named(wanted).items()}
    model = jax.tree.unflatten(jax.tree.structure(wanted), list(leaves.values()))
    places = shardings(wanted, mesh) if mesh is not None else None
    return jax.device_put(model, places)


def write(model: Transformer, folder: Path) -> None:
    """Write config.json and model.safetensors, names and layout as transformers has them.

    Raises:
        UserError: the model has what no family here has, or the folder has other weights, which would be read with these.
    """
    config = write_config(model.config, model.vocab_size)  # what cannot be written is said before anything is
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    others = [file.name for file in folder.glob("*.safetensors") if file.name != "model.safetensors"]
    others += [INDEX] if (folder / INDEX).exists() else []
    if others:
        raise UserError(f"{folder} has {listed(sorted(others))} of another model: name an empty folder")
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in _named(model).items():
        value = np.asarray(jax.device_get(leaf))
        if name in OTHER_NAMES:
            tensors[OTHER_NAMES[name]] = value.T.copy() if name == "head/weight" else value
        else:
            inside = name.removeprefix("blocks/")
            for layer in range(model.config.num_layers):
                theirs = f"model.layers.{layer}.{LAYER_NAMES[inside]}"
                tensors[theirs] = np.ascontiguousarray(_to_theirs(inside, value[layer]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def layer_shapes(m: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors by their names: matrices are [out, in]."""
    queries, keys = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm/scale": (m.embed_dim,),
        "attention/q/weight": (queries, m.embed_dim),
        "attention/k/weight": (keys, m.embed_dim),
        "attention/v/weight": (keys, m.embed_dim),
        "attention/o/weight": (m.embed_dim, queries),
        "mlp_norm/scale": (m.embed_dim,),
        "mlp/gate/weight": (m.mlp_dim, m.embed_dim),
        "mlp/up/weight": (m.mlp_dim, m.embed_dim),
        "mlp/down/weight": (m.embed_dim, m.mlp_dim),
    }
    if m.qk_norm:
        shapes |= {"attention/q_norm/scale": (m.head_dim,), "attention/k_norm/scale": (m.head_dim,)}
    return {LAYER_NAMES[name]: shape for name, shape in shapes.items()}


def _refuse_other_tensors(folder: Path, tensors: dict[str, Tensor], config: Model, vocab_size: int) -> None:
    """Raise, in one line that names all kinds of it, where the tensors are not those that config.json describes."""
    layers = {int(found[1]) for name in tensors if (found := LAYER.fullmatch(name)) and len(found[1]) < 10}
    count = max(layers, default=-1) + 1
    if config.num_layers != count:
        raise UserError(
            f"{folder}: config.json has num_hidden_layers {config.num_layers}, and the files have {count} layers"
        )
    if len(layers) < count:
        raise UserError(f"{folder}: the files lack {count - len(layers)} of the {count} layers of config.json")
    wanted = dict(_expected(config, vocab_size))
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted and not _is_known(name, tensors, config)]
    shapes = [
        f"{name} {list(tensors[name].shape)} (config.json makes it {list(shape)})"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    dtypes = [f"{name} {tensors[name].dtype}" for name in wanted if name in tensors and tensors[name].dtype not in READ]
    faults = {
        "missing": missing,
        "unexpected, which the model does not have": unexpected,
        "of another shape": shapes,
        f"of a dtype other than {', '.join(READ)}": dtypes,
    }
    said = [f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}: {listed(names)}"
            for what, names in faults.items() if names]  # fmt: skip
    if said:
        raise UserError(f"{folder}: {'; '.join(said)}")


def _expected(config: Model, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a checkpoint, with its shape."""
    yield EMBED, (vocab_size, config.embed_dim)
    shapes = layer_shapes(config)
    for layer in range(config.num_layers):
        yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in shapes.items())
    yield OTHER_NAMES["norm/scale"], (config.embed_dim,)
    if not config.tied_head:
        yield HEAD, (vocab_size, config.embed_dim)


def _is_known(name: str, tensors: dict[str, Tensor], config: Model) -> bool:
    """Whether a tensor only repeats what the model has anyway: a tied head, or the frequencies of rope."""
    if name == HEAD and EMBED in tensors:
        same = tensors[name].shape == tensors[EMBED].shape and tensors[name].dtype == tensors[EMBED].dtype
        return same and tensors[name].dtype in READ and np.array_equal(tensors[name].read(), tensors[EMBED].read())
    found = LAYER.fullmatch(name)
    if found is None or found[2] != FREQUENCIES or config.rope_scaling or tensors[name].dtype not in READ:
        return False
    own = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return tensors[name].shape == own.shape and np.allclose(tensors[name].read().astype(float), own, rtol=1e-2)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path, `blocks/attn_norm/scale`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(k.name for k in path if k.name != "value"): leaf for path, leaf in paths}


def _stack(name: str, tensors: dict[str, Tensor], config: Model, wanted: Any) -> np.ndarray:
    """One parameter of ours from theirs, all layers stacked."""
    dtype = jnp.dtype(wanted.dtype)
    if name in OTHER_NAMES:
        value = _finite(OTHER_NAMES[name], tensors, dtype)
        return value.T if name == "head/weight" else value
    inside = name.removeprefix("blocks/")
    each = (_finite(f"model.layers.{i}.{LAYER_NAMES[inside]}", tensors, dtype) for i in range(config.num_layers))
    return np.stack([_to_ours(inside, tensor, wanted.shape[1:]) for tensor in each])


def _finite(name: str, tensors: dict[str, Tensor], dtype: Any) -> np.ndarray:
    """A tensor in the dtype that it is kept in. Raises UserError where some of it is no number."""
    given = tensors[name].read()
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is counted below
        value = given.astype(dtype)
    if broken := int(value.size - np.isfinite(value).sum()):
        raise UserError(
            f"{tensors[name].file}: {name} has {broken} values of {value.size} that are no finite {dtype} numbers"
        )
    return value


def _to_ours(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Theirs is [out, in]; ours is [in, out] with heads as dimensions of their own."""
    return tensor.T.reshape(shape) if tensor.ndim == 2 else tensor


def _to_theirs(name: str, value: np.ndarray) -> np.ndarray:
    if value.ndim == 1:
        return value
    rows = value.shape[0] if name != "attention/o/weight" else value.shape[0] * value.shape[1]
    return value.reshape(rows, -1).T
