"""Writes a model as a safetensors checkpoint in the layout of Hugging Face transformers."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config.rope import longest_sequence
from lm.experiment import UserError
from lm.interop.config import computes_the_same, read_config, write_config
from lm.interop.origin import Origin
from lm.interop.places import EMBED, HEAD, Place, parameter_places
from lm.interop.tensors import DTYPES, INDEX, Tensor, listed, write_file
from lm.model.families import FAMILIES
from lm.model.families.family import Family
from lm.model.heads import Scorer
from lm.model.transformer import Transformer

NAMES = {dtype.name: theirs for theirs, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000
LAYER = re.compile(r"model\.layers\.(\d+)\.")
SCORE = "score.weight"
CLASSIFIER = {"id2label": {"0": "score"}, "label2id": {"score": 0}}  # of one label

Part = tuple[Place, jax.Array, int]
"""A parameter's place, its array, and the index of the layer."""


def write(
    model: Transformer | Scorer,
    folder: Path,
    family: str = "",
    dtype: str | None = None,
    origin: Origin | None = None,
    shard_bytes: int | None = None,
    token_ids: Mapping[str, int] = MappingProxyType({}),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write config.json and the safetensors files (with an index if there are several), one tensor in memory at a time.

    A reward model is written as a classifier of sequences with one label, whose logit is the score at the last token.

    Args:
        family: model_type to write; "": the first family that can represent the model.
        dtype: of all tensors; None: that of `origin`, else the parameters'.
        origin: of the original weights; its config.json is kept, and without `dtype` and `shard_bytes`
            also the dtype and file of every tensor.
        shard_bytes: maximum bytes of tensors per file; None: 5 GB.
        token_ids: fields such as `eos_token_id` for a config.json that is not an original one.
        progress: called with the number of bytes written so far and the total.

    Raises:
        UserError: no family can represent the model, a value does not fit the dtype, or the folder already has weights.
    """
    scorer = model if isinstance(model, Scorer) else None
    model = model.body if isinstance(model, Scorer) else model
    origin = origin if origin is not None and _describes(origin, model) else None
    # Errors are raised before anything is written.
    config = published_config(model, origin, family)
    if origin is None or not origin.tensors:
        config = {**token_ids, **config}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted(file.name for file in folder.glob("*.safetensors*")):
        raise UserError(f"{folder} has {listed(others)} of another model: name an empty folder")
    family_found = FAMILIES[config["model_type"]]
    tensors = _tensors(model, family_found, dtype)
    if scorer is not None:
        tensors |= _score_tensor(scorer, dtype)
        config |= {"pad_token_id": token_ids.get("pad_token_id"), **CLASSIFIER}
        config["architectures"] = [family_found.architecture.replace("ForCausalLM", "ForSequenceClassification")]
    as_it_came = origin is not None and bool(origin.tensors) and scorer is None
    if origin is not None and as_it_came and dtype is None:
        tensors = _as_they_came(tensors, origin)
    if not as_it_came or dtype is not None or shard_bytes is not None:
        tensors = _in_files(tensors, shard_bytes or SHARD_BYTES)
    _write_files(folder, tensors, progress)
    dtypes = {tensors[name].dtype for name in tensors}
    text = json.dumps(_with_dtype(config, dtypes), indent=2, ensure_ascii=False) + "\n"
    if origin is not None and json.loads(text) == json.loads(origin.config):
        text = origin.config
    (folder / "config.json").write_text(text, encoding="utf-8")


def _score_tensor(scorer: Scorer, dtype: str | None) -> dict[str, Tensor]:
    weight = scorer.score.weight[...]
    kind = NAMES[dtype or jnp.dtype(weight.dtype).name]
    return {SCORE: Tensor(Path("model.safetensors"), (1, *weight.shape), kind, lambda: np.asarray(weight)[None])}


def family_of(model: Transformer, origin: Origin | None = None) -> Family:
    """The family that names a model's tensors in a checkpoint: that of its origin, else the first that can represent it."""
    return FAMILIES[published_config(model, origin)["model_type"]]


def published_config(model: Transformer, origin: Origin | None = None, family: str = "") -> dict[str, Any]:
    """The config.json of an export: that of the origin if it still describes the model, else of a family that can."""
    if origin is not None and _describes(origin, model):
        return _kept_config(model, origin)
    return write_config(model.config, model.vocab_size, family)


def _describes(origin: Origin, model: Transformer) -> bool:
    """Whether the original config.json still describes the model, except for its maximum length."""
    theirs, vocab_size = read_config(json.loads(origin.config))
    return computes_the_same(theirs, model.config) and vocab_size == model.vocab_size


def _kept_config(model: Transformer, origin: Origin) -> dict[str, Any]:
    config, longest = json.loads(origin.config), model.config.max_len
    theirs, _ = read_config(config)
    longer = longest > longest_sequence(theirs.max_len, [layer.rope_scaling for layer in theirs.period])
    return config | ({"max_position_embeddings": longest} if longer else {})


def _with_dtype(config: dict[str, Any], dtypes: set[str]) -> dict[str, Any]:
    """The config with a dtype of its tensors; if it has to be changed, the widest."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    known = [name for name in dtypes if DTYPES[name].name == config.get(key)]
    return config if known else config | {key: next(dtype.name for name, dtype in DTYPES.items() if name in dtypes)}


# ---- tensors -------------------------------------------------------------------------------------------------------


def _tensors(model: Transformer, family: Family, dtype: str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, layer by layer; values are computed only when a tensor is read."""
    parts: dict[str, list[Part]] = {}
    for place, leaf in zip(parameter_places(model, family), jax.tree.leaves(model), strict=True):
        for layer, name in enumerate(place.names):
            parts.setdefault(name, []).append((place, leaf, layer))
    return {
        name: Tensor(
            Path("model.safetensors"),
            parts[name][0][0].their_shape,
            NAMES[dtype or parts[name][0][0].dtype.name],
            functools.partial(_read, sorted(parts[name], key=lambda part: part[0].first)),
        )
        for name in sorted(parts, key=_depth)
    }


def _read(parts: list[Part]) -> np.ndarray:
    """The values of a tensor in the checkpoint, from the parameters that it holds."""
    found = [place.to_theirs(np.asarray(leaf[layer] if place.stacked else leaf)) for place, leaf, layer in parts]
    return np.concatenate(found) if len(found) > 1 else found[0]


def _depth(name: str) -> float:
    layer = LAYER.match(name)
    return int(layer[1]) if layer else -1 if name == EMBED else math.inf


def _as_they_came(tensors: dict[str, Tensor], origin: Origin) -> dict[str, Tensor]:
    """The tensors with their original file and dtype, and with the copy of a tied head if the original has one."""
    there = tensors if HEAD in tensors or HEAD not in origin.tensors else tensors | {HEAD: tensors[EMBED]}
    missing = [name for name in there if origin.tensors.get(name, ("", ""))[1] not in DTYPES]
    if missing:
        raise UserError(
            f"the original weights are stored without tensor {missing[0]}: use --dtype to write other files"
        )
    return {name: replace(one, file=Path(origin.tensors[name][0]), dtype=origin.tensors[name][1])
            for name, one in there.items()}  # fmt: skip


def _in_files(tensors: dict[str, Tensor], most: int) -> dict[str, Tensor]:
    """The tensors assigned to files of at most `most` bytes; a larger tensor has a file to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, one in tensors.items():
        if shards[-1] and size + one.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += one.bytes
    if len(shards) == 1:
        return tensors
    files = [Path(f"model-{number:05d}-of-{len(shards):05d}.safetensors") for number in range(1, len(shards) + 1)]
    return {name: replace(tensors[name], file=file)
            for file, names in zip(files, shards, strict=True) for name in names}  # fmt: skip


def _write_files(folder: Path, tensors: dict[str, Tensor], progress: Callable[[int, int], None]) -> None:
    total, done = sum(one.bytes for one in tensors.values()), 0

    def written(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    files = sorted({one.file.name for one in tensors.values()})
    for file in files:
        write_file(folder / file, {name: one for name, one in tensors.items() if one.file.name == file}, written)
    if len(files) > 1:
        parameters = sum(math.prod(one.shape) for one in tensors.values())
        names = {name: tensors[name].file.name for name in sorted(tensors)}
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
