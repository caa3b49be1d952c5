"""Adapters in PEFT's format: golden logits, gradients and merged weights; written and read again; refused where they differ."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.cli.chat import command
from lm.cli.export import _base_of
from lm.experiment import SFT, Experiment, LoRA, Mesh, Stage, Tokenizer, UserError
from lm.interop import hf
from lm.interop.export import write
from lm.interop.peft import CONFIG, PREFIX, WEIGHTS, read_adapter, read_factors, write_adapter
from lm.model.families import FAMILIES
from lm.model.lora import adapted, freeze_adapter, linears, merged, with_adapter
from lm.objectives.logprobs import token_logprobs
from lm.open_weights import check_weights, with_init
from lm.open_weights import read as read_open_weights
from lm.parallel.mesh import make_mesh
from lm.train.answers import Contestant, SamplingRequest, _names, _settings
from lm.train.loaded_run import LoadedRun, load_adapters
from lm.types import TokenBatch
from tests.helpers import tiny_model

LLAMA = FAMILIES["llama"]


def pytest_generate_tests(metafunc):
    if "adapter" in metafunc.fixturenames:
        root = Path(metafunc.config.getoption("--golden")) / "lora"
        found = sorted(path.parent for path in root.glob(f"*/{CONFIG}"))
        skip = pytest.param(None, marks=pytest.mark.skip(reason=f"no golden adapters at {root}"))
        metafunc.parametrize("adapter", found or [skip], ids=lambda folder: folder.name if folder else "none")


def golden_base(adapter: Path):
    config = json.loads((adapter.parent / "base" / "config.json").read_text())
    return hf.read(adapter.parent / "base"), FAMILIES[config["model_type"]]


def part(model, path):
    return dict(linears(model))[path]


def flat(weight, layer, inputs):
    """One layer's matrix as in a checkpoint, [out, in]."""
    one = np.asarray(weight[layer])
    return one.reshape(int(np.prod(one.shape[:inputs])), -1).T


@pytest.mark.slow
def test_golden_adapter(adapter):
    base, family = golden_base(adapter)
    expected, name = np.load(adapter.parent / "expected.npz"), adapter.name
    ids, mask = expected["input_ids"], expected["attention_mask"]
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    weights = (mask * np.roll(mask, 1, axis=1)).astype(np.float32)
    weights[:, 0] = 0
    batch = TokenBatch(*map(jnp.asarray, (ids, weights, mask, places)))
    logits = jax.jit(lambda model: model(batch.tokens, batch.positions, batch.segments))
    real = mask.astype(bool)
    read = read_adapter(adapter, base, family)
    for model, key in (
        (base, "logits_base"),
        (read, f"{name}/logits_unmerged"),
        (merged(read), f"{name}/logits_merged"),
    ):
        np.testing.assert_allclose(np.asarray(logits(model))[real], expected[key][real], atol=2e-5)
    for kind in "vo":
        linear = part(merged(read), f"blocks/attention/{kind}")
        ours = flat(linear.weight[...], 1, linear.inputs)
        np.testing.assert_allclose(ours, expected[f"{name}/merged_layer1_{kind}_proj"], atol=2e-6)
    factors = read_factors(adapter, base, family)

    def loss(factors):
        logp = token_logprobs(with_adapter(base, factors), batch).logp
        return -(logp * batch.weights).sum() / batch.weights.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(factors)
    np.testing.assert_allclose(value, expected[f"{name}/loss"], rtol=2e-6)
    found = grads.get("blocks/attention/v", grads.get("blocks/attention/o"))
    inputs = found.a[...].ndim - 2
    for ours, key in ((flat(found.a[...], 1, inputs), "A"), (flat(found.b[...], 1, 1), "B")):
        np.testing.assert_allclose(ours, expected[f"{name}/grad_lora_{key}"], rtol=1e-4, atol=1e-6)


def test_golden_adapter_is_written_as_it_was(adapter, tmp_path):
    base, family = golden_base(adapter)
    was = json.loads((adapter / CONFIG).read_text())
    model = with_adapter(base, read_factors(adapter, base, family))
    write_adapter(model, tmp_path, family, rs_lora=was["use_rslora"])
    one, other = load_file(adapter / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / CONFIG).stat().st_mode  # who may read one may read both
    again = read_factors(tmp_path, base, family)
    assert {path: low.scale for path, low in again.items()} == {path: part(model, path).lora.scale for path in again}


@pytest.fixture(scope="module")
def model():
    """A tiny model whose layers have factors of their own, and others of two earlier stages."""
    base = tiny_model(num_layers=2)
    rng = np.random.default_rng(0)
    targets = [path for path, _ in linears(base) if path.startswith("blocks")]

    def with_random(model, paths, rank, dora=False):
        stage = Stage("sft", SFT(), (), steps=1, lora=LoRA(rank=rank, alpha=3.0, targets=paths, dora=dora))
        new = adapted(freeze_adapter(model), stage, jax.random.key(rank), "policy")
        for _, linear in linears(new):
            if linear.lora is not None:
                linear.lora.b.set_value(jnp.asarray(rng.normal(size=linear.lora.b.shape) * 0.2, jnp.float32))
        return new

    return lambda dora=False: with_random(with_random(base, tuple(targets[:2]), 3), tuple(targets[1:]), 2, dora)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dora", [False, True])
def test_factors_of_several_stages_are_one_adapter(model, family, dora, tmp_path):
    """Ranks follow one another, in modules of their own and in fused ones; magnitudes become those of the whole."""
    whole, family = model(dora), FAMILIES[family]
    if dora and family.model_type == "phi3":
        with pytest.raises(UserError, match=r"DoRA of some rows of .*qkv_proj cannot be written"):
            write_adapter(freeze_adapter(tiny_with(whole, "blocks/attention/q")), tmp_path, family)
    write_adapter(whole, tmp_path, family)
    base = tiny_model(num_layers=2)
    inputs = jnp.arange(32).reshape(2, 16), jnp.broadcast_to(jnp.arange(16), (2, 16)), jnp.ones((2, 16), jnp.int32)
    logits = jax.jit(lambda model: model(*inputs))
    np.testing.assert_allclose(logits(read_adapter(tmp_path, base, family)), logits(whole), atol=2e-5)


def tiny_with(model, path):
    """The model with the factors of one Linear alone."""
    changed = jax.tree.map(lambda x: x, model)
    for name, linear in linears(changed):
        if name != path:
            linear.lora = linear.earlier = None
    return changed


@pytest.fixture
def folder(tmp_path, model):
    write_adapter(model(), tmp_path, LLAMA)
    return tmp_path


BAD = {
    "bias": ("all", r"bias is 'all'; it should be none"),
    "modules_to_save": (["lm_head"], r"the reader does not know modules_to_save \['lm_head'\], which may change"),
    "peft_type": ("IA3", r"peft_type is 'IA3'; it should be LORA"),
    "init_lora_weights": ("pissa", r"init_lora_weights is 'pissa'; it should be True or False or gaussian"),
    "trainable_token_indices": ([1, 2], r"does not know trainable_token_indices \[1, 2\]"),
    "layers_to_transform": (["1"], r"layers_to_transform is \['1'\]; it should be numbers of layers"),
    "rank_pattern": ({"(": 2}, r"rank_pattern has .* which is not a regular expression"),
    "r": (0, r"r of model.layers.0.self_attn.\w+ is 0; it should be a whole number from 1"),
    "lora_alpha": ("8", r"lora_alpha of .* is '8'; it should be a number above 0"),
    "target_modules": (["query"], r"matches none of the base model's modules, such as model.layers.0.self_attn"),
    "use_dora": (True, r"adapter for another base model: \d+ tensors are missing: .*lora_magnitude_vector"),
}


@pytest.mark.parametrize("field", BAD)
def test_what_the_adapter_would_compute_otherwise_is_refused(folder, field):
    value, message = BAD[field]
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=message) as error:
        read_factors(folder, tiny_model(num_layers=2), LLAMA)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": r".*\.(?:self_attn|mlp)\.[a-z]+_proj"}, True),
        ({"exclude_modules": ["up_proj"]}, False),
        ({"layers_to_transform": [1]}, False),
        (
            {"layers_to_transform": [0, 1], "layers_pattern": "layers", "lora_dropout": 0.1, "fan_in_fan_out": True},
            True,
        ),
    ],
)
def test_targets_by_pattern_and_layer(folder, changes, same):
    """A target that the file has no tensors for, or a tensor that is no target, is named."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    if same:
        assert read_factors(folder, tiny_model(num_layers=2), LLAMA)
    else:
        with pytest.raises(UserError, match=r"another base model: \d+ tensors are unexpected"):
            read_factors(folder, tiny_model(num_layers=2), LLAMA)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.lora_A.weight",
        "model.embed_tokens.lora_embedding_A",
        "lm_head.weight",
        "model.embed_tokens.modules_to_save.weight",
    ],
)
def test_an_adapter_of_the_embedding_or_the_head_says_so(folder, name):
    save_file(load_file(folder / WEIGHTS) | {PREFIX + name: np.ones((2, 32), np.float32)}, folder / WEIGHTS)
    with pytest.raises(UserError, match=rf"changes the embedding or the head.*{name}; PEFT's merge_and_unload gives"):
        read_factors(folder, tiny_model(num_layers=2), LLAMA)


def test_an_adapter_for_another_base(folder, tmp_path_factory):
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight \[2, 32\] \(this base model makes it \[2, 16\]\)"):
        read_factors(folder, tiny_model(num_layers=2, embed_dim=16), LLAMA)
    with pytest.raises(UserError, match=r"\d+ tensors are unexpected.*model.layers.1"):
        read_factors(folder, tiny_model(num_layers=1), LLAMA)
    other = tmp_path_factory.mktemp("damaged")
    shutil.copytree(folder, other, dirs_exist_ok=True)
    tensors = load_file(folder / WEIGHTS)
    first = next(iter(tensors))
    save_file(tensors | {first: np.full_like(tensors[first], np.nan)}, other / WEIGHTS)
    with pytest.raises(UserError, match=rf"{first} has \d+ of \d+ values that are not finite in float32"):
        read_factors(other, tiny_model(num_layers=2), LLAMA)
    (other / WEIGHTS).rename(other / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has adapter_model.bin but no adapter_model.safetensors"):
        read_factors(other, tiny_model(num_layers=2), LLAMA)


def test_the_base_of_an_adapter_is_named_or_merging_asked_for():
    def experiment(*ranks: int, init: str = "", adapter: str = "") -> Experiment:
        stages = tuple(Stage(f"s{i}", SFT(), (), steps=1, lora=LoRA(rank=rank)) for i, rank in enumerate(ranks))
        return Experiment("e", stages, init=init, adapter=adapter)

    assert _base_of(experiment(2, 2, init="hf:models/some-model"), "s1") == "some-model"
    assert _base_of(experiment(0, 2), "s1") == ""
    with pytest.raises(UserError, match=r"the base of the adapter of stage s0 is random weights: use --merge"):
        _base_of(experiment(2), "s0")
    with pytest.raises(
        UserError,
        match=r"base of the adapter of stage s2 is the model of stage s1, which has factors of s0: use --merge",
    ):
        _base_of(experiment(2, 0, 2, init="hf:m"), "s2")
    with pytest.raises(
        UserError,
        match=r"base of the adapter of stage s1 is the model of stage s0, which has factors of folder: use --merge",
    ):
        _base_of(experiment(0, 2, init="hf:m", adapter="folder"), "s1")


def test_an_experiment_begins_with_an_adapter_on_its_open_weights(folder, tmp_path):
    base = tiny_model(num_layers=2)
    write(base, tmp_path / "base")
    experiment = Experiment("e", (), init=f"hf:{tmp_path / 'base'}", adapter=str(folder))
    experiment = replace(experiment, model=base.config, tokenizer=Tokenizer(vocab_size=base.vocab_size))
    check_weights(experiment)
    started = read_open_weights(experiment, None)
    expected = read_adapter(folder, base, LLAMA)
    for one, other in zip(jax.tree.leaves(started), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match=r"nowhere/adapter_config.json does not exist"):
        check_weights(replace(experiment, adapter="nowhere"))
    with pytest.raises(
        UserError, match=r"adapter is a, and init is empty: --init must name the adapter's open weights"
    ):
        with_init(Experiment("e", (), adapter="a"))


def test_several_adapters_on_one_base(folder, tmp_path):
    """Each answers as itself, by the name of its folder, and shares the arrays of the base."""
    write(tiny_model(num_layers=2), tmp_path / "base")
    base = tiny_model(num_layers=2)
    loaded = LoadedRun(Experiment("e", ()), None, base, make_mesh(Mesh(data=1)), "", 0)
    other = shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("base", "other"))
    found = load_adapters(loaded, tmp_path / "base", [str(folder), str(other)])
    assert list(found) == [folder.name, "other"]
    assert all(one.model.embed.weight[...] is base.embed.weight[...] for one in found.values())
    assert command("/adapter other", [], found) == "[adapter other]"
    assert command("/adapter nobody", [], found) == f"[no adapter nobody; there is {folder.name}, other]"
    with pytest.raises(UserError, match=r"--adapter has two folders named other: rename one of them"):
        load_adapters(loaded, tmp_path / "base", [str(other), str(other)])


def test_answers_of_two_adapters_are_told_apart_for_labels(folder):
    request = SamplingRequest("", 1, 1, (0.0,), 8, 0, 1.0, 0)
    contestants = [Contestant(folder, "", str(folder / "one")), Contestant(folder, "sft", str(folder / "two"))]
    assert _names(contestants, request) == ["adapter one", "sft, adapter two"]
    with pytest.raises(UserError, match=r"--adapter: .*one/adapter_model.safetensors does not exist"):
        _settings(contestants, request)
    one, other = (_settings([Contestant(folder, "", adapter)], request) for adapter in ("", str(folder)))
    assert one != other and len(other["models"][0]["adapter"]) == 64
