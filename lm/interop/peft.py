"""Reads and writes LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import regex
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save

from lm.config.field import shown
from lm.experiment import UserError
from lm.interop.places import Place, parameter_places
from lm.interop.tensors import Tensor, listed, read_file, refuse_tensors
from lm.model.families.family import Family
from lm.model.linear import Linear, LowRank, column_norms
from lm.model.lora import freeze_adapter, linears, with_adapter
from lm.model.parameter import axes_of, parameter
from lm.model.transformer import Transformer
from lm.parallel.rules import shardings
from lm.stored import read_json, write_atomic, write_json_atomic

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # before the name of a module, in the names of tensors
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TABLES = {"lm_head", "embed_tokens"}
MERGE_FIRST = "PEFT's merge_and_unload gives a whole model with it, whose folder can be used instead"
ALL_LINEAR = "all-linear"
MATCH_SECONDS = 1.0  # time limit for matching a pattern with a name

USED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
# Fields that can change what the adapter computes: field -> the supported values. Other values of init_lora_weights also change
# the weights of the base model.
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "use_rslora": (True, False),
    "use_dora": (True, False),
}
# Fields about training or storage. PEFT sets fan_in_fan_out to false for PyTorch's Linear.
HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
        "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
        "revision", "runtime_config", "task_type",
    }
)  # fmt: skip


@dataclass(frozen=True)
class AdapterTarget:
    """A Linear of the blocks, all layers together: its path in our model and its place in a checkpoint."""

    path: str
    place: Place

    @property
    def modules(self) -> tuple[str, ...]:
        """Name of the module in each layer."""
        return tuple(name.removesuffix(".weight") for name in self.place.names)

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.place.shape[: self.place.inputs]

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.place.shape[self.place.inputs :]


def _targets(model: Transformer, family: Family) -> list[AdapterTarget]:
    """Every Linear of a model's blocks, whether or not its weights are quantised or it has factors."""
    base = jax.eval_shape(lambda: Transformer(model.config, model.vocab_size, jax.random.key(0)))
    params = jax.tree_util.tree_leaves_with_path(base, is_leaf=lambda x: isinstance(x, nnx.Variable))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in params]
    places = zip(names, parameter_places(base, family), strict=True)
    return [
        AdapterTarget(name.removesuffix("/weight"), place) for name, place in places if place.stacked and place.inputs
    ]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path, model: Transformer, family: Family, mesh: Mesh | None = None) -> Transformer:
    """The model with a folder's adapter added to its own, all as factors of an earlier stage (see `read_factors`)."""
    factors = read_factors(folder, model, family)
    if mesh is not None:
        factors = jax.device_put(factors, shardings(factors, mesh))
    return freeze_adapter(with_adapter(freeze_adapter(model), factors))


def read_factors(folder: Path, model: Transformer, family: Family) -> dict[str, LowRank]:
    """The factors of an adapter, by the path of their Linear in the base model; every tensor of the adapter must be used.

    Raises:
        UserError: a file is missing or damaged, the configuration has an unsupported setting, or the adapter belongs to
            another base model: a tensor is missing, unexpected, not finite, or has another shape or dtype.
    """
    folder, targets = Path(folder), _targets(model, family)
    if (folder / PICKLED).exists() and not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} has {PICKLED} but no {WEIGHTS}; PEFT's save_pretrained writes one")
    described = read_json(folder / CONFIG)
    try:
        config = _checked(described)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    tensors = read_file(folder / WEIGHTS)
    if tables := [name for name in tensors if TABLES & set(name.split("."))]:
        raise UserError(
            f"{folder} changes the embedding or the head, which no adapter here does, by {listed(tables)}; {MERGE_FIRST}"
        )
    try:
        ranks = _ranks(config, [name for target in targets for name in target.modules])
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    dora = bool(config.get("use_dora"))
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        outputs, inputs = target.place.their_shape
        for name in target.modules:
            if name in ranks:
                rank = ranks[name][0]
                shapes |= {PREFIX + name + A: (rank, inputs), PREFIX + name + B: (outputs, rank)}
                shapes |= {PREFIX + name + MAGNITUDE: (outputs,)} if dora else {}
    refuse_tensors(f"{folder} is an adapter for another base model", tensors, shapes, "this base model")
    weights = {path: axes_of(linear.weight) for path, linear in linears(model)}
    return {
        target.path: _low_rank(target, weights[target.path], ranks, tensors, dora)
        for target in targets
        if any(name in ranks for name in target.modules)
    }


def _low_rank(
    target: AdapterTarget,
    axes: tuple[str | None, ...],
    ranks: Mapping[str, tuple[int, float]],
    tensors: Mapping[str, Tensor],
    dora: bool,
) -> LowRank:
    """The factors of one Linear; layers of a lower rank, and layers without factors, are padded with zeros.

    All layers share the largest scale; b of a layer with a smaller scale is multiplied by the ratio.
    """
    outputs, inputs = target.place.part_shape
    own = [ranks[name] for name in target.modules if name in ranks]
    width, most = max(rank for rank, _ in own), max(scale for _, scale in own)

    def read(name: str, end: str) -> np.ndarray:
        value = tensors[PREFIX + name + end].finite(PREFIX + name + end, np.float32)
        return value if end == A else value[target.place.rows]

    layers = len(target.modules)
    a, b = np.zeros((layers, inputs, width), np.float32), np.zeros((layers, width, outputs), np.float32)
    for layer, name in enumerate(target.modules):
        if name in ranks:
            rank, scale = ranks[name]
            a[layer, :, :rank], b[layer, :rank] = read(name, A).T, read(name, B).T * np.float32(scale / most)
    of_inputs, of_outputs = axes[1 : 1 + target.place.inputs], axes[1 + target.place.inputs :]
    magnitude = None
    if dora:
        if bare := [name for name in target.modules if name not in ranks]:
            raise UserError(
                f"use_dora is true, and target_modules lacks {listed(bare)}: DoRA needs all layers of a module or none"
            )
        value = np.stack([read(name, MAGNITUDE) for name in target.modules]).reshape(layers, *target.outputs)
        magnitude = parameter(jnp.asarray(value), ("layers", *of_outputs))
    return LowRank(
        parameter(jnp.asarray(a.reshape(layers, *target.inputs, width)), ("layers", *of_inputs, "rank")),
        parameter(jnp.asarray(b.reshape(layers, width, *target.outputs)), ("layers", "rank", *of_outputs)),
        scale=most,
        magnitude=magnitude,
    )


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


def _checked(config: Any) -> Mapping[str, Any]:
    """The configuration. Raises UserError for a field that is neither supported nor known to have no effect."""
    if not isinstance(config, dict):
        raise UserError(f"holds {shown(config)}; it should be a JSON object")
    for name, values in ONLY.items():
        if config.get(name, values[0]) not in (*values, None):
            raise UserError(f"{name} is {shown(config[name])}; it should be {' or '.join(map(str, values))}")
    strange = [
        f"{name if name.isidentifier() else repr(name)} {shown(value)}"
        for name, value in config.items()
        if name not in {*USED, *ONLY, *HARMLESS} and value not in (None, False, [], {})
    ]
    if strange:
        raise UserError(
            f"the reader does not know {listed(strange)}, which may change what the adapter computes; {MERGE_FIRST}"
        )
    return config


def _ranks(config: Mapping[str, Any], modules: list[str]) -> dict[str, tuple[int, float]]:
    """Rank and scale (α/r or α/√r) of every module that the adapter changes, by PEFT's rules."""
    found = {}
    for name in modules:
        if not _is_named(config, "target_modules", name) or _is_named(config, "exclude_modules", name):
            continue
        if name not in config["target_modules"] and not _in_layers(config, name):
            continue
        rank, alpha = (
            _by_pattern(config, "rank_pattern", "r", name),
            _by_pattern(config, "alpha_pattern", "lora_alpha", name),
        )
        if type(rank) is not int or not 1 <= rank <= 2**31 - 1:
            raise UserError(f"r of {name} is {shown(rank)}; it should be a whole number from 1")
        if type(alpha) not in (int, float) or not 0 < alpha < 1e30:
            raise UserError(f"lora_alpha of {name} is {shown(alpha)}; it should be a number above 0")
        found[name] = (rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not found:
        raise UserError(
            f"target_modules is {shown(config['target_modules'])}, which matches none of the base model's modules, such as "
            f"{listed(modules[:3])}"
        )
    return found


def _is_named(config: Mapping[str, Any], field: str, name: str) -> bool:
    """Whether a field selects a module: a list by the name or its end, a pattern by a match with the whole name."""
    wanted = config.get(field)
    if isinstance(wanted, str):
        return wanted.lower() == ALL_LINEAR or _match(wanted, name, field) is not None
    if wanted is None and field == "exclude_modules":
        return False
    return any(name == one or name.endswith(f".{one}") for one in _texts(wanted, field))


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    """Whether a module is in one of layers_to_transform, which means all layers if it is empty."""
    layers, given = config.get("layers_to_transform"), config.get("layers_pattern") or "[^.]*"
    if layers is None or layers == []:
        return True
    numbers = layers if isinstance(layers, list) else [layers]
    if isinstance(config["target_modules"], str) or not all(type(number) is int for number in numbers):
        raise UserError(
            f"layers_to_transform is {shown(layers)}; it should be numbers of layers, and target_modules a list"
        )
    for pattern in _texts([given] if isinstance(given, str) else given, "layers_pattern"):
        if (found := _match(rf"(?:.*?\.)?(?:{pattern})\.(?P<layer>\d+)\..*", name, "layers_pattern")) is not None:
            return int(found["layer"]) in numbers
    return False


def _by_pattern(config: Mapping[str, Any], field: str, otherwise: str, name: str) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{field} is {shown(patterns)}; it should be an object of patterns and their values")
    found = [value for key, value in patterns.items() if _match(rf"(?:.*\.)?(?:{key})", name, field)]
    return found[0] if found else config.get(otherwise, 8)  # PEFT's default for rank and alpha


def _match(pattern: str, name: str, field: str) -> regex.Match[str] | None:
    try:
        return regex.fullmatch(pattern, name, timeout=MATCH_SECONDS)
    except regex.error as error:
        raise UserError(f"{field} has {shown(pattern)}, which is not a regular expression: {error}") from error
    except TimeoutError:
        raise UserError(f"{field} has {shown(pattern)}, which takes more than {MATCH_SECONDS:g} s to match") from None


def _texts(value: Any, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{field} is {shown(value)}; it should be a list of names or a pattern")
    return value


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_adapter(
    model: Transformer, folder: Path, family: Family, base: str = "", rs_lora: bool = False, dtype: str | None = None
) -> None:
    """Write all factors of a model, of this stage and of earlier ones, as one adapter in PEFT's format.

    Args:
        base: name or folder of the base model, which PEFT loads if only the adapter is given.
        rs_lora: write α for scale = α/√r (arXiv 2312.03732) instead of α/r.
        dtype: of the tensors; None: unchanged.

    Raises:
        UserError: the model has no factors.
    """
    found = dict(linears(model))
    if any(linear.earlier is not None for linear in found.values()):
        found = dict(linears(freeze_adapter(model)))  # concatenated
    dora = any(low.magnitude is not None for linear in found.values() if (low := linear.lora or linear.earlier))
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, tuple[int, float]] = {}
    targets = _targets(model, family)
    for name, parts in _by_module(targets, found).items():
        a, b, scale = _module_factors(parts)
        rank = int(np.flatnonzero(a.any(1) | b.any(0)).max(initial=-1)) + 1
        if rank:
            alpha = round(scale * (math.sqrt(rank) if rs_lora else rank), 9)
            settings[name] = (rank, int(alpha) if alpha.is_integer() else alpha)
            tensors |= {PREFIX + name + A: a[:rank], PREFIX + name + B: b[:, :rank]}
            if dora and sum(part.place.part_shape[0] for part in parts) < len(b):
                raise UserError(
                    f"DoRA of some rows of {name} cannot be written: lora.targets should select all of it or none"
                )
            if dora:
                tensors[PREFIX + name + MAGNITUDE] = np.concatenate([part.magnitude() for part in parts])
    if not settings:
        raise UserError("the model has no adapter, or only factors of zeros")
    config = _described(settings, [name for target in targets for name in target.modules])
    config |= {"use_rslora": rs_lora, "use_dora": dora, "base_model_name_or_path": base or None}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: np.ascontiguousarray(x.astype(jnp.dtype(dtype or x.dtype))) for name, x in tensors.items()}
    write_atomic(folder / WEIGHTS, save(stored, {"format": "pt"}))  # save_file would let nobody else read it
    write_json_atomic(folder / CONFIG, config)


@dataclass(frozen=True)
class LayerFactors:
    """One layer of a Linear with its low-rank factors; it may be a part of a module's rows (fused projections)."""

    place: Place
    linear: Linear
    low: LowRank
    layer: int

    def magnitude(self) -> np.ndarray:
        """The norm of each output's weights with all factors."""
        if self.low.magnitude is not None and self.low.normed:
            return np.asarray(self.low.magnitude[...][self.layer]).reshape(-1)
        one = jax.tree.map(lambda x: x[self.layer], self.linear)
        return np.asarray(column_norms(one.effective(), one.inputs)).reshape(-1)


def _by_module(targets: list[AdapterTarget], found: Mapping[str, Linear]) -> dict[str, list[LayerFactors]]:
    """The Linears with factors, by module; a fused projection has several."""
    modules: dict[str, list[LayerFactors]] = {}
    for target in targets:
        linear = found[target.path]
        if (low := linear.lora or linear.earlier) is not None:
            for layer, name in enumerate(target.modules):
                modules.setdefault(name, []).append(LayerFactors(target.place, linear, low, layer))
    return {name: sorted(parts, key=lambda part: part.place.first) for name, parts in modules.items()}


def _module_factors(parts: list[LayerFactors]) -> tuple[np.ndarray, np.ndarray, float]:
    """A [r, in], B [out, r] and the scale of a module, from all Linears that are parts of it.

    Unless all share one A, their factors are concatenated along the rank, with zeros in the other rows of B.
    """
    a = [np.asarray(part.low.a[...][part.layer]).reshape(part.place.part_shape[1], -1).T for part in parts]
    b = [np.asarray(part.low.b[...][part.layer]).reshape(-1, part.place.part_shape[0]).T for part in parts]
    same = all(x.shape == a[0].shape and np.array_equal(x, a[0]) for x in a)
    whole = np.zeros((parts[0].place.their_shape[0], len(a[0]) if same else sum(map(len, a))), b[0].dtype)
    first = 0
    for part, x in zip(parts, b, strict=True):
        whole[part.place.rows, first : first + x.shape[1]] = x
        first += 0 if same else x.shape[1]
    return a[0] if same else np.concatenate(a), whole, parts[0].low.scale


def _described(found: Mapping[str, tuple[int, float]], modules: list[str]) -> dict[str, Any]:
    """adapter_config.json of modules with these (rank, α); if all layers agree, the last part of the name stands for all."""
    ends: dict[str, list[str]] = {}
    for name in modules:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    numbers: dict[str, tuple[int, float]] = {}
    for end, names in ends.items():
        same = len({found.get(name) for name in names}) == 1
        numbers |= {end if same else name: found[name] for name in names if name in found}
    (rank, alpha), _ = Counter(numbers.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(numbers),
        "rank_pattern": {name: one for name, (one, _) in numbers.items() if one != rank},
        "alpha_pattern": {name: one for name, (_, one) in numbers.items() if one != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
