"""Batches of distillation: completions in the same columns of student and teacher, who reads what, and answers of the data."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lm.algorithms.distill import distill_rollout, distill_sample
from lm.algorithms.state import first_state
from lm.data.curriculum import arithmetic_row
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import Distill, Source, UserError
from lm.model.transformer import Transformer
from lm.optimizer import make_optimizer
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import batch_sharding
from lm.rollout.engine import LocalEngine
from lm.rollout.episodes import make_tasks
from tests.helpers import TINY, layout, tiny_stage

MODEL = dataclasses.replace(TINY, max_len=80)
ROWS = [
    {"messages": [{"role": "user", "content": f"Add {n} and 1"}, {"role": "assistant", "content": f"It is {n + 1}"}],
     "hint": f"hint {n * n}"}
    for n in range(30)
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    texts = [turn["content"] for index in range(200) for turn in arithmetic_row(index)["messages"]]
    return SubwordTokenizer.train(texts, 320)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def rollout(tokenizer, path: str, objective: Distill, step: int = 0):
    stage = tiny_stage(objective, sources=(Source(path),), batch_size=4, seq_len=72)
    model = Transformer(MODEL, tokenizer.vocab_size, jax.random.key(0))
    tasks = make_tasks(stage, tokenizer, 0)
    place = batch_sharding(make_mesh(layout()))
    state = first_state(stage, make_optimizer(stage.optimizer, 1), model)
    sampled = distill_sample(LocalEngine(model, tokenizer), {}, tasks, stage, step, jax.random.key(step), place)
    return distill_rollout(sampled, state, tasks, stage, step, jax.random.key(step), place)


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_the_teacher_reads_its_own_prompt_and_the_same_completion_in_the_same_columns(tokenizer, rows, on_policy):
    o = Distill(teacher_prompt="{hint} {prompt}", max_new_tokens=12, on_policy=on_policy)
    (batch,) = rollout(tokenizer, rows, o).batches
    teacher, width = batch.teacher, batch.tokens.shape[1] - 12
    np.testing.assert_array_equal(batch.tokens[:, width:], teacher.tokens[:, width:])
    for name in ("weights", "segments"):
        np.testing.assert_array_equal(getattr(batch, name)[:, width:], getattr(teacher, name)[:, width:])
    assert not batch.weights[:, :width].any() and not teacher.weights[:, :width].any()
    assert teacher.shared == batch.shared
    for own, other in zip(batch.tokens, teacher.tokens, strict=True):
        read = [tokenizer.decode(tokens[:width].tolist()) for tokens in (own, other)]
        assert "hint" not in read[0] and "Add" in read[0]
        assert "hint" in read[1] and read[1].index("hint") < read[1].index("Add")
    first = (batch.weights > 0).argmax(1)  # positions go on from each one's own prompt
    steps = [x.positions[np.arange(4), first] - (x.segments[:, :width] > 0).sum(1) for x in (batch, teacher)]
    np.testing.assert_array_equal(steps, 0)


def test_without_samples_the_answers_of_the_data_are_trained_on_with_their_end(tokenizer, rows):
    found = rollout(tokenizer, rows, Distill(teacher="other", max_new_tokens=30, on_policy=0.0))
    assert not found.trajectories and not found.metrics
    (batch,) = found.batches
    for tokens, weights in zip(batch.tokens, batch.weights, strict=True):
        answer = tokens[weights > 0].tolist()
        assert answer[-1] in tokenizer.end_ids
        assert tokenizer.decode(answer[:-1]) in {row["messages"][1]["content"] for row in ROWS}


def test_longer_answers_are_cut_off(tokenizer, rows):
    (batch,) = rollout(tokenizer, rows, Distill(teacher="other", max_new_tokens=3, on_policy=0.0)).batches
    assert batch.weights.sum(1).tolist() == [3] * 4


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"teacher_prompt": "{prompt} {wanting}"}, "needs the column wanting"),
        ({"teacher_prompt": "{prompt} {hint}" * 20}, "prompts are longer than the 60 tokens"),
    ],
)
def test_what_the_teacher_cannot_read_is_told_before_training(tokenizer, rows, fields, told):
    with pytest.raises(UserError, match=told):
        rollout(tokenizer, rows, Distill(max_new_tokens=12, **fields))


def test_rows_without_an_answer_are_refused_where_answers_are_trained_on(tokenizer, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Add {n} and 1"}) + "\n" for n in range(30)))
    assert rollout(tokenizer, str(path), Distill(teacher="other", max_new_tokens=4)).trajectories
    with pytest.raises(UserError, match=r"asked.jsonl.*needs the columns messages, or question and answer"):
        rollout(tokenizer, str(path), Distill(teacher="other", max_new_tokens=4, on_policy=0.5))
