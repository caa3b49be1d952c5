"""A run that begins with open weights: what they fix, its first numbers, and its resumption."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from lm.cli.arguments import resolve
from lm.cli.main import main
from lm.data.bad_rows import BadRow
from lm.data.chat import render
from lm.experiment import DPO, SFT, Eval, Experiment, LoRA, Mesh, Model, Optimizer, Source, Stage, Tokenizer, UserError
from lm.interop import hf
from lm.interop.export import family_of, write
from lm.interop.peft import write_adapter
from lm.model.lora import adapted, linears
from lm.model.quantised import set_base
from lm.model.transformer import Transformer
from lm.open_weights import read, with_init
from lm.parallel.mesh import make_mesh
from lm.rollout.sampler import encode_prompt
from lm.train import models
from lm.train.base import fingerprint, read_stored
from lm.train.checkpoint import Checkpoints
from lm.train.loaded_run import load_run
from lm.train.stages import evaluate_open_weights, evaluate_run, run
from tests.data.hub import small
from tests.train.runs import metrics

SHAPE = Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=128)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A published model of one layer, whose embedding has five rows more than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = small.tokenizer()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    write(jax.jit(lambda: Transformer(SHAPE, tokenizer.vocab_size + 5, jax.random.key(0)))(), folder)
    return folder


def experiment(folder, **changes) -> Experiment:
    rows = [{"prompt": f"what is {number}?", "completion": "it is a system"} for number in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(folder / "rows.jsonl"), holdout=0.2)
    stage = Stage("sft", SFT(), (source,), steps=2, batch_size=2, seq_len=64, optimizer=Optimizer(warmup_steps=0))
    held_out = (Eval("talks", source, metric="bits_per_byte", count=2),)
    return Experiment("open", (stage,), held_out, mesh=Mesh(data=1), **changes)


def test_shape_tokenizer_and_context_come_from_the_folder(weights, tmp_path):
    found = with_init(experiment(tmp_path, init=str(weights), model=Model(remat="full")))
    assert found.init == f"hf:{weights}" and found.tokenizer.path == str(weights)
    assert found.tokenizer.vocab_size == small.tokenizer().vocab_size + 5
    assert found.model == dataclasses.replace(SHAPE, remat="full")
    assert with_init(found) == found


def test_what_the_weights_fix_is_not_set_otherwise(weights, tmp_path):
    for changes, said in (
        ({"model": Model(mlp_dim=48)}, "model.mlp_dim is 48; it should be 32, as in"),
        ({"model": Model(max_len=256)}, "model.max_len is 256; it should be at most 128"),
        ({"tokenizer": Tokenizer(vocab_size=300)}, "tokenizer.vocab_size is 300; it should be"),
    ):
        with pytest.raises(UserError, match=said):
            with_init(experiment(tmp_path, init=str(weights), **changes))


def test_a_default_is_an_override_on_the_command_line(weights, tmp_path):
    (tmp_path / "plain.py").write_text(
        "from lm.experiment import *\n"
        "experiment = Experiment('plain', (Stage('sft', SFT(), (Source('gen:instruct'),), seq_len=32),))\n"
    )
    init = [str(tmp_path / "plain.py"), ["--init", str(weights), "--model.max_len", "64"]]
    assert resolve(*init).model.max_len == 64
    with pytest.raises(UserError, match=r"model.num_layers is 6; it should be 1, as in"):
        resolve(init[0], [*init[1], f"--model.num_layers={Model.num_layers}"])


def test_a_model_without_a_chat_template_continues_prompts_and_refuses_conversations(tmp_path):
    tokenizer = small.tokenizer(template=None)
    assert encode_prompt(tokenizer, "the user") == [tokenizer.document_ids[0], *tokenizer.encode("the user")]
    turns = [{"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}]
    for call in (lambda: render(turns, tokenizer), lambda: encode_prompt(tokenizer, turns[:1])):
        with pytest.raises(UserError, match=r"has no chat template.*--tokenizer.chat_template FILE") as found:
            call()
        assert not isinstance(found.value, BadRow)  # bad_rows drop would leave every row out


@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_is_resumed_with_no_others(weights, tmp_path):
    whole = experiment(tmp_path, init=str(weights))
    run(whole, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "stages" / "sft" / "eval.jsonl").read_text().splitlines()]
    (before,) = (line["bits_per_byte"] for line in lines if line["when"] == "before")
    assert before == pytest.approx(evaluate_open_weights(whole)[""][0]["bits_per_byte"], rel=1e-6)
    more = dataclasses.replace(whole, stages=(*whole.stages, dataclasses.replace(whole.stages[0], name="again")))
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match=rf"the data of hf:{weights} had SHA-256 \w+ and now have"):
        run(more, tmp_path / "run")


@pytest.mark.slow
def test_a_reference_that_is_other_weights_than_the_run_began_with_is_refused(weights, tmp_path):
    init, rows = tmp_path / "init", tmp_path / "pairs.jsonl"
    shutil.copytree(weights, init)
    pairs = [{"prompt": f"what is {number}?", "chosen": "a system", "rejected": "it is"} for number in range(30)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = Source(str(rows), holdout=0.2)
    stage = Stage("dpo", DPO(), (source,), steps=1, batch_size=2, seq_len=64, optimizer=Optimizer(warmup_steps=0))
    measured = (Eval("pairs", source, metric="pair_accuracy", count=2),)
    run(Experiment("open", (stage,), measured, mesh=Mesh(data=1), init=str(init)), tmp_path / "run")
    assert evaluate_run(tmp_path / "run")
    for name, change in (("model.safetensors", (b"\x00", b"\x01")), ("config.json", (b"e-0", b"e-1"))):
        whole = (init / name).read_bytes()
        start, end, there = whole.rpartition(change[0])
        assert end
        (init / name).write_bytes(start + change[1] + there)
        with pytest.raises(UserError, match=rf"the data of hf:{init} had SHA-256 \w+ and now have"):
            evaluate_run(tmp_path / "run")
        (init / name).write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
def test_a_base_is_stored_while_it_is_read_as_afterwards(weights, tmp_path, monkeypatch, base):
    mesh, whole = make_mesh(Mesh(data=1, fsdp=2)), with_init(experiment(tmp_path, init=str(weights)))
    before, live = {id(one) for one in jax.live_arrays()}, []
    original = hf.read_array

    def read_array(*given):
        live.append(sum(one.nbytes for one in jax.live_arrays() if id(one) not in before))
        return original(*given)

    monkeypatch.setattr(hf, "read_array", read_array)
    stored, known = read_stored(whole, mesh, base)
    assert max(live) < sum(one.nbytes for one in jax.tree.leaves(stored))
    monkeypatch.undo()
    model = read(whole, mesh)
    assert known == fingerprint(model)
    set_base(model, base, mesh)
    assert jax.tree.structure(stored) == jax.tree.structure(model)
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(model), strict=True):
        assert one.sharding == other.sharding and one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_quantised_run_has_the_numbers_of_one_that_reads_all_weights_first(weights, tmp_path, monkeypatch):
    one = experiment(tmp_path, init=str(weights), prompts=())
    rows = [{"prompt": f"what is {n}?", "chosen": "it is a system", "rejected": "a system"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = Source(str(tmp_path / "pairs.jsonl"), holdout=0.2)
    sft = dataclasses.replace(one.stages[0], lora=LoRA(rank=2, dora=True, base="nf4"), save_every=1)
    dpo = dataclasses.replace(sft, name="dpo", objective=DPO(), sources=(pairs,))
    last = dataclasses.replace(sft, name="last", lora=LoRA(rank=2, base="int8"))
    evals = (*one.evals, Eval("prefers", pairs, metric="pair_accuracy", count=2))
    run(dataclasses.replace(one, stages=(sft, dpo), evals=evals), tmp_path / "run")
    more = dataclasses.replace(one, stages=(sft, dpo, last), evals=evals)
    run(more, tmp_path / "run")
    monkeypatch.setattr(models, "read_stored", lambda experiment, mesh, base: (read(experiment, mesh), ""))
    run(more, tmp_path / "whole")
    for stage in ("sft", "dpo", "last"):
        assert metrics(tmp_path / "run", stage) == metrics(tmp_path / "whole", stage)
        found = [
            Checkpoints(tmp_path / name / "stages" / stage / "checkpoints").newest_meta() for name in ("run", "whole")
        ]
        assert found[0]["base"] == found[1]["base"]
    theirs = load_run(tmp_path / "run", "dpo").model
    monkeypatch.undo()
    ours = load_run(tmp_path / "run", "dpo").model
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.fixture(scope="module")
def adapters(weights, tmp_path_factory):
    """Folders of two adapters on the weights: `none`, whose factors change nothing, and `some`."""
    folder = tmp_path_factory.mktemp("adapters")
    model = hf.read(weights)
    for name, scale in (("none", 0.0), ("some", 0.3)):
        one = adapted(model, Stage("sft", SFT(), (), lora=LoRA(rank=2, alpha=2)), jax.random.key(1), "policy")
        for _, linear in linears(one):
            linear.lora.b[...] = scale * jax.random.normal(jax.random.key(2), linear.lora.b.shape)
        write_adapter(one, folder / name, family_of(model), str(weights))
    return folder


@pytest.mark.slow
def test_adapters_are_evaluated_beside_each_other_with_their_base_as_reference(weights, adapters, tmp_path):
    rows = [{"prompt": f"what is {n}?", "chosen": "it is a system", "rejected": "a system"} for n in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = experiment(tmp_path, init=str(weights))
    prefers = Eval("prefers", Source(str(tmp_path / "pairs.jsonl"), holdout=1.0), metric="pair_accuracy")
    stage = dataclasses.replace(start.stages[0], objective=DPO())
    start = dataclasses.replace(start, stages=(stage,), evals=(*start.evals, prefers))
    none, some = str(adapters / "none"), str(adapters / "some")
    (alone,) = evaluate_open_weights(start)[""]  # without a reference there is no implicit reward
    found = evaluate_open_weights(start, adapters=[none, some])
    assert list(found) == ["none", "some"]
    assert found["none"][0] == alone and found["some"][0] != alone
    (begun,) = evaluate_open_weights(dataclasses.replace(start, adapter=some))[""]
    assert found["some"][0] == begun
    assert [lines[1]["count"] for lines in found.values()] == [9, 9]
    assert abs(found["none"][1]["margin"]) < 1e-5 < abs(found["some"][1]["margin"])


@pytest.mark.slow
def test_the_commands_take_a_published_model_alone(weights, adapters, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "what is it?", "completion": "it is a system"}) + "\n")
    for name in (str(weights), f"hf:{weights}"):
        assert main(["plan", name, "--topology", "v5e:1x1", "--json", "--sft.batch-size", "8"]) == 0
        assert json.loads(capsys.readouterr().out)["stages"][0]["stage"] == "sft"
        assert main(["data", name, "--sft.sources.0.path", str(tmp_path / "rows.jsonl")]) == 0
        assert "what is it?" in (shown := capsys.readouterr().out) and "⟦it is a system" in shown
        measured = ["--evals.heldout.source.path", str(tmp_path / "rows.jsonl"), "--model.max-len", "100"]
        assert (
            main(["eval", name, *measured, "--adapter", str(adapters / "none"), "--adapter", str(adapters / "some")])
            == 0
        )
        head, line = capsys.readouterr().out.splitlines()[-2:]
        assert head.split() == ["eval", "metric", "count", "none", "some"] and len(line.split()) == 5
    for words, said in (
        (
            ["plan", str(weights), "--topology", "v5e:1x1", "--init", "other"],
            "--init is other, and .* name one of them",
        ),
        (["eval", str(weights), "--stage", "sft"], "a published model is evaluated alone"),
        (["eval", str(weights), "--evals.heldout.metric", "pairs"], "evals.heldout.metric is 'pairs'; it should be"),
    ):
        assert main(words) == 2
        assert re.search(said, capsys.readouterr().err)


def test_a_model_without_a_chat_template_is_shown_and_planned_with_documents(weights, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    for name, content in small.tokenizer(template=None).files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "it is a system"}) + "\n")
    assert main(["data", str(tmp_path), "--pretrain.sources.0.path", str(tmp_path / "rows.jsonl")]) == 0
    assert "it is a system" in capsys.readouterr().out
    for file in small.tokenizer(template=None).files:
        (tmp_path / file).unlink()
    assert main(["plan", str(tmp_path), "--topology", "v5e:1x1", "--stage", "sft"]) == 0  # config.json is enough
