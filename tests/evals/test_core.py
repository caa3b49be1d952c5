"""The CORE score of a small folder: prompts, examples and order as its definition has them, scores as counted by hand."""

import functools
import json
import random

import numpy as np
import pytest

from lm.data.vocabulary import load_tokenizer
from lm.evals.continuations import score_continuations
from lm.evals.core import core_items, core_score, read_core
from lm.evals.heldout import measure
from lm.evals.rows import Subject
from lm.experiment import Eval, Source, UserError
from lm.train.metrics import read_lines
from lm.train.stages import run
from tests.helpers import tiny_model
from tests.train.runs import experiment, write_questions

WORDS = ["bal", "dem", "gin", "kol", "bem", "don", "gal", "kil"]
ITEMS = {
    "choices": [
        {"query": f"Tell {w}", "choices": ["Gladly", f"no {w}", "x"], "gold": i % 3} for i, w in enumerate(WORDS)
    ],
    "schema": [
        {"context_options": [f"A {w}", f"The {w}"], "continuation": f"says {w}", "gold": i % 2}
        for i, w in enumerate(WORDS)
    ],
    "words": [{"context": f"Tell {w} ", "continuation": "Gladly"} for w in WORDS],
}
KINDS = {"choices": "multiple_choice", "schema": "schema", "words": "language_modeling"}
BASELINES = {"choices": 100 / 3, "schema": 50.0, "words": 0.0}


def write(folder, fewshot=2, **changes):
    tasks = [
        {"label": name, "dataset_uri": f"some/{name}.jsonl", "num_fewshot": [fewshot], "icl_task_type": KINDS[name]}
        for name in ITEMS
    ]
    tasks[0]["continuation_delimiter"] = "\nAnswer: "
    (folder / "eval_data" / "some").mkdir(parents=True)
    for name, items in ITEMS.items():
        (folder / "eval_data" / "some" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    rows = [f"{name},world,{baseline}" for name, baseline in BASELINES.items()]
    (folder / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Task Category,Random baseline", *rows, ""]))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of tasks, and a finished run that measured it."""
    root = tmp_path_factory.mktemp("core")
    folder = write(root / "bundle")
    write_questions(root)
    value = experiment(root, eval_every=2, evals=("core",))
    fields = {**vars(value), "evals": (Eval("core", Source(str(folder)), "core", count=5, max_new_tokens=4),)}
    run(type(value)(**fields), root / "run")
    return root


@pytest.fixture(scope="module")
def tokenizer(made):
    return load_tokenizer(made / "run" / "tokenizer")


def shuffled(name):
    items = list(ITEMS[name])
    random.Random(1337).shuffle(items)
    return items


@pytest.mark.slow
def test_prompts_have_their_examples_and_the_parts_that_are_scored(made, tokenizer):
    found = {task.label: core_items(task, tokenizer, 10_000, 3)[2] for task in read_core(made / "bundle")}
    text = {label: [tokenizer.decode([*c.context, *c.tokens]) for c in one.asked] for label, one in found.items()}
    for name in ITEMS:
        items = shuffled(name)
        item, chosen = items[2], random.Random(1236).sample([i for i in range(len(items)) if i != 2], 2)
        first, second = (items[i] for i in chosen)
        if name == "choices":
            solved = [f"{one['query']}\nAnswer: {one['choices'][one['gold']]}" for one in (first, second)]
            ends = [f"{item['query']}\nAnswer: {choice}" for choice in item["choices"]]
        elif name == "schema":
            solved = [f"{one['context_options'][one['gold']]} {one['continuation']}" for one in (first, second)]
            ends = [f"{context} {item['continuation']}" for context in item["context_options"]]
        else:
            solved = [f"{one['context'].strip()} {one['continuation']}" for one in (first, second)]
            ends = [f"{item['context'].strip()} {item['continuation']}"]
        assert [one.strip() for one in text[name]] == ["\n\n".join([*solved, end]) for end in ends]
    word = tokenizer.decode(found["words"].asked[0].tokens)
    assert word.strip() == "Gladly" and found["words"].gold is None
    assert len({tuple(c.tokens) for c in found["schema"].asked}) == 1, "the common end is scored"
    assert len({tuple(c.context) for c in found["choices"].asked}) == 1, "what follows the common beginning is scored"


def test_the_score_is_the_mean_of_centred_accuracies(made, tokenizer):
    model = tiny_model()
    tasks = read_core(made / "bundle")
    items = [one for task in tasks for one in core_items(task, tokenizer, model.config.max_len, 100)]
    found = core_score(functools.partial(score_continuations, model), items)
    centred = []
    for task in tasks:
        right = []
        for item in (one for one in items if one.task is task):
            scores = score_continuations(model, item.asked)
            means = [score.logp / len(one.tokens) for score, one in zip(scores, item.asked, strict=True)]
            right.append(scores[0].greedy if item.gold is None else int(np.argmax(means)) == item.gold)
        assert found.values[f"task/{task.label}"] == np.mean(right)
        centred.append((np.mean(right) - BASELINES[task.label] / 100) / (1 - BASELINES[task.label] / 100))
    assert found.values["core"] == pytest.approx(np.mean(centred)) and found.count == 24 and found.values["tasks"] == 3


def test_it_is_measured_before_during_and_after_a_stage(made):
    lines = [one for one in read_lines(made / "run" / "stages" / "sft" / "eval.jsonl") if one["eval"] == "core"]
    assert [(one["step"], one["when"]) for one in lines] == [(0, "before"), (2, "during"), (4, "after")]
    assert all(-1 <= one["core"] <= 1 and one["count"] == 15 for one in lines)


def test_the_number_of_items_of_a_task_is_limited_in_the_order_of_the_definition(made, tokenizer):
    task = read_core(made / "bundle")[0]
    assert list(task.items) == shuffled("choices") and len(core_items(task, tokenizer, 100, 3)) == 3


def test_prompts_beyond_the_context_lose_their_beginning(made, tokenizer):
    item = Eval("core", Source(str(made / "bundle")), "core", count=100)
    found = measure(item, Subject(tiny_model(max_len=16), tokenizer))
    assert found.count == 24 and np.isfinite(found.values["core"])


def broken(folder, name, old, new):
    file = folder / name
    file.write_text(file.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("core.yaml", "icl_tasks", "tasks"), "core.yaml needs icl_tasks"),
        (
            ("core.yaml", '"schema"}', '"other"}'),
            "icl_tasks.1.icl_task_type is 'other'; there are multiple_choice, schema",
        ),
        (("core.yaml", "some/choices", "some/none"), "none.jsonl: there is no such file"),
        (("core.yaml", "some/choices", "x" * 300), "there is no such file"),
        (("core.yaml", "[2]", "[" * 2000), "core.yaml needs icl_tasks"),
        (("eval_meta_data.csv", "words,", "w" * 200_000), "core.yaml needs icl_tasks, and eval_meta"),
        (
            ("core.yaml", '"num_fewshot": [2]', '"num_fewshot": [8]'),
            "has 8 items; choices needs more than the 8 examples",
        ),
        (("core.yaml", '"num_fewshot": [2]', '"num_fewshot": 2'), "icl_tasks.0.num_fewshot cannot be read"),
        (
            ("eval_meta_data.csv", "words,", "word,"),
            "task words has no Random baseline from 0 to below 100; did you mean word?",
        ),
        (("eval_meta_data.csv", "50.0", "100"), "task schema has no Random baseline"),
        (("eval_meta_data.csv", "Random baseline", "Baseline"), "the columns Eval Task and Random baseline"),
        (
            ("eval_data/some/choices.jsonl", '"gold": 1', '"gold": 7'),
            "choices.jsonl:2: gold is 7; it should be the index",
        ),
        (("eval_data/some/words.jsonl", "continuation", "next"), "words.jsonl:1 .* no 'continuation'"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path, change, told):
    folder = write(tmp_path / "bundle")
    broken(folder, *change)
    with pytest.raises(UserError, match=told):
        read_core(folder)


def test_a_folder_without_its_files_says_what_it_should_have(tmp_path):
    with pytest.raises(
        UserError, match=r"core.yaml: No such file or directory; metric core reads a folder with core.yaml, eval_meta"
    ):
        read_core(tmp_path)
