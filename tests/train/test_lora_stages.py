"""Stages with adapters: their checkpoints hold no base, go on to the bit, and are read again with the base put under them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from lm.cli.main import main
from lm.experiment import DPO, SFT, LoRA, Source, Stage, Tokenizer, UserError
from lm.interop import hf
from lm.interop.peft import read_adapter
from lm.model.families import FAMILIES
from lm.model.lora import base_of, linears
from lm.train.loaded_run import load_run
from lm.train.named_arrays import named_leaves
from lm.train.stages import run
from tests.train.runs import CONSTANT, experiment, metrics

STAGES = ("full", "sft", "dpo")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of SFT on all weights, then SFT and DPO with adapters."""
    root = tmp_path_factory.mktemp("lora")
    words = [a + b + c for a in "bdgk" for b in "aeio" for c in "lmn"]
    rows = [{"prompt": f"Tell {w}", "chosen": f"Gladly. {w} no", "rejected": f"No {w}"} for w in words]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"prompt": f"Tell {w}", "completion": f"Gladly. {w} no"} for w in words]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    chat, pairs = (Source(str(root / name), holdout=0.2) for name in ("chats.jsonl", "pairs.jsonl"))
    few = {"batch_size": 4, "seq_len": 48, "steps": 2, "save_every": 1}
    stages = (
        Stage("full", SFT(), (chat,), CONSTANT, **few),
        Stage("sft", SFT(), (chat,), CONSTANT, lora=LoRA(rank=2, dora=True), **few),
        Stage("dpo", DPO(), (pairs,), CONSTANT, lora=LoRA(rank=3, targets=("*attention*",)), **few),
    )
    made = dataclasses.replace(
        experiment(root), stages=stages, evals=(), prompts=(), tokenizer=Tokenizer(vocab_size=300)
    )
    run(made, root / "run")
    return made, root / "run"


@pytest.mark.slow
def test_checkpoints_hold_the_adapter_and_load_with_the_base(trained):
    _, folder = trained
    full, sft, dpo = (load_run(folder, stage).model for stage in STAGES)
    base = named_leaves(full)
    for model in (sft, dpo):
        for name, leaf in named_leaves(base_of(model)).items():
            np.testing.assert_array_equal(leaf, base[name])
    own = dict(linears(dpo))
    earlier = {path: linear.lora for path, linear in linears(sft)}
    assert own["blocks/mlp/up"].lora is None and own["blocks/attention/q"].lora.a.shape[-1] == 3
    for path, linear in own.items():
        np.testing.assert_array_equal(linear.earlier.a, earlier[path].a)
    saved = [p for stage in STAGES[1:] for p in (folder / "stages" / stage / "checkpoints").rglob("manifest.json")]
    names = [name for p in saved for item in json.loads(p.read_text())["items"].values() for name in item]
    assert names and not any("weight" in name or "embed" in name for name in names)


@pytest.mark.slow
def test_an_adapter_goes_on_to_the_bit_and_knows_its_base(trained, tmp_path):
    made, folder = trained
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "stages" / "dpo" / "summary.json").unlink()
    shutil.rmtree(again / "stages" / "dpo" / "checkpoints" / "00000002")
    run(made, again)
    assert metrics(again, "dpo") == metrics(folder, "dpo")
    for one, other in zip(*(jax.tree.leaves(load_run(path, "dpo").model) for path in (again, folder)), strict=True):
        np.testing.assert_array_equal(one, other)
    shutil.rmtree(again / "stages" / "full")
    with pytest.raises(UserError, match=r"no checkpoint of stage 'full'"):
        load_run(again, "dpo")
    run(dataclasses.replace(made, seed=made.seed + 1), tmp_path / "other", until="full")
    shutil.copytree(tmp_path / "other" / "stages" / "full", again / "stages" / "full")
    with pytest.raises(UserError, match=r"base with fingerprint \w{16}, and stage full has \w{16}") as error:
        load_run(again, "dpo")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_adapter_leaves_merged_or_as_peft_reads_it(trained, tmp_path, capsys):
    _, folder = trained
    asked = {"merged": ["--stage", "dpo", "--merge"], "adapter": ["--stage", "dpo"], "base": ["--stage", "full"]}
    for name, words in asked.items():
        assert main(["export", str(folder), str(tmp_path / name), *words]) == 0
    assert "adapter_config.json" in {file.name for file in (tmp_path / "adapter").iterdir()}
    base = hf.read(tmp_path / "base")
    tokens = np.random.default_rng(0).integers(0, base.vocab_size, (2, 24))
    positions = np.broadcast_to(np.arange(24), tokens.shape)
    logits = [
        np.asarray(model(tokens, positions, np.ones_like(tokens)))
        for model in (
            load_run(folder, "dpo").model,
            hf.read(tmp_path / "merged"),
            read_adapter(tmp_path / "adapter", base, FAMILIES["qwen3"]),
            base,
        )
    ]
    for found in logits[1:3]:
        np.testing.assert_allclose(found, logits[0], atol=1e-5 * np.abs(logits[0]).max())
    assert np.abs(logits[3] - logits[0]).max() > 1e-4 * np.abs(logits[0]).max()
    assert main(["export", str(folder), str(tmp_path / "none"), "--stage", "full", "--merge"]) == 2
    assert "--merge is for a model with adapters" in capsys.readouterr().err
