"""`lm export` writes a published model's folder again, whole or not at all."""

import json
import re

import jax
import pytest
from safetensors.numpy import load_file

from lm.cli.export import _token_ids
from lm.cli.main import main
from lm.data.hub.tokenizer import HubTokenizer
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import Experiment, LoRA, Mesh, Model, RewardModel, Source, Stage, Tokenizer
from lm.interop.export import write
from lm.interop.tensors import read_folder
from lm.model.transformer import Transformer
from lm.train.loaded_run import load_reward_model
from lm.train.stages import run
from tests.data.hub import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with more rows than its tokenizer has tokens, a field of config.json and files that lm does not use, and two files."""
    path = tmp_path_factory.mktemp("published") / "model"
    tokenizer = SubwordTokenizer.train(["a cat and a dog " * 20], 300)
    config = Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=64)
    write(Transformer(config, tokenizer.vocab_size + 21, jax.random.key(0)), path, dtype="bfloat16", shard_bytes=9_000)
    for name, content in tokenizer.published_files(64).items():
        (path / name).write_bytes(content)
    for name, content in {
        "LICENSE": b"Terms, in Latin-1: \xe9",
        "vocab.json": b"{}",
        "merges.txt": b"#version: 0.2\n",
    }.items():
        (path / name).write_bytes(content)
    described = json.loads((path / "config.json").read_text()) | {"initializer_range": 0.02}
    (path / "config.json").write_text(json.dumps(described))
    return path


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_every_file_comes_out_as_it_went_in(folder, tmp_path):
    assert main(["export", str(folder), str(tmp_path / "deep" / "out")]) == 0
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert contents(tmp_path / "deep" / "out") == contents(folder)


def test_another_dtype_changes_the_weights_and_what_says_so(folder, tmp_path):
    assert main(["export", str(folder), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described == json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float16"}
    assert {tensor.dtype for tensor in read_folder(tmp_path / "out").values()} == {"F16"}
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize(("declared", "written"), [("<s>", "<s>"), (None, "<|endoftext|>")])
def test_the_first_token_is_the_one_that_the_tokenizer_declares_else_that_of_documents(declared, written):
    tokenizer = HubTokenizer(small.files(bos_token=declared))
    assert _token_ids(tokenizer, tokenizer.pad_id)["bos_token_id"] == tokenizer.special_ids[written]


@pytest.mark.slow
def test_a_reward_model_of_a_run_is_exported_whole(tmp_path, capsys):
    """Also if it was trained with an adapter; the language model that it began with is exported as one."""
    rows = [{"prompt": f"Say {n}", "chosen": f"{n} yes", "rejected": "no"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=48)
    stage = Stage(
        "reward",
        RewardModel(),
        (Source(str(tmp_path / "pairs.jsonl")),),
        steps=1,
        batch_size=2,
        seq_len=48,
        lora=LoRA(rank=2),
    )
    run(
        Experiment("judge", (stage,), prompts=(), tokenizer=Tokenizer(vocab_size=320), model=small, mesh=Mesh(data=1)),
        tmp_path / "run",
    )
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--stage", "reward"]) == 0
    tokenizer, scorer = load_reward_model(tmp_path / "run", "reward")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert (tensors["score.weight"][0] == scorer.score.weight[...]).all()
    assert not any("lora" in name for name in tensors)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architectures"] == ["Qwen3ForSequenceClassification"]
    assert described["pad_token_id"] == tokenizer.pad_id
    assert "AutoModelForSequenceClassification" in (tmp_path / "out" / "README.md").read_text()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "two"), "--stage", "reward", "--adapter", "x"]) == 2
    assert "--adapter is for language models" in capsys.readouterr().err


BAD = {
    "a full folder": (["{folder}", "{folder}"], "is no empty folder: name a new one"),
    "no such run": (["nowhere", "{tmp}/out"], "no run 'nowhere'"),
    "a stage of no run": (["{folder}", "{tmp}/out", "--stage", "sft"], "--stage is sft; .* has no stages"),
    "a dtype": (["{folder}", "{tmp}/out", "--dtype", "int8"], "invalid choice: 'int8'"),
    "below a file": (["{folder}", "{folder}/config.json/out"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_a_line_and_leaves_nothing(folder, tmp_path, capsys, case):
    words, said = BAD[case]
    before = contents(folder)
    assert main(["export", *(word.format(folder=folder, tmp=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
    assert contents(folder) == before and not list(tmp_path.iterdir())
