"""`lm serve` as a command: what it refuses before it loads a model, and the models that it serves under their names."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import openai
import pytest

from lm.algorithms.state import abstract_model
from lm.cli.main import main
from lm.experiment import SFT, LoRA, Stage
from lm.interop.export import write
from lm.interop.peft import write_adapter
from lm.model.families import FAMILIES
from lm.model.lora import adapted
from lm.model.parameter import leaf_name
from lm.model.transformer import Transformer
from lm.serve import memory
from lm.serve.memory import memory_of, sizes_for
from lm.serve.models import load_models
from tests.data.hub import small
from tests.test_open_weights import SHAPE


def adapter(folder, model, seed):
    """A PEFT adapter whose factors are not zero."""
    stage = Stage("sft", SFT(), (), lora=LoRA(rank=2))
    trained = adapted(model, stage, jax.random.key(seed), "policy")
    changed = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape), trained)
    write_adapter(changed, folder, FAMILIES["llama"])
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published model with two adapters, and one for a base of another size."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = small.tokenizer()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    model = jax.jit(lambda: Transformer(SHAPE, tokenizer.vocab_size, jax.random.key(0)))()
    write(model, folder)
    for seed, name in enumerate(("kind", "short")):
        adapter(folder.parent / name, model, seed)
    other = dataclasses.replace(SHAPE, embed_dim=SHAPE.embed_dim * 2)
    adapter(folder.parent / "other", Transformer(other, tokenizer.vocab_size, jax.random.key(0)), 2)
    return folder


def refused(capsys, *words):
    assert main(["serve", *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("lm: error: ") and told.count("\n") == 1
    return told


@pytest.mark.slow
def test_a_port_in_use_is_told_before_the_model_is_loaded(folder, capsys):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused(capsys, folder, "--port", port)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "203.0.113.7", "--port", "0"], "cannot serve on 203.0.113.7"),
        (["--token-file", "missing"], "there is no such file"),
        (["--stage", "sft"], "has no stages"),
        (["--slots", "0"], "--slots"),
        (["--port", "0", "--length", "100000"], "the model's context"),
        (["--port", "0", "--length", "64", "--max-new-tokens", "64"], "less than the context"),
        (["--port", "0", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(folder, capsys, words, told):
    assert told in refused(capsys, folder, *words)


def test_an_adapter_for_another_base_is_refused(folder, capsys):
    assert "other" in refused(capsys, folder, "--port", 0, "--adapter", folder.parent / "other")


def test_the_planned_memory_is_that_of_the_engine(folder, capsys):
    assert main(["plan", str(folder), "--serve", "--slots", "3", "--length", "100", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    (served,) = load_models(folder, [None], [], 3, 100, 0).values()
    engine = served.engine
    caches = engine._slots, engine._short, engine._long
    assert planned["cache_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    assert planned["weights_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(engine.model))
    assert (planned["length"], planned["new"]) == (100, 50) and planned["fits"]


def test_a_context_is_shortened_where_memory_is_short(folder, monkeypatch):
    model = abstract_model(dataclasses.replace(SHAPE, max_len=4000), 500)
    whole = sizes_for(model, 8)
    monkeypatch.setattr(memory, "device_memory", lambda: memory_of(model, whole).cache * 6)
    assert whole.length == 2048 and sizes_for(model, 8).length == 1024 and sizes_for(model, 8, length=2048) == whole


def test_adapters_share_the_weights_of_their_base(folder):
    served = load_models(folder, [None], [str(folder.parent / name) for name in ("kind", "short")], 2, 64, 0)
    leaves = {
        name: {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(one.engine.model)}
        for name, one in served.items()
    }
    base, kind = leaves[folder.name], leaves["kind"]
    assert base and base.keys() < kind.keys() == leaves["short"].keys()
    for name, leaf in base.items():
        assert len({id(found[name]) for found in leaves.values()}) == 1, name
        assert leaf.size
    for name in kind.keys() - base.keys():
        assert "/earlier/" in name and kind[name] is not leaves["short"][name]


@pytest.mark.slow
def test_adapters_are_models_and_ctrl_c_ends_the_server(folder):
    adapters = [word for name in ("kind", "short") for word in ("--adapter", str(folder.parent / name))]
    words = ["serve", str(folder), *adapters, "--port", "0", "--slots", "2", "--length", "64"]
    command = [sys.executable, "-m", "lm.cli.main", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if found := re.match(r"open http://localhost:(\d+)/", line):
                    break
            client = openai.OpenAI(base_url=f"http://localhost:{found[1]}/v1", api_key="none", max_retries=0)
            names = ["kind", "short", folder.name]
            assert [one.id for one in client.models.list()] == [*names, "default"]
            texts = {
                name: client.completions.create(model=name, prompt="what is", max_tokens=20, temperature=0)
                .choices[0]
                .text
                for name in names
            }
            assert len(set(texts.values())) == 3
            process.send_signal(signal.SIGINT)
            assert process.wait(300) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
