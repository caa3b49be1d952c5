"""Feeds are pure functions of the step, give each example its due, and say what is wrong with the data."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest

from lm.data import supply
from lm.data.chat import render
from lm.data.pipeline import make_feed
from lm.data.selection import check_sources, heldout_rows, tokenizer_texts
from lm.data.sources import load_rows, split_rows
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import CPO, DPO, GRPO, KTO, ORPO, SFT, Eval, Experiment, Pretrain, Source, Stage, UserError


def stage(objective, *sources, **changes):
    sources = tuple(s if isinstance(s, Source) else Source(str(s)) for s in sources)
    return dataclasses.replace(Stage("here", objective, sources, batch_size=4, seq_len=64), **changes)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(question, reply):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def arrays(batch):
    return jax.tree.leaves(batch)


STAGES = {
    "pretrain": stage(Pretrain(), "gen:docs"),
    "sft": stage(SFT(), Source("gen:instruct"), Source("gen:arithmetic", weight=0.5)),
    "dpo": stage(DPO(), "gen:preferences"),
    "kto": stage(KTO(), "gen:preferences"),
}


@pytest.mark.parametrize("name", STAGES)
def test_batches_are_pure_functions_of_seed_and_step(name, tokenizer):
    one, two, other = (make_feed(STAGES[name], tokenizer, seed) for seed in (3, 3, 4))
    later = arrays(one.batch(7))
    for step in (0, 7, 7, 10**6):
        for a, b in zip(arrays(one.batch(step)), arrays(two.batch(step)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(later[0], one.batch(8).tokens)
    assert not np.array_equal(later[0], other.batch(7).tokens)
    assert one.fingerprint == two.fingerprint
    rows = 8 if name == "dpo" else 4
    assert [(a.shape, a.dtype.name) for a in later[:4]] == [
        ((rows, 64), d) for d in ("int32", "float32", "int32", "int32")
    ]
    assert (later[1][:, 0] == 0).all() and (later[0] < tokenizer.vocab_size).all()
    assert "gen:" in one.report()


@pytest.mark.parametrize("name", STAGES)
def test_some_rows_of_a_batch_are_those_rows_of_it(name, tokenizer):
    feed = make_feed(STAGES[name], tokenizer, 3)
    whole = arrays(feed.batch(5))
    for only in ([1], [0, 3], [2, 3], range(len(whole[0]))):
        for a, b in zip(whole, arrays(feed.batch(5, np.array(only))), strict=True):
            np.testing.assert_array_equal(a[np.array(only)], b)


def test_the_fingerprint_follows_the_data(tokenizer, tmp_path):
    def print_of(text, **changes):
        path = write(tmp_path / "a.jsonl", [{"text": f"{text} {i}"} for i in range(50)])
        return make_feed(stage(Pretrain(), Source(str(path), **changes)), tokenizer, 0).fingerprint

    assert print_of("a") == print_of("a")
    assert len({print_of("a"), print_of("b"), print_of("a", weight=2.0), print_of("a", holdout=0.1)}) == 4


def test_pretraining_goes_through_every_token_every_epoch(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"document {i} " + "and so on " * (i % 30)} for i in range(60)])
    source = Source(str(path), holdout=0.1)
    feed = make_feed(stage(Pretrain(), source, batch_size=1), tokenizer, 0)
    rows = load_rows(str(path))
    texts = [rows[i]["text"] for i in split_rows(rows, 0.1)[0]]
    expected = Counter(t for text in texts for t in [tokenizer.pad_id, *tokenizer.encode(text), tokenizer.pad_id])
    number = feed.supplies[0].rows
    for epoch in range(3):
        windows = [feed.batch(epoch * number + i) for i in range(number)]
        seen = Counter(np.concatenate([w.tokens[w.segments > 0] for w in windows]).tolist())
        assert not expected - seen  # all of it
        assert sum((seen - expected).values()) < 64  # and at most the overlap where the ring closes
    first = {tuple(feed.batch(i).tokens[0]) for i in range(number)}
    assert len(first & {tuple(feed.batch(number + i).tokens[0]) for i in range(number)}) < number / 2


@pytest.mark.parametrize("words", [1, 20])
def test_a_text_shorter_than_a_row_still_trains(tokenizer, tmp_path, words):
    (tmp_path / "a.txt").write_text("word " * words)
    batch = make_feed(stage(Pretrain(), Source(str(tmp_path / "a.txt"), holdout=0.0)), tokenizer, 0).batch(3)
    assert batch.weights.sum() > 0


def test_held_out_documents_come_once_in_order_and_are_no_training_documents(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"document number {i}"} for i in range(200)])
    source = Source(str(path), holdout=0.2)
    feed = make_feed(stage(Pretrain(), source), tokenizer, 0, split="heldout")
    batches = [feed.batch(i) for i in range(-(-feed.rows // 4) + 1)]
    tokens = np.concatenate([b.tokens[b.segments > 0] for b in batches])
    held = tokenizer.decode(tokens, specials=True).split("<|endoftext|>")[1::2]
    assert held == [row["text"] for row, _ in heldout_rows(source)] and len(held) > 20
    assert batches[-1].weights.sum() == 0 == batches[-1].segments.sum()
    train = make_feed(stage(Pretrain(), source), tokenizer, 0)
    text = "".join(tokenizer.decode(train.batch(i).tokens.ravel(), specials=True) for i in range(20))
    assert not [document for document in held if f"<|endoftext|>{document}<|endoftext|>" in text]


def conversations_in(batch, tokenizer):
    """(text, trained text) of every segment of a batch."""
    found = []
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            ids, trained = batch.tokens[row][here], batch.weights[row][here] == 1
            assert batch.positions[row][here].tolist() == list(range(here.sum()))
            found.append((tokenizer.decode(ids, specials=True), tokenizer.decode(ids[trained], specials=True)))
    return found


def test_sft_gives_every_conversation_once_an_epoch_trained_on_the_answer(tokenizer, tmp_path):
    rows = [talk(f"Say {i}", f"yes {i} " + "a b c " * (i % 7)) for i in range(100)]
    path = write(tmp_path / "a.jsonl", rows)
    feed = make_feed(stage(SFT(), Source(str(path), holdout=0.0), batch_size=1), tokenizer, 0)
    number = feed.supplies[0].rows
    epochs = []
    for epoch in range(2):
        batches = [feed.batch(epoch * number + i) for i in range(number)]
        found = [pair for batch in batches for pair in conversations_in(batch, tokenizer)]
        assert sorted(trained for _, trained in found) == sorted(
            r["messages"][1]["content"] + "<|im_end|>" for r in rows
        )
        assert all(text.endswith(trained + "\n") for text, trained in found)
        epochs.append(found)
    assert epochs[0] != epochs[1]
    assert "100 conversations" in feed.report() and "0 truncated, 0 dropped" in feed.report()


def test_generated_conversations_are_packed_and_none_is_held_out(tokenizer):
    feed = make_feed(stage(SFT(), Source("gen:instruct", holdout=0.3), seq_len=128), tokenizer, 0)
    held = {row["messages"][0]["content"] for row, _ in heldout_rows(Source("gen:instruct", holdout=0.3))}
    batches = [feed.batch(step) for step in range(25)]
    found = [pair for batch in batches for pair in conversations_in(batch, tokenizer)]
    asked = {text.split("user\n")[1].split("<|im_end|>")[0] for text, _ in found}
    assert len(found) > 200 and not asked & held
    assert np.mean([(batch.segments > 0).mean() for batch in batches]) > 0.8


def test_truncated_and_dropped_conversations_are_counted(tokenizer, tmp_path):
    rows = [talk("Hi", "short"), talk("Hi", "long " * 100), talk("ask " * 100, "never seen")]
    feed = make_feed(stage(SFT(), Source(str(write(tmp_path / "a.jsonl", rows)), holdout=0.0)), tokenizer, 0)
    assert "3 conversations" in feed.report() and "1 truncated, 1 dropped" in feed.report()
    assert len(conversations_in(feed.batch(0), tokenizer)) >= 2


def test_nothing_left_to_train_on_is_an_error(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [talk("ask " * 100, "never seen")])
    with pytest.raises(UserError, match="none of 1 examples has a token to train on; raise seq_len"):
        make_feed(stage(SFT(), Source(str(path), holdout=0.0)), tokenizer, 0)


def test_a_batch_of_zero_weights_is_an_error(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 40)
    feed = make_feed(stage(Pretrain(), Source(str(tmp_path / "a.txt"), holdout=0.0)), tokenizer, 0)
    empty = supply.Supply(
        1,
        lambda epoch, place: [r._replace(weights=r.weights * 0) for r in feed.supplies[0].row(0, 0)],
        feed.supplies[0].tally,
        "documents",
    )
    with pytest.raises(UserError, match="step 3: the loss mask of the whole batch is zero"):
        dataclasses.replace(feed, supplies=(empty,)).batch(3, np.array([1]))
    with pytest.raises(UserError, match="step 3: the loss mask of the whole batch is zero"):
        dataclasses.replace(feed, supplies=(empty,)).batch(3)


@pytest.mark.parametrize("listed", [False, True])
def test_preference_pairs_alternate_and_train_on_the_last_answer(tokenizer, tmp_path, listed):
    def side(text):
        return [{"role": "assistant", "content": text}] if listed else text

    talk_so_far = [*talk("Hi", "Hello")["messages"], {"role": "user", "content": "Which?"}]
    rows = [{"prompt": talk_so_far, "chosen": side(f"good {i}"), "rejected": side(f"bad {i}")} for i in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    feed = make_feed(stage(DPO(), Source(str(path), holdout=0.0), batch_size=20), tokenizer, 0)
    found = conversations_in(feed.batch(0), tokenizer)
    chosen, rejected = [t for _, t in found[0::2]], [t for _, t in found[1::2]]
    assert sorted(chosen) == sorted(f"good {i}<|im_end|>" for i in range(20))
    assert rejected == [text.replace("good", "bad") for text in chosen]


def test_every_answer_is_judged_once_and_its_prompt_meets_the_answer_before(tokenizer, tmp_path):
    """Labelled answers and both sides of pairs, in one mixture."""
    labelled = [{"prompt": f"Ask {i}", "completion": f"say {i}", "label": i % 3 == 0} for i in range(12)]
    both = [{"prompt": f"Ask {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12, 18)]
    paths = [write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((labelled, both))]
    sources = [Source(str(path), holdout=0.0) for path in paths]
    feed = make_feed(stage(KTO(), *sources, batch_size=8), tokenizer, 0)
    assert "12 judged" in feed.report() and "6 pairs" in feed.report()
    seen = {}
    for step in range(3):
        batch = feed.batch(step)
        texts = [text.split("<|im_end|>") for text, _ in conversations_in(batch, tokenizer)]
        trained = [text for _, text in conversations_in(batch, tokenizer)]
        seen |= dict(zip(trained, batch.desirable.tolist(), strict=True))
        mixed = conversations_in(batch.mismatched, tokenizer)
        for row in range(8):
            prompt, answer = texts[row][0], trained[row - 1]
            assert mixed[row] == (f"{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}\n", answer)
    expected = {f"{row['completion']}<|im_end|>": float(row["label"]) for row in labelled}
    expected |= {f"{word} {i}<|im_end|>": float(word == "good") for i in range(12, 18) for word in ("good", "bad")}
    assert seen == expected


def test_mixtures_give_their_shares_of_rows(tokenizer, tmp_path):
    paths = [write(tmp_path / f"{word}.jsonl", [{"text": f"{word} " * 200}] * 3) for word in ("apple", "bird")]
    feed = make_feed(
        stage(Pretrain(), Source(str(paths[0]), 3.0, 0.0), Source(str(paths[1]), 1.0, 0.0), batch_size=8), tokenizer, 0
    )
    texts = [tokenizer.decode(row) for step in range(5) for row in feed.batch(step).tokens]
    assert sum("apple" in text for text in texts) == 30 and sum("bird" in text for text in texts) == 10


@pytest.mark.parametrize(
    ("objective", "row", "message"),
    [
        (Pretrain(), {"messages": []}, r"a\.jsonl line 1: this stage needs the column text; .* found are messages"),
        (Pretrain(), {"text": 3}, r"a\.jsonl line 1: text must be a string"),
        (SFT(), {"text": "x", "id": 1}, r"a\.jsonl line 1: .*needs the columns messages.*found are text, id"),
        (SFT(), {"messages": [{"role": "user", "content": "a"}] * 2}, r"a\.jsonl line 1, turn 2: two user turns"),
        (DPO(), {"prompt": "x"}, "needs the columns prompt, chosen and rejected"),
        (CPO(), {"prompt": "x"}, "needs the columns prompt, chosen and rejected"),
        (ORPO(), {"prompt": "x"}, "needs the columns prompt, chosen and rejected"),
        (KTO(), {"prompt": "x"}, "needs the columns prompt, completion and label, or prompt, chosen and rejected"),
        (KTO(), {"prompt": "x", "completion": "y", "label": 2}, r"line 1: label must be true .* found 2"),
        (KTO(), {"prompt": "x", "completion": [3], "label": True}, "completion must be a string, a number or a list"),
    ],
)
def test_rows_that_do_not_fit_the_stage_are_named(tokenizer, tmp_path, objective, row, message):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=message):
        make_feed(stage(objective, Source(str(path), holdout=0.0)), tokenizer, 0)


def test_an_empty_side_of_the_split_names_the_holdout(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"holdout 0\.0 holds out no row; raise it"):
        make_feed(stage(Pretrain(), Source(str(path), holdout=0.0)), tokenizer, 0, split="heldout")
    with pytest.raises(UserError, match=r"holdout 1\.0 leaves no row for training"):
        make_feed(stage(Pretrain(), Source(str(path), holdout=1.0)), tokenizer, 0)


def test_held_out_rows_of_a_generator_ask_different_things_in_fixed_order():
    one, two = (list(itertools.islice(heldout_rows(Source("gen:instruct")), 100)) for _ in range(2))
    assert one == two and len({row["key"] for row, _ in one}) == 100
    assert one[0][1].startswith("gen:instruct row ")


def experiment(*stages, evals=()):
    return Experiment("x", stages, evals)


def test_sources_held_out_differently_would_leak(tmp_path):
    good = experiment(
        STAGES["pretrain"], stage(GRPO(), "gen:arithmetic"), evals=(Eval("a", source=Source("gen:arithmetic")),)
    )
    check_sources(good)
    leaks = [
        experiment(stage(SFT(), Source("gen:instruct", holdout=0.1)), STAGES["dpo"]),
        experiment(STAGES["sft"], evals=(Eval("a", source=Source("gen:arithmetic", holdout=0.1)),)),
        experiment(
            stage(Pretrain(), Source("a.txt", holdout=0.1), name="one"), stage(Pretrain(), "./a.txt", name="two")
        ),
    ]
    for leak in leaks:
        with pytest.raises(UserError, match="one would train on rows that the other holds out"):
            check_sources(leak)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), "here: sources is empty"),
        ((Source("a.txt", weight=0.0),), "here: the weights"),
        ((Source("a.txt", weight=-1.0), Source("b.txt", weight=2.0)), "here: the weights"),
        ((Source("a.txt", holdout=1.5),), r"here: holdout of a\.txt is 1\.5"),
    ],
)
def test_sources_that_make_no_sense(sources, message):
    with pytest.raises(UserError, match=message):
        check_sources(experiment(stage(Pretrain(), *sources)))


def test_the_tokenizer_learns_from_every_source_and_no_held_out_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100)])
    source = Source(str(path), holdout=0.3)
    texts = tokenizer_texts(experiment(stage(Pretrain(), source), STAGES["sft"], STAGES["dpo"]))
    assert not set(texts) & {row["text"] for row, _ in heldout_rows(source)}
    assert any(text.startswith("document") for text in texts) and "What is an LLM?" in texts
    assert SubwordTokenizer.train(texts, 400).vocab_size == 400


def test_the_rendering_of_the_feed_is_the_renderer(tokenizer, tmp_path):
    row = talk("Say it", "  it\n")
    feed = make_feed(stage(SFT(), Source(str(write(tmp_path / "a.jsonl", [row])), holdout=0.0)), tokenizer, 0)
    tokens, mask = render(row["messages"], tokenizer)[:2]
    batch = feed.batch(0)
    assert batch.tokens[0][: len(tokens)].tolist() == tokens and batch.weights[0][: len(mask)].tolist() == mask
