"""What a checkpoint has that the model has not, what it lacks and what is damaged is refused, each in one clear line."""

import json
import os
import random
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.experiment import Model, UserError
from lm.interop import hf
from lm.interop.config import write_config
from lm.interop.export import write
from lm.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM, HEAD, Q = "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    config = Model(
        num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, max_len=64, tied_head=False
    )
    folder = tmp_path_factory.mktemp("good")
    write(jax.jit(lambda: Transformer(config, 40, jax.random.key(0)))(), folder)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def with_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "removed"}))


def with_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def sharded(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: SHARDS[place % 2] for place, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        hf.read(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


CONFIGS = {
    "a sliding window": ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
    "a window nobody says unused": (
        {"model_type": "llama", "sliding_window": 4, "use_sliding_window": None},
        "sliding_window is 4",
    ),
    "layers with windows": (
        {"layer_types": ["sliding_attention"] * 2},
        "sliding_attention, and sliding_window is miss",
    ),
    "part of a head is turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "and in rope": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    "biases": ({"mlp_bias": True}, "mlp_bias is True"),
    "another activation": ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
    "softcaps": ({"attn_logit_softcapping": 50.0}, "does not know attn_logit_softcapping 50.0"),
    "multipliers": ({"embedding_multiplier": 12.0, "logits_scaling": 8}, "embedding_multiplier 12.0, logits_scaling 8"),
    "scales": ({"quantization_config": {"quant_method": "fp8"}}, "does not know quantization_config"),
    "other rope": (
        {"rope_scaling": {"type": "longrope", "factor": 4.0}, "rope_parameters": None},
        "rope type longrope lacks short_factor, long_factor",
    ),
    "short factors": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": 2}, "rope_parameters": None},
        "long_factor is 2; it should be a list of numbers",
    ),
    "more of a head than it has": (
        {"model_type": "phi3", "partial_rotary_factor": 2.0},
        "partial_rotary_factor is 2.0; it should be at most 1",
    ),
    "no part of a head": (
        {"model_type": "phi3", "partial_rotary_factor": float("nan")},
        "partial_rotary_factor is nan; it should be a number above 0",
    ),
    "an unknown rope": ({"rope_scaling": {"type": ["su"]}, "rope_parameters": None}, r"rope scaling \['su'\]"),
    "odd windows": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "2"},
        "max_window_layers is '2'; it should be a whole number from 0",
    ),
    "half a yarn": ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "rope type yarn lacks factor"),
    "odd yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 3}, "rope_parameters": None},
        "truncate is 3; it should be true or false",
    ),
    "yarn backwards": (
        {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0.5}, "rope_parameters": None},
        "beta_slow should be above 0 and not above beta_fast",
    ),
    "two original lengths": (
        {
            "rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 8},
            "rope_parameters": None,
        },
        "rope type dynamic has original_max_position_embeddings 8; it should be max_position_embeddings",
    ),
    "half a rope": (
        {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "llama3 lacks low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "two ropes": ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta 5.0, and another field has 10000.0"),
    "a window of some layers": (
        {"model_type": "phi3", "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is .* with sliding_window 4; phi3 has one window for all layers",
    ),
    "a cap of scores": (
        {"model_type": "gemma3_text", "hidden_act": "removed", "attn_logit_softcapping": 50.0},
        "attn_logit_softcapping is 50.0; the model has None only",
    ),
    "one rope for two": (
        {
            "model_type": "gemma3_text",
            "hidden_act": "removed",
            "rope_parameters": {"rope_type": "linear", "factor": 8.0},
        },
        "rope_parameters has 'factor', 'rope_type', .* settings for full_attention and for sliding_attention",
    ),
    "no layers": ({"num_hidden_layers": "removed"}, "num_hidden_layers is missing"),
    "a text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it should be a whole number"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "model.num_layers is 1000000000"),
    "fewer layers": ({"num_hidden_layers": 1}, "num_hidden_layers 1, and the files have 2"),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
    "a huge model": ({"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, "model.embed_dim is 2147483647"),
    "a wider model": ({"hidden_size": 10_000}, r"q_proj.weight \[16, 16\] \(config.json makes it \[16, 10000\]\)"),
    "no epsilon": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "a tied head that is another": ({"tie_word_embeddings": True}, "unexpected.*: lm_head.weight"),
    "a tie that is a text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    "another family": ({"model_type": ["qwen3"]}, "model_type is .*; there are .*llama.*qwen3"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_another_model_is_refused_by_the_name_of_the_field(copy, case):
    changes, message = CONFIGS[case]
    with_config(copy, **changes)
    refused(copy, message)


def test_a_config_without_its_longest_row_has_that_of_its_family(copy):
    with_config(copy, max_position_embeddings="removed", use_sliding_window=False, sliding_window=4096)
    assert hf.read(copy).config.max_len == 32768


TENSORS = {
    "biases": (lambda t: t.update({f"{Q}.bias": np.ones(16, np.float32)}), "1 tensor is unexpected.*q_proj.bias"),
    "scales": (lambda t: t.update({f"{Q}.weight_scale": np.ones(1, np.float32)}), "unexpected.*weight_scale"),
    "whole numbers": (lambda t: t.update({NORM: np.ones(16, np.int32)}), "dtype other than F64, F32.*norm.weight I32"),
    "eight bits": (
        lambda t: t.update({NORM: np.ones(16, ml_dtypes.float8_e4m3fn)}),
        "dtype other.*norm.weight F8_E4M3",
    ),
    "one that is gone": (lambda t: t.pop(HEAD), "1 tensor is missing: lm_head.weight"),
    "a smaller vocabulary": (lambda t: t.update({HEAD: t[HEAD][:30].copy()}), r"lm_head.weight \[30, 16\].*\[40, 16\]"),
    "no numbers": (
        lambda t: t[NORM].fill(np.inf),
        "model.norm.weight has 16 of 16 values that are not finite in float32",
    ),
    "too large": (lambda t: t.update({NORM: np.full(16, 1e300)}), "not finite in float32"),
    "all others": (
        lambda t: [t.update({f"x{name}": t.pop(name)}) for name in list(t)],
        "files have 0 layers",
    ),
    "other names in a layer": (
        lambda t: [t.update({f"{n}x": t.pop(n)}) for n in list(t) if ".0." in n],
        "11 tensors are missing: .* and 1 more; 11 tensors are unexpected",
    ),
    "a line break": (lambda t: t.update({"a\nb": np.ones(1, np.float32)}), r"unexpected.*'a\\nb'"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_of_another_model_are_refused_by_name(copy, case):
    change, message = TENSORS[case]
    with_tensors(copy, change)
    refused(copy, message)


def pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")


def half(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def repeated(folder):
    """Write the file again with a header that has a tensor twice."""
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    text = f'{json.dumps(header)[:-1]}, "{NORM}": {json.dumps(header[NORM])}}}'.encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def stale(folder):
    shutil.copy(folder / WEIGHTS, folder / "old.safetensors")


def stale_beside_an_index(folder):
    shutil.copy(folder / WEIGHTS, folder / "zz.safetensors")
    with_tensors(folder, lambda tensors: None)
    sharded(folder)


def elsewhere(folder):
    sharded(folder)
    text = (folder / INDEX).read_text().replace(SHARDS[0], "../../etc/passwd")
    (folder / INDEX).write_text(text)


def no_shard(folder):
    sharded(folder)
    (folder / SHARDS[1]).unlink()


def swapped(folder):
    sharded(folder)
    (folder / SHARDS[0]).rename(folder / "x")
    (folder / SHARDS[1]).rename(folder / SHARDS[0])
    (folder / "x").rename(folder / SHARDS[1])


FOLDERS = {
    "a pointer of git-lfs": (pointer, "is a git-lfs pointer"),
    "half a file": (half, "is not a complete safetensors file"),
    "a tensor twice": (repeated, "not a complete safetensors file: the key 'model.norm.weight' appears twice"),
    "an empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "is not a complete safetensors file"),
    "a folder for a file": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "is no file"),
    "no weights": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is not read: convert it with transformers",
    ),
    "a stale file": (stale, "is in both model.safetensors and old.safetensors"),
    "a stale file beside an index": (stale_beside_an_index, "zz.safetensors, which .* does not list"),
    "an index of files elsewhere": (elsewhere, "'../../etc/passwd'; it should be a file in the same folder"),
    "a missing shard": (no_shard, "lacks model-00002-of-00002.safetensors"),
    "shards that were swapped": (swapped, "places it in model-00002-of-00002.safetensors: fetch both"),
    "a pipe for an index": (lambda f: os.mkfifo(f / INDEX), "is no file that can be read"),
    "an index of nothing": (lambda f: (f / INDEX).write_text("[]"), "has no weight_map"),
    "a config that is none": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not valid JSON"),
    "a config of a list": (lambda f: (f / "config.json").write_text("[1]"), "should be a JSON object"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "is not valid JSON"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_damaged_folder_is_refused_in_a_line(copy, case):
    FOLDERS[case][0](copy)
    refused(copy, FOLDERS[case][1])


def test_what_only_repeats_the_model_and_whole_shards_are_read(good, copy):
    want = hf.read(good)
    sharded(copy)
    frequencies = (10_000.0 ** -(np.arange(0, 4, 2) / 4)).astype(np.float32)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file({name: frequencies} | load_file(copy / SHARDS[0]), copy / SHARDS[0])
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"][name] = SHARDS[0]
    (copy / INDEX).write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, hf.read(copy), want)
    save_file(
        {name: 2 * frequencies} | {n: t for n, t in load_file(copy / SHARDS[0]).items() if n != name}, copy / SHARDS[0]
    )
    refused(copy, "unexpected.*inv_freq")


def test_other_weights_in_the_folder_are_not_written_over(good, copy):
    sharded(copy)
    with pytest.raises(UserError, match="of another model: name an empty folder"):
        write(hf.read(good), copy)


ODD = (None, True, -1, 0, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "x", [], [[]], {}, {"a": 1}, "\n")


def mutated(random, config, weights):
    """A config.json and a file with one thing changed in either."""
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + size])
    what = random.randrange(6)
    if what == 0:
        return json.dumps(config | {random.choice([*config, "strange\n"]): random.choice(ODD)}).encode(), weights
    if what == 1:
        rope = config["rope_parameters"] | {random.choice(["rope_theta", "rope_type", "factor"]): random.choice(ODD)}
        return json.dumps(config | {random.choice(["rope_parameters", "rope_scaling"]): rope}).encode(), weights
    if what == 2:
        text = bytearray(json.dumps(config).encode())
        text[random.randrange(len(text))] = random.randrange(256)
        return bytes(text), weights
    if what == 3:
        entry = header[random.choice([*header])]
        entry[random.choice([*entry])] = random.choice(
            [*ODD, [0, 8], [-8, 8], [16], [2**62, 4], "F16", "I8", "F8_E5M2"]
        )
        new = json.dumps(header).encode()
        return json.dumps(config).encode(), struct.pack("<Q", len(new)) + new + weights[8 + size :]
    data = bytearray(weights)
    if what == 4:
        for _ in range(random.choice([1, 4, 64])):
            data[random.randrange(size + 8)] = random.randrange(256)
        return json.dumps(config).encode(), bytes(data)
    start = random.randrange(len(data))
    del data[start : start + random.choice([1, 100, len(data)])]
    return json.dumps(config).encode(), bytes(data)


def test_every_mutation_is_read_as_it_is_or_refused_in_a_line(good, copy):
    config, weights = json.loads((good / "config.json").read_text()), (good / WEIGHTS).read_bytes()
    chance, read = random.Random(0), 0
    for _ in range(400):
        (copy / "config.json").write_bytes(text := (new := mutated(chance, config, weights))[0])
        (copy / WEIGHTS).write_bytes(new[1])
        try:
            model = hf.read(copy)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, text
        else:
            read += 1
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))
            assert write_config(model.config, 40)["num_hidden_layers"] == 2
    assert 0 < read < 200
