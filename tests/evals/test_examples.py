"""lm/evals/examples.py: an eval measures what it says, and what it cannot measure is refused or counted beforehand."""

from __future__ import annotations

import json

import pytest

from lm.check import check
from lm.data.tokenizer import SubwordTokenizer
from lm.evals.examples import read_examples, talks_of
from lm.experiment import DPO, SFT, Eval, Experiment, Model, Pretrain, RewardModel, Source, Stage, UserError
from lm.train.evaluate import check_evals

MAX_LEN = 64
PREFERENCE = DPO()


@pytest.fixture(scope="module")
def tokenizer() -> SubwordTokenizer:
    return SubwordTokenizer.train(["Say the number of words: one, two, three. no yes"], 300)


def talk(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


@pytest.fixture
def item(tmp_path):
    def make(rows, metric="reward", bad_rows="stop", **changes) -> Eval:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Source(str(path), holdout=1.0, bad_rows=bad_rows)
        return Eval("it", source, metric, **{"count": 10, "max_new_tokens": 8} | changes)

    return make


PROBLEMS = [{"question": f"Say {n}", "answer": str(n)} for n in range(5)]
PAIRS = [{"prompt": f"Say {n}", "chosen": "yes", "rejected": "no"} for n in range(5)]
LONG = "one two " * 60
BROKEN = [  # metric, good rows, a row that is none, what is said of it
    ("reward", PROBLEMS, {"question": "Say what"}, "the verifier answer needs the column answer or final; .* question"),
    ("reward", PROBLEMS, {"question": "Say what", "answer": None}, "needs the column answer"),
    ("reward", PROBLEMS, {"question": "Say what", "answer": " "}, "needs the column answer"),
    (
        "reward",
        [*PROBLEMS[:4], {"question": "Say", "final": 4}],
        {"question": "What"},
        "column answer or final; .* question",
    ),
    ("pass_at_k", PROBLEMS, {"answer": "1"}, "needs the columns prompt, question or messages|columns found"),
    ("pair_accuracy", PAIRS, {"prompt": "Say what", "chosen": "yes"}, "chosen and rejected"),
    ("bits_per_byte", [{"text": f"one {n}"} for n in range(5)], {"txet": "one"}, "need the column text; .* txet"),
    ("bits_per_byte", [{"text": f"one {n}"} for n in range(5)], talk("Say what", "one"), "need the column text"),
    ("bits_per_byte", [talk(f"Say {n}", "one") for n in range(5)], {"id": 1}, "columns"),
]


@pytest.mark.parametrize("metric, good, bad, words", BROKEN)
def test_a_row_that_cannot_be_measured_is_named_or_counted(tokenizer, item, metric, good, bad, words):
    rows = [*good, bad]
    changes = {"temperature": 1.0} if metric == "pass_at_k" else {}
    with pytest.raises(UserError, match=rf"(?s)^evals\.it: .*rows\.jsonl line 6: .*{words}"):
        read_examples(item(rows, metric, **changes), tokenizer, MAX_LEN)
    dropping = item(rows, metric, "drop", **changes)
    found = read_examples(dropping, tokenizer, MAX_LEN)
    assert len(found.encoded) == 5 and sum(found.left_out.values()) == 1
    line = found.describe(dropping)
    assert ": 5 of 10 held-out " in line and ", there are no more; skipped: 1 " in line


PASSED_OVER = [
    (
        "reward",
        PROBLEMS,
        [{"question": LONG, "answer": "1"}, PROBLEMS[0]],
        ["1 longer than 56 tokens", "1 with a prompt that another has"],
    ),
    ("pair_accuracy", PAIRS, [{**PAIRS[0], "prompt": "b", "tie": True}, PAIRS[1]], ["1 tied", "1 that are duplicates"]),
    ("pair_accuracy", PAIRS, [{**PAIRS[0], "rejected": "yes"}, {**PAIRS[0], "chosen": " "}], ["equal", "empty"]),
    (
        "pair_accuracy",
        PAIRS,
        [{"prompt": "a", "chosen": f"yes {LONG}", "rejected": f"no {LONG}"}],
        ["1 with answers that are equal once truncated, in model.max_len 64"],
    ),
    (
        "bits_per_byte",
        [talk(f"Say {n}", "one") for n in range(5)],
        [talk("Say", ""), talk(LONG, "one"), talk("Say 1", "one")],
        ["1 with an empty answer", "1 longer than the 64 tokens of model.max_len", "1 that are duplicates"],
    ),
    ("bits_per_byte", [{"text": f"one {n}"} for n in range(5)], [{"text": ""}], ["1 with an empty text"]),
]


@pytest.mark.parametrize("metric, good, over, words", PASSED_OVER)
def test_what_is_passed_over_is_counted_and_rows_behind_it_are_measured(tokenizer, item, metric, good, over, words):
    asked = item([*over, *good], metric, count=5)
    found = read_examples(asked, tokenizer, MAX_LEN)
    assert len(found.encoded) == 5
    line = read_examples(item([*over, *good], metric, count=50), tokenizer, MAX_LEN).describe(asked)
    assert all(word in line for word in words), line
    with pytest.raises(UserError, match=r"none of the held-out .* can be measured: 1 "):
        read_examples(
            item([row for row in over if row not in good and row != talk("Say 1", "one")][:1], metric),
            tokenizer,
            MAX_LEN,
        )


def test_bits_per_byte_are_of_what_the_stage_trains_on(tokenizer, item):
    rows = [talk(f"Say {n}", "one two", text="a text beside it") for n in range(3)]
    asked = item(rows, "bits_per_byte")
    stages = {kind: Stage(name="s", objective=kind, sources=(asked.source,)) for kind in (SFT(), Pretrain())}
    read = {}
    for kind, stage in stages.items():
        talks = talks_of(Experiment("x", (stage,), (asked,)))
        read[type(kind)] = read_examples(asked, tokenizer, MAX_LEN, talks)
    assert set(read[SFT].texts) == {b"one two"} and set(read[Pretrain].texts) == {b"a text beside it"}


@pytest.fixture
def experiment(item):
    def make(*evals, objective=PREFERENCE, prompts=()):
        pairs = Source(item(PAIRS).source.path.replace("rows", "pairs"))
        stage = Stage(name="s", objective=objective, sources=(pairs,), seq_len=32)
        return Experiment("x", (stage,), evals, prompts, model=Model(max_len=MAX_LEN))

    return make


def test_all_evals_and_prompts_are_looked_at_before_training(tokenizer, item, experiment):
    good = item(PAIRS, "pair_accuracy", count=3)
    lines = check_evals(experiment(good, prompts=("Say one.",)), tokenizer)
    assert lines == [f"evals.it: {good.source.path}: 3 held-out pairs"]
    with pytest.raises(
        UserError, match=r"prompts\.1 has \d+ tokens; model\.max_len 64 less 32 for the answer leaves 32"
    ):
        check_evals(experiment(good, prompts=("Say one.", LONG)), tokenizer)
    with pytest.raises(UserError, match=r"needs? the column"):
        check_evals(experiment(item(PAIRS, "reward")), tokenizer)


def test_an_eval_that_no_stage_gives_what_it_compares_with_is_refused(item, experiment):
    pairs, best = item(PAIRS, "pair_accuracy"), item(PAIRS, "best_of_n", temperature=1.0, verifier="style")
    check(experiment(pairs))
    check(experiment(best, objective=RewardModel()))
    with pytest.raises(UserError, match=r"evals\.it\.metric is pair_accuracy, which needs a reward model or"):
        check(experiment(pairs, objective=SFT()))
    with pytest.raises(UserError, match=r"evals\.it\.metric is best_of_n, which needs a reward model, and no stage"):
        check(experiment(best))
