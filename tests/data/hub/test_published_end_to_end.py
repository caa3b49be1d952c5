"""A whole run with a published model's tokenizer and chat template: every stage, chat, samples, a second start."""

import json

import pytest

from lm.check import check
from lm.data.hub.tokenizer import HubTokenizer
from lm.data.pipeline import make_feed
from lm.data.tokenizer import SubwordTokenizer
from lm.data.vocabulary import load_tokenizer, named_tokenizer
from lm.experiment import (
    DPO,
    GRPO,
    SFT,
    Eval,
    Experiment,
    Mesh,
    Model,
    Optimizer,
    Pretrain,
    Source,
    Stage,
    Tokenizer,
    UserError,
)
from lm.rollout.engine import generate_text
from lm.rollout.sampler import stream
from lm.train.loaded_run import load_run
from lm.train.stages import run
from tests.data.hub import published, small

WORDS = [a + b for a in ("big", "odd", "red", "new", "old") for b in ("cat", "dog", "fox", "hen")]


def experiment(root, tokenizer: Tokenizer) -> Experiment:
    """Two steps of every kind of stage."""
    write = {
        "texts": [{"text": f"{word} is the answer of the system"} for word in WORDS],
        "talks": [
            {"messages": [*([{"role": "system", "content": "be kind"}] if place % 2 else []),
                          {"role": "user", "content": f"what is {word}? <|im_end|>"}, {"role": "assistant", "content": word}]}
            for place, word in enumerate(WORDS)
        ],
        "pairs": [{"prompt": f"what is {word}?", "chosen": word, "rejected": "it"} for word in WORDS],
        "asked": [{"question": f"what is {word}?", "answer": word} for word in WORDS],
    }  # fmt: skip
    sources = {}
    for name, rows in write.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[name] = Source(str(root / f"{name}.jsonl"), holdout=0.2)
    shared = {"steps": 2, "batch_size": 2, "seq_len": 64, "optimizer": Optimizer(peak_lr=1e-3, warmup_steps=1)}
    grpo = GRPO(verifier="style", group_size=2, max_new_tokens=6)
    return Experiment(
        name="published",
        prompts=("what is it?",),
        tokenizer=tokenizer,
        model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=96),
        mesh=Mesh(data=1),
        stages=(
            Stage("pretrain", Pretrain(), (sources["texts"],), **shared),
            Stage("sft", SFT(), (sources["talks"],), **shared),
            Stage("dpo", DPO(), (sources["pairs"],), **shared),
            Stage("grpo", grpo, (sources["asked"],), **shared),
        ),
        evals=(Eval("talks", sources["talks"], metric="bits_per_byte", count=2),),
    )


def check_run(root, folder) -> None:
    whole = experiment(root, Tokenizer(path=str(folder)))
    run(whole, root / "run")
    loaded = load_run(root / "run")
    assert loaded.tokenizer.fingerprint == HubTokenizer.load(folder).fingerprint
    assert loaded.model.config.max_len == 96
    answers = generate_text(
        loaded.model, loaded.tokenizer, ["what is it?", [{"role": "user", "content": "hm"}]], max_new_tokens=4
    )
    assert len(answers) == 2
    assert generate_text(loaded.model, loaded.tokenizer, ["the"], max_new_tokens=2, raw=True)
    assert isinstance(
        "".join(stream(loaded.model, loaded.tokenizer, [{"role": "user", "content": "hi"}], max_new_tokens=4)), str
    )
    run(whole, root / "run")  # all is there: it reads the tokenizer that the run has kept


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a small tokenizer."""
    return HubTokenizer(small.files()).save(tmp_path / "model")


@pytest.mark.slow
def test_every_stage_runs_with_a_published_tokenizer(tmp_path, folder):
    check_run(tmp_path, folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "mistral-v3"])
def test_every_stage_runs_with_a_familys_tokenizer(tmp_path, models, family):
    if not (models / "tokenizers" / family).is_dir():
        pytest.skip(f"no tokenizer of {family} in {models} (option --models DIR)")
    check_run(tmp_path, published.tokenizer(models / "tokenizers" / family).save(tmp_path / "model"))


@pytest.mark.slow
def test_a_chat_template_of_ones_own_is_kept_with_the_run(tmp_path, folder):
    template = tmp_path / "own.jinja"
    template.write_text(small.TRIMMED)
    settings = Tokenizer(path=str(folder), chat_template=str(template), typed_control="token")
    whole = experiment(tmp_path, settings)
    run(whole, tmp_path / "run", until="pretrain")
    kept = load_run(tmp_path / "run").tokenizer
    assert "[INST]" in kept.decode(kept.render([{"role": "user", "content": "a"}]).tokens, specials=True)
    assert kept.special_ids["<s>"] in kept.encode("<s>")


def test_a_chat_template_needs_a_published_tokenizer(tmp_path, folder):
    with pytest.raises(UserError, match=r"tokenizer\.chat_template own\.jinja"):
        check(experiment(tmp_path, Tokenizer(chat_template="own.jinja")))
    own = SubwordTokenizer.train([small.TEXT], 300, tmp_path / "own").save(tmp_path / "own")
    with pytest.raises(UserError, match=r"own.*is none"):
        named_tokenizer(Tokenizer(path=str(own), typed_control="token"))
    with pytest.raises(UserError, match=r"chat_template.*missing\.jinja"):
        named_tokenizer(Tokenizer(path=str(folder), chat_template=str(tmp_path / "missing.jinja")))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"[]", "JSON object"),
        ("tokenizer.json", b"", "empty"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer.json", b'{"model": {"type": "none"}, "added_tokens": []}', r"cannot be read|is not a tokenizer"),
        ("tokenizer.json", b'{"model": 3, "added_tokens": [{"id": 1, "content": "<s>"}]}', r"is not a tokenizer"),
        ("tokenizer.json", b'{"added_tokens": [{"id": 1, "content": "<s>"}]}', r"is not a tokenizer"),
        ("tokenizer.json", b'{"added_tokens": [{"content": "<s>"}]}', "id and a text"),
        ("tokenizer.json", b'{"model": 3}', r"cannot be read|is not a tokenizer"),
        ("tokenizer_config.json", b"{}", "eos_token"),
        ("tokenizer_config.json", b'{"eos_token": "<|im_end|>", "chat_template": 3', "not valid JSON"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": 99999}', "99999"),
        ("chat_template.jinja", b"{% for %}", "line 1"),
    ],
)
def test_files_that_cannot_be_read_are_told_in_one_line(folder, name, content, said):
    if name == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        HubTokenizer.load(folder)
    assert "\n" not in str(error.value)
    assert "tokenizer.path" in str(error.value)


def test_what_the_template_leaves_out_is_counted_and_refused_conversations_are_dropped(tmp_path, folder):
    strict = "{% if messages[0].content == 'stop' %}{{ raise_exception('not this one') }}{% endif %}" + small.TRIMMED
    (folder / "chat_template.jinja").write_text(strict)
    talk = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "it"}]
    kind = [{"role": "system", "content": "be kind"}, *talk]
    rows = [
        *[{"messages": talk}] * 3,
        *[{"messages": kind}] * 2,
        {"messages": [talk[0] | {"content": "stop"}, talk[1]]},
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def report(bad_rows: str) -> str:
        source = Source(str(file), holdout=0.0, bad_rows=bad_rows)
        stage = Stage("sft", SFT(), (source,), steps=1, batch_size=1, seq_len=64)
        return make_feed(stage, load_tokenizer(folder), 0).report()

    said = report("drop")
    assert "in 2 examples the chat template leaves out system messages" in said
    assert "1 that the chat template refuses" in said
    with pytest.raises(UserError, match=r"talks\.jsonl line 6.*not this one"):
        report("stop")
