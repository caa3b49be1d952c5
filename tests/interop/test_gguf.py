"""Models and tokenizers in GGUF files, which the package writes here; a damaged one is refused in a line."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from lm.data.hub.gguf import files_of
from lm.data.hub.tokenizer import HubTokenizer, with_options
from lm.data.vocabulary import load_tokenizer
from lm.experiment import Experiment, Model, UserError
from lm.interop import gguf, hf
from lm.interop.config import write_config
from lm.interop.export import write
from lm.interop.places import parameter_places
from lm.model.families import FAMILIES
from lm.model.transformer import Transformer
from lm.open_weights import with_init
from tests.interop.test_hf import GEMMA

package = pytest.importorskip("gguf", reason="the tests of GGUF need the package gguf (the extra gguf)")
SMALL = Model(num_layers=2, embed_dim=32, head_dim=8, mlp_dim=48, max_len=64, qk_norm=False)
BIG_HEADS = {"head_dim": 256, "query_pre_attn_scalar": 0.0, "num_layers": 2}
MEMBERS = {
    "llama": {"tied_head": False, "rope_theta": 5e5, "rope_scaling": (8.0, 1.0, 4.0, 8192.0)},
    "qwen2": {"qkv_bias": True, "rope_scaling": (4.0, 32.0, 32.0, 1.0, 0.0, 1.0)},
    "phi3": {"tied_head": False, "window": 5},
    "gemma2": GEMMA | BIG_HEADS,
}


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """As the converter of llama.cpp does it."""
    return (
        weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
    )


def write_gguf(model: Transformer, family: str, path, **more) -> None:
    """The model as llama.cpp's converter would write it; `more` are entries of the metadata."""
    c, config = model.config, write_config(model.config, model.vocab_size, family)
    writer = package.GGUFWriter(path, family)
    for key, theirs in gguf.FIELDS.items():
        value = config.get(theirs)
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{family}.{key}", value)
    rope = config["rope_scaling"] or {}
    number = next(number for number, name in package.MODEL_ARCH_NAMES.items() if name == family)
    table = package.get_tensor_name_map(number, c.num_layers)
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(package.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope:
        plain, scaled = (gguf.rope_frequencies(c.head_dim, c.rope_theta, one) for one in ((), c.rope_scaling))
        writer.add_tensor(gguf.ROPE_FACTORS, np.asarray(plain / scaled))
    tensors: dict[str, dict[int, np.ndarray]] = {}
    for place, leaf in zip(parameter_places(model, FAMILIES[family]), jax.tree.leaves(model), strict=True):
        for layer, name in enumerate(place.names):
            part = place.to_theirs(np.asarray(leaf[layer] if place.stacked else leaf))
            tensors.setdefault(name, {})[place.first] = part
    for name, parts in tensors.items():
        value = np.concatenate([parts[row] for row in sorted(parts)])
        for part, heads in (("q_proj", c.num_heads), ("k_proj", c.num_kv_heads)):
            value = permuted(value, heads) if family == "llama" and part in name else value
        value = value + 1 if "gemma" in family and "norm" in name else value
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), np.ascontiguousarray(value))
    for name, value in more.items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array, bool: writer.add_bool}[
            type(value)
        ]
        add(name.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def made(family: str) -> Transformer:
    config = dataclasses.replace(SMALL, **MEMBERS[family])
    return jax.jit(lambda: Transformer(config, 96, jax.random.key(0)))()


@pytest.mark.parametrize("family", MEMBERS)
def test_a_member_of_a_family_is_read_as_it_was(tmp_path, family):
    model, path = made(family), tmp_path / "model.gguf"
    write_gguf(model, family, path)
    again = gguf.read(path)
    assert again.config == model.config
    for old, new in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(old, new, atol=1e-7)


@pytest.mark.parametrize("family", MEMBERS)
def test_an_export_keeps_the_published_configuration(tmp_path, family):
    """A run may use less of the context than the file says."""
    whole = made(family)
    write_gguf(whole, family, tmp_path / "model.gguf")
    short = gguf.read(tmp_path / "model.gguf", max_len=16)
    write(short, tmp_path / "out", origin=gguf.read_origin(tmp_path / "model.gguf"), token_ids={"eos_token_id": 7})
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described == write_config(whole.config, whole.vocab_size, family) | {"eos_token_id": 7}
    assert hf.read(tmp_path / "out").config == whole.config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_gguf(made("llama"), "llama", path)
    return path.read_bytes()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.03, 0.06, 0.1, 0.5, 0.99])
def test_a_file_that_ends_early_is_refused_in_a_line(tmp_path, whole, part):
    path = tmp_path / "part.gguf"
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match=r"^[^\n]*part.gguf is not a complete GGUF file: [^\n]*: fetch it again$"):
        gguf.read(path)


def test_damaged_headers_are_read_or_refused_in_a_line(tmp_path, whole):
    random = np.random.default_rng(0)
    for number in range(60):
        broken = bytearray(whole)
        for place in random.integers(0, 1500, 3):
            broken[place] = random.integers(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(broken)
        try:
            gguf.check(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"llama__expert_count": 8}, "does not know llama.expert_count 8"),
        ({"llama__attention__value_length": 16}, "heads have a width of 8, and values or rotated parts 16"),
        ({"llama__rope__scaling__type": "longrope"}, "rope type longrope lacks short_factor, long_factor"),
        ({"split__count": 3}, "is one of 3 files of a model"),
    ],
)
def test_what_the_model_does_not_have_is_refused(tmp_path, more, message):
    path = tmp_path / "other.gguf"
    model = dataclasses.replace(SMALL)
    write_gguf(jax.jit(lambda: Transformer(model, 96, jax.random.key(0)))(), "llama", path, **more)
    with pytest.raises(UserError, match=message):
        gguf.read(path)


def encoded_as_wanted(found: dict, path, cases: list[dict]) -> bool:
    """Whether the tokenizer of such metadata gives the ids of these strings."""
    tokenizer = HubTokenizer(with_options(files_of(found, path), "token", None))
    return [tokenizer.encode(one["text"]) for one in cases] == [one["ids"] for one in cases]


@pytest.mark.parametrize("name, pre", [("gpt2", "gpt-2"), ("smollm2", "smollm")])
def test_a_byte_level_tokenizer(models, name, pre):
    """From the tokens, types and merges of a published tokenizer, the ids of that tokenizer."""
    folder = models / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    parsed, cases = (
        json.loads(gzip.decompress((folder / file).read_bytes())) for file in ("tokenizer.json.gz", "cases.json.gz")
    )
    added = {one["id"]: one for one in parsed["added_tokens"]}
    ids = parsed["model"]["vocab"] | {one["content"]: number for number, one in added.items()}
    types = {number: 3 if one["special"] else 4 for number, one in added.items()}
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": sorted(ids, key=ids.__getitem__),
        "token_type": [types.get(number, 1) for number in range(len(ids))],
        "merges": [one if isinstance(one, str) else " ".join(one) for one in parsed["model"]["merges"]],
        "eos_token_id": max(added),
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    assert encoded_as_wanted(found, folder, cases["strings"])
    with pytest.raises(UserError, match="pre is 'falcon'; there are gpt-2, smollm, qwen2, llama-bpe"):
        files_of(found | {"tokenizer.ggml.pre": "falcon"}, folder)


def test_the_steps_of_qwen_before_its_merges(models):
    file = models / "tokenizers" / "qwen2.5" / "tokenizer.json.gz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    parsed = json.loads(gzip.decompress(file.read_bytes()))
    found = {f"tokenizer.ggml.{key}": value for key, value in {"model": "gpt2", "pre": "qwen2"}.items()}
    found |= {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1], "tokenizer.ggml.merges": []}
    ours = json.loads(files_of(found, file)["tokenizer.json"])
    assert ours["normalizer"] == parsed["normalizer"]
    for step, theirs in zip(
        ours["pre_tokenizer"]["pretokenizers"], parsed["pre_tokenizer"]["pretokenizers"], strict=True
    ):
        assert step | {"trim_offsets": None} == theirs | {"trim_offsets": None}  # which no id depends on


def test_a_sentencepiece_tokenizer(tmp_path, models):
    """Written into a file and read again, the ids of the tokenizer.model that it comes from."""
    folder = models / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    entries = {
        "model": "llama",
        "tokens": [one.piece for one in proto.pieces],
        "scores": [one.score for one in proto.pieces],
        "token_type": [one.type for one in proto.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "remove_extra_whitespaces": proto.normalizer_spec.remove_extra_whitespaces,
    }
    path = tmp_path / "model.gguf"
    write_gguf(made("phi3"), "phi3", path, **{f"tokenizer__ggml__{key}": value for key, value in entries.items()})
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    for text in ("Once upon a time", "  two  spaces ", "naïve café", "1234", "a\nb", "日本"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.end_ids == (2,) and ours.bos_id == 1
    experiment = with_init(Experiment("open", stages=(), init=f"gguf:{path}"))
    assert experiment.tokenizer.path == str(path) and experiment.model.num_layers == SMALL.num_layers
