"""Held out means held out: whatever asks the same is on one side of the split, in any layout, file and order."""

from __future__ import annotations

import json
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.pipeline import make_feed
from lm.data.prompts import make_prompt_feed
from lm.data.selection import held_out_but_trained, held_out_elsewhere, select
from lm.data.sources import NOWHERE
from lm.data.split import ALWAYS_TRAINED, split_key, split_place
from lm.experiment import DPO, GRPO, SFT, Eval, Experiment, Source, Stage, UserError
from lm.stored import cache_at

QUESTIONS = [f"What is caf\u00e9 number {n}, and why?" for n in range(40)]


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
# Everything that asks a question: one key.
LAYOUTS = (
    lambda q, a: {"question": q, "answer": a},
    lambda q, a: {"prompt": q, "chosen": a, "rejected": "no"},
    lambda q, a: {"prompt": [user(q)], "chosen": [said(a)], "rejected": [said("no")]},
    lambda q, a: {"prompt": [SYSTEM, user(q), said("Yes?"), user("Go on.")], "chosen": a, "rejected": "no"},
    lambda q, a: {"prompt": q, "completion": a, "label": True},
    lambda q, a: {"messages": [user(q), said(a)]},
    lambda q, a: {"messages": [SYSTEM, user(q), said(a), user("More."), said("No.")]},
    lambda q, a: {"messages": [user(q)], "answer": a},
    lambda q, a: {"chosen": [user(q), said(a)], "rejected": [user(q), said("no")]},
    lambda q, a: {"prompt": None, "key": None, "question": q, "answer": a},
)
SPELLINGS = (
    lambda q: q,
    lambda q: f"  {q.replace(' ', '  ')}\n",
    lambda q: unicodedata.normalize("NFD", q),
    lambda q: q.replace(" ", "\u00a0"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_question_has_one_key_in_every_layout_and_spelling(layout, spelling):
    one, other = QUESTIONS[:2]
    found = split_key({"id": 7, "source": "x", **layout(spelling(one), "an answer")})
    assert found == split_key({"question": one}) != split_key(layout(other, "an answer"))


def test_a_document_is_its_text_whatever_stands_beside_it():
    keys = {split_key({"text": "a  text\n", "id": n, "url": f"u{n}", "meta": {"n": n}}) for n in range(5)}
    assert len(keys) == 1 and keys != {split_key({"text": "another"})}
    assert split_key({"prompt": "", "completion": "a"}) != split_key({"prompt": "", "completion": "b"})


FILE = st.lists(
    st.tuples(st.integers(0, len(QUESTIONS) - 1), st.sampled_from(LAYOUTS), st.sampled_from(SPELLINGS), st.text(max_size=3)),
    min_size=1,
    max_size=60,
)  # fmt: skip


@settings(max_examples=25)
@given(
    files=st.lists(FILE, min_size=2, max_size=3),
    holdouts=st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]), min_size=3, max_size=3),
)
def test_no_held_out_question_is_trained_on_from_any_file(files, holdouts):
    with tempfile.TemporaryDirectory() as folder, cache_at(Path(folder) / "cache"):
        sources, asked = [], []
        for number, (rows, holdout) in enumerate(zip(files, holdouts, strict=False)):
            path = Path(folder) / f"{number}.jsonl"
            written = [{"id": i, **layout(spelt(QUESTIONS[q]), a)} for i, (q, layout, spelt, a) in enumerate(rows)]
            path.write_text("".join(json.dumps(row) + "\n" for row in written))
            sources.append(Source(str(path), holdout=holdout))
            asked.append([q for q, *_ in rows])
        trained = [number for number, holdout in enumerate(holdouts[: len(sources)]) if holdout < 1]
        stages = tuple(Stage(name=f"s{n}", objective=SFT(), sources=(sources[n],)) for n in trained)
        evals = tuple(Eval(name=f"e{n}", source=source) for n, source in enumerate(sources) if n not in trained)
        elsewhere = held_out_elsewhere(Experiment(name="x", stages=stages, evals=evals))
        sides = {"train": [set() for _ in sources], "heldout": [set() for _ in sources]}
        for n, source in enumerate(sources):
            for side in sides if n in trained else ("heldout",):
                try:
                    indices = select(source, side, elsewhere)[1]  # type: ignore[arg-type]
                except UserError:  # that side is empty
                    continue
                sides[side][n] = {asked[n][i] for i in indices}
        held = set().union(*sides["heldout"])
        assert not held & set().union(*sides["train"])
        # Nothing else is left out.
        for n in trained:
            assert set(asked[n]) - held == sides["train"][n]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_that_another_source_holds_out_are_counted_and_change_the_fingerprint(tmp_path, tokenizer):
    pairs = [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in QUESTIONS]
    talks = [{"messages": [user(q), said("yes")]} for q in QUESTIONS[:10]]
    problems = [{"question": q, "answer": "1"} for q in QUESTIONS[:5]]
    train = Source(write(tmp_path / "pairs.jsonl", pairs), holdout=0.0)
    stage = Stage(name="dpo", objective=DPO(), sources=(train,), seq_len=128, batch_size=4)
    alike = Eval(name="talks", source=Source(write(tmp_path / "talks.jsonl", talks), holdout=1.0))
    other = Eval(name="other", source=Source(write(tmp_path / "other.jsonl", [{"question": "?"}]), holdout=1.0))

    def feed(*evals):
        return make_feed(stage, tokenizer, 0, elsewhere=held_out_elsewhere(Experiment("x", (stage,), evals)))

    assert "40 pairs" in feed().report() and "0 dropped" in feed().report()
    assert "40 pairs" in feed(alike).report() and "10 dropped (10 held out by another source)" in feed(alike).report()
    assert feed().fingerprint == feed(other).fingerprint != feed(alike).fingerprint
    seen = "".join(tokenizer.decode(feed(alike).batch(step).tokens.ravel()) for step in range(30))
    assert "number 5," not in seen and "number 15," in seen
    sampled = Source(write(tmp_path / "problems.jsonl", problems), holdout=0.0)
    ask = Stage(name="grpo", objective=GRPO(), sources=(sampled,))
    places = held_out_elsewhere(
        Experiment("x", (ask,), (Eval("e", Source(str(tmp_path / "talks.jsonl"), holdout=1.0)),))
    )
    with pytest.raises(UserError, match="another source of the experiment holds out all 5"):
        make_prompt_feed(ask.sources, 2, 64, tokenizer, 0, elsewhere=places)


def test_a_key_that_all_rows_share_is_named_where_a_side_is_empty(tmp_path):
    rows = [{"messages": [user(q), said("yes")], "key": "all"} for q in QUESTIONS]
    source = Source(write(tmp_path / "a.jsonl", rows), holdout=0.5)
    empty = "heldout" if len(np.atleast_1d(_side(source, "heldout"))) == 0 else "train"
    with pytest.raises(UserError, match="all 40 rows have the same key, 'all', and are on one side"):
        select(source, empty)  # type: ignore[arg-type]


def _side(source, split):
    try:
        return select(source, split)[1]
    except UserError:
        return []


def test_generated_rows_leave_out_what_a_file_holds_out():
    rows, indices = select(Source("gen:arithmetic", holdout=0.05), "train")
    asked = rows[indices[0]]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", [asked])
        stage = Stage(name="sft", objective=SFT(), sources=(Source("gen:arithmetic", holdout=0.05),))
        elsewhere = held_out_elsewhere(Experiment("x", (stage,), (Eval("e", Source(path, holdout=1.0)),)))
    assert len(elsewhere) == 1
    rows, indices = select(Source("gen:arithmetic", holdout=0.05), "train", elsewhere)
    assert asked["key"] not in {rows[indices[k]]["key"] for k in range(200)}


def test_questions_that_collected_rows_hold_out_and_stages_train_on_are_counted(tmp_path):
    made = Source(
        write(tmp_path / "made.jsonl", [{"prompt": q, "chosen": "a", "rejected": "b"} for q in QUESTIONS]), holdout=1.0
    )
    talks = Source(
        write(tmp_path / "talks.jsonl", [{"messages": [user(q), said("a")]} for q in QUESTIONS[:7]]), holdout=0.0
    )
    assert held_out_but_trained(made, (), (talks,), NOWHERE) == (40, 7)
    rows, indices = select(Source("gen:preferences", holdout=0.05), "train")
    asked = [rows[indices[k]] for k in range(50)]
    places = {split_place(row["key"]) for row in asked if row["key"] != ALWAYS_TRAINED}
    made = Source(write(tmp_path / "made.jsonl", asked), holdout=0.5)
    held = {place for place in places if place < 0.5}
    prompts, instruct = Source("gen:preferences", holdout=0.05), Source("gen:instruct", holdout=0.05)
    assert held_out_but_trained(made, (prompts,), (instruct,), NOWHERE) == (len(held), len(held))
    assert held_out_but_trained(made, (prompts,), (Source("gen:arithmetic"),), NOWHERE) == (len(held), 0)
