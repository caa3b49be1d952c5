"""Tasks of lm-evaluation-harness on a small run: numbers, resuming, the run's file, the report, bad input."""

import json
import re

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="tasks need lm-evaluation-harness (the extra bench)")

from lm.cli.main import main
from lm.data.hub.tokenizer import HubTokenizer
from lm.data.sources import rows_of, split_rows
from lm.evals import harness
from lm.evals.continuations import Continuation, score_continuations
from lm.evals.heldout import measure
from lm.evals.rows import Subject
from lm.experiment import Eval, Source, UserError
from lm.rollout.engine import LocalEngine, Request, completion_text
from lm.train.metrics import read_lines
from lm.train.stages import run
from lm.trained_model import load
from lm.web.report import write_report
from tests.data.hub import small
from tests.evals.test_core import write
from tests.train.runs import experiment, write_questions

pytestmark = pytest.mark.slow

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
"""
COMPLETION = """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: " no"
generation_kwargs: {until: ["o"], max_gen_toks: 6}
metric_list:
  - metric: exact_match
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}} {{query}}"
metric_list:
  - metric: byte_perplexity
"""
COUNT = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run, and a folder of tasks."""
    root = tmp_path_factory.mktemp("bench")
    write_questions(root)
    run(experiment(root), root / "run")
    words = ["bal", "dem", "gin", "kol", "bem", "don"]
    rows = [
        {"query": f"Tell {word}", "choices": [" Gladly", " no", " x"], "gold": place % 3}
        for place, word in enumerate(words)
    ]
    (root / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tasks").mkdir()
    for name, kind in (("choice", CHOICE), ("completion", COMPLETION), ("text", TEXT)):
        head = TASK.format(name=f"own_{name}", file=root / "items.jsonl")
        (root / "tasks" / f"{name}.yaml").write_text(head + kind)
    return root


def measured(place, capsys, *words):
    code = main(["eval", str(place / "run"), "--cache", str(place / "cache"), *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_tasks_are_measured_as_the_model_gives_them_and_kept_in_the_run(place, capsys):
    found = json.loads(
        measured(
            place,
            capsys,
            "--tasks",
            str(place / "tasks"),
            "--no-chat",
            "--json",
            "--samples",
            str(place / "samples.jsonl"),
        )
    )
    values = {one["task"]: one for one in found["results"]}
    model, rows = load(place / "run"), [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
    encode = model.loaded.tokenizer.encode
    right = []
    for row in rows:
        asked = [Continuation(encode(row["query"]), encode(choice)) for choice in row["choices"]]
        right.append(np.argmax([one.logp for one in score_continuations(model.loaded.model, asked)]) == row["gold"])
    assert values["own_choice"]["value"] == pytest.approx(np.mean(right)) and values["own_choice"]["count"] == COUNT
    texts = [f"{row['query']} {row['query']}" for row in rows]
    nats = sum(token.logprob for tokens in model.logprobs([""] * COUNT, texts, raw=True) for token in tokens)
    assert values["own_text"]["value"] == pytest.approx(np.exp(-nats / sum(map(len, texts))), rel=1e-3)
    samples = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    said = [one["answers"][0] for one in samples if one["task"] == "own_completion"]
    engine = LocalEngine(model.loaded.model, model.loaded.tokenizer)
    for text, row in zip(said, rows, strict=True):
        (alone,) = engine.complete(Request([encode(row["query"])], jax.random.key(0), 6, temperature=0.0))
        assert text == completion_text(engine.tokenizer, alone).split("o")[0]
    lines = read_lines(place / "run" / "stages" / "sft" / "benchmarks.jsonl")
    assert {line["task"] for line in lines} == {"own_choice", "own_completion", "own_text"}
    page = write_report(place / "run").read_text()
    assert "own_choice" in page and f"acc, {COUNT} items, 0 shots" in page


def test_items_in_the_training_data_are_counted_and_the_others_scored_alone(place, capsys):
    rows = rows_of(Source(str(place / "asked.jsonl")))
    train, held_out = split_rows(rows, 0.2)
    order = [*train[:5], *held_out[:4]]
    items = [{"query": rows[int(i)]["answer"].removesuffix(" no"), "choices": [" no", " x"], "gold": 0} for i in order]
    (place / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    (place / "seen.yaml").write_text(TASK.format(name="own_seen", file=place / "seen.jsonl") + CHOICE)
    words = ("--tasks", str(place / "seen.yaml"), "--no-chat", "--samples", str(place / "seen_samples.jsonl"))
    out = measured(place, capsys, *words, "--contamination", "3")
    right = [json.loads(line)["values"]["acc"] for line in (place / "seen_samples.jsonl").read_text().splitlines()]
    clean, error = np.mean(right[5:]), np.std(right[5:], ddof=1) / 2
    told = "5 of 9 items share 3-grams with the training data, 55.6% of all n-grams"
    assert f"\n\nown_seen: {told}\n  acc of the 4 others: {clean:.4f} ± {error:.4f}\n  item 0: 100%: 'gladly " in out
    line = read_lines(place / "run" / "stages" / "sft" / "benchmarks.jsonl")[-1]
    assert (line["contamination"]["contaminated"], line["contamination"]["clean"]["value"]) == (5, clean)
    assert f"{told}; 4 others: {clean:.4g}" in write_report(place / "run").read_text()


def test_the_core_score_of_a_folder_is_a_task(place, capsys):
    write(place / "bundle")
    name = f"core:{place / 'bundle'}"
    found = json.loads(measured(place, capsys, "--tasks", name, "--limit", "4", "--json"))["results"]
    model = load(place / "run").loaded
    item = Eval("core", Source(str(place / "bundle")), "core", count=4)
    expected = measure(item, Subject(model.model, model.tokenizer)).values
    assert {one["task"]: one["value"] for one in found} == {
        name: expected["core"],
        **{f"{name}/{label}": expected[f"task/{label}"] for label in ("choices", "schema", "words")},
    }
    assert read_lines(place / "run" / "stages" / "sft" / "benchmarks.jsonl")[-4]["metric"] == "core"
    page = write_report(place / "run").read_text()
    assert f"{name}<small>core, 12 items</small>" in page and "choices<small>acc, 4 items, 2 shots</small>" in page
    assert main(["eval", str(place / "run"), "--tasks", name, "--contamination"]) == 2
    assert f"--contamination compares tasks of lm-evaluation-harness, not {name}" in capsys.readouterr().err


def test_what_was_answered_is_not_asked_again(place, capsys, monkeypatch):
    words = ("--tasks", str(place / "tasks" / "choice.yaml"), "--no-chat", "--limit", "4", "--json")
    first = measured(place, capsys, *words)
    asked = []
    monkeypatch.setattr(harness, "score_continuations", lambda model, requests, done: asked.append(len(requests)))
    assert measured(place, capsys, *words) == first and asked == [0]


def test_a_chat_model_is_asked_through_its_template(place, capsys, monkeypatch):
    seen = []
    score = harness.score_continuations
    monkeypatch.setattr(
        harness, "score_continuations", lambda model, asked, done: (seen.extend(asked), score(model, asked, done))
    )
    out = measured(place, capsys, "--tasks", str(place / "tasks" / "choice.yaml"), "--limit", "1")
    tokenizer = load(place / "run").loaded.tokenizer
    assert ", chat template" in out
    assert tokenizer.decode([*seen[0].context, *seen[0].tokens], specials=True) == (
        "<|im_start|>user\nTell bal<|im_end|>\n<|im_start|>assistant\n Gladly"
    )


@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_text_without_a_context_follows_the_declared_first_token_or_the_end_token(tmp_path, monkeypatch, bos):
    tokenizer = HubTokenizer(small.files(bos_token=bos))
    model = harness.HarnessModel(None, tokenizer, harness.Answers(tmp_path / "answers.jsonl"))
    expected = tokenizer.special_ids[bos or "<|im_end|>"]
    asked = []
    monkeypatch.setattr(model, "_loglikelihood_tokens", lambda requests, **_: asked.extend(requests) or [(0.0, True)])
    model.loglikelihood([harness.Instance("loglikelihood", {}, ("", "it is"), 0)])
    assert asked[0][1:] == ([expected], tokenizer.encode("it is"))
    assert expected != tokenizer.document_ids[0] == tokenizer.special_ids["<|endoftext|>"]


def test_a_control_token_in_the_text_of_a_task_is_that_token_and_in_a_message_it_is_text(tmp_path):
    tokenizer = HubTokenizer(small.files())
    model = harness.HarnessModel(None, tokenizer, harness.Answers(tmp_path / "answers.jsonl"))
    assert model.tok_encode("a</s>") == [*tokenizer.encode("a"), tokenizer.special_ids["</s>"]]
    asked = model.apply_chat_template([{"role": "user", "content": "a</s>"}])
    assert tokenizer.special_ids["</s>"] not in model._rendered[asked]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "arc_eazy"], "has no such task; did you mean arc_easy"),
        (["--tasks", "nowhere.yaml"], "there is no such file"),
        (["--tasks", "arc_easy", "--pairs", "x"], "--tasks measures one model"),
        (["--limit", "3"], "--limit is for --tasks"),
        (["--contamination"], "--contamination is for --tasks"),
        (["--tasks", "arc_easy", "--evals.x.count", "3"], "takes no field"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(place, capsys, words, told):
    assert main(["eval", str(place / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_file_without_its_columns_is_told_in_one_line(place, capsys):
    bad = place / "tasks" / "choice.yaml"
    file = place / "bad.yaml"
    file.write_text(
        bad.read_text()
        .replace("{{query}}", "{{nothing}}")
        .replace("{{choices}}", "{{wrong}}")
        .replace("own_choice", "own_bad")
    )
    assert main(["eval", str(place / "run"), "--tasks", str(file), "--no-chat"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("lm: error: --tasks")


@pytest.mark.parametrize("answer", ["null", "{}", '["a", true]', "[[1]]"])
def test_a_kept_answer_that_is_none_is_refused(tmp_path, answer):
    (tmp_path / "a.jsonl").write_text(f'{{"request": "a", "answer": {answer}}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1 is no answer that was kept here: .*; remove that line"):
        harness.Answers(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("task", "items", "told"),
    [
        (CHOICE, '{"query": "Tell bal"}', "cannot be (loaded|measured)"),
        (CHOICE, '{"query": "Tell bal", "choices": 5, "gold": 0}', "cannot be (loaded|measured)"),
        (CHOICE.replace("{{choices}}", "{{choices"), '{"query": "a", "choices": ["a", "b"], "gold": 0}', "cannot be (loaded|measured)"),
        (CHOICE, "{", "cannot be (loaded|measured)"),
        ("\udcff", "{}", "cannot be read"),
    ],
)  # fmt: skip
def test_a_task_of_ones_own_that_cannot_be_measured_is_one_line(place, tmp_path, capsys, task, items, told):
    (tmp_path / "items.jsonl").write_text(items + "\n")
    head = TASK.format(name="own_odd", file=tmp_path / "items.jsonl")
    (tmp_path / "odd.yaml").write_bytes((head + task).encode("utf-8", "surrogateescape"))
    assert main(["eval", str(place / "run"), "--tasks", str(tmp_path / "odd.yaml"), "--no-chat"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lm: error")]
    assert re.search(told, line)
