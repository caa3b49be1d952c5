"""Rows of preferences: what margins and ties become, what is left out and said, and that what is cut keeps its end."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.data import chat
from lm.data.pipeline import make_feed
from lm.data.split import split_key
from lm.data.tokenizer import TURN_END, TURN_START
from lm.data.tokens import store_in_memory
from lm.experiment import CPO, DPO, KTO, ORPO, RewardModel, Source, Stage, UserError

GOOD = [{"prompt": f"Ask {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]


def feed_of(folder, rows, objective, tokenizer, split="train", **changes):
    """The feed over rows of preferences, as a file of JSON lines."""
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    holdout = 0.5 if split == "heldout" else 0.0
    stage = Stage("here", objective, (Source(str(path), holdout=holdout),), batch_size=4, seq_len=64)
    return make_feed(dataclasses.replace(stage, **changes), tokenizer, 0, split)


def answers_in(batch, tokenizer):
    """The trained text of every row."""
    return [
        tokenizer.decode(ids[weights > 0].tolist(), specials=True)
        for ids, weights in zip(batch.tokens, batch.weights, strict=True)
    ]


def test_both_rows_of_a_pair_have_its_margin_and_tie(tmp_path, tokenizer):
    rows = [{**row, "margin": i / 4} for i, row in enumerate(GOOD[:3])]
    rows += [{**GOOD[3], "tie": True}, {**GOOD[4], "tie": False, "margin": None}, GOOD[5]]
    feed = feed_of(tmp_path, rows, RewardModel(ties="split", margins=True), tokenizer, batch_size=6)
    batch = feed.batch(0)
    assert batch.margins.dtype == batch.ties.dtype == np.float32 and batch.margins.shape == (12,)
    numbers = [int(text.split()[1].removesuffix(TURN_END)) for text in answers_in(batch, tokenizer)]
    assert batch.margins.tolist() == [{1: 0.25, 2: 0.5}.get(number, 0.0) for number in numbers]
    assert batch.ties.tolist() == [float(number == 3) for number in numbers]


def test_margins_and_ties_are_there_where_no_row_says_any(tmp_path, tokenizer):
    """In a file without the columns, of a generator, and in the rows that fill up the last held-out batch."""
    generated = Stage("here", DPO(), (Source("gen:preferences"),), batch_size=4, seq_len=64)
    held = feed_of(tmp_path, GOOD, DPO(), tokenizer, "heldout", batch_size=20)
    for feed in (feed_of(tmp_path, GOOD, DPO(), tokenizer), make_feed(generated, tokenizer, 0), held):
        batch = feed.batch(0)
        assert batch.margins.shape == batch.ties.shape == (len(batch.tokens),)
        assert not batch.margins.any() and not batch.ties.any()


@pytest.mark.parametrize("objective", [DPO(), CPO(), ORPO(), RewardModel(), KTO()])
def test_who_cannot_learn_from_a_tie_is_given_none_and_told(tmp_path, tokenizer, objective):
    rows = [*GOOD, {"prompt": "Ask", "chosen": "same", "rejected": "same", "tie": True}]
    feed = feed_of(tmp_path, rows, objective, tokenizer, batch_size=12)
    assert "7 pairs" in feed.report() and "1 dropped (1 tied)" in feed.report()
    assert not any("same" in text for text in answers_in(feed.batch(0), tokenizer))
    with pytest.raises(UserError, match=r"a\.jsonl: none of 2 pairs is left to train on: 2 tied"):
        feed_of(tmp_path, [{**row, "tie": True} for row in GOOD[:2]], objective, tokenizer)


@pytest.mark.parametrize("ties", ["split", "rao_kupper"])
def test_a_tie_may_have_any_answers(tmp_path, tokenizer, ties):
    rows = [{"prompt": "Ask", "chosen": "same", "rejected": other, "tie": True} for other in ("same", "", "other")]
    feed = feed_of(tmp_path, rows, RewardModel(ties=ties), tokenizer)
    assert feed.supplies[0].rows == 3 and "0 dropped," in feed.report()


EQUAL = [
    {"prompt": "Ask", "chosen": "same", "rejected": "same"},
    {"prompt": "Ask", "chosen": "same", "rejected": [{"role": "assistant", "content": "same"}]},
]
EMPTY = [{"prompt": "Ask", "chosen": "some", "rejected": " \n"}, {"prompt": "Ask", "chosen": "", "rejected": ""}]


@pytest.mark.parametrize("objective", [DPO(), KTO(), RewardModel(ties="split")])
def test_pairs_that_teach_nothing_are_left_out_and_counted(tmp_path, tokenizer, objective):
    feed = feed_of(tmp_path, [*EQUAL, *GOOD, *EMPTY, EMPTY[0]], objective, tokenizer)
    assert "11 pairs" in feed.report() and "5 dropped (3 with an empty answer, 2 with equal answers)" in feed.report()
    assert feed.supplies[0].rows == (12 if isinstance(objective, KTO) else 6)
    for rows, why in ((EQUAL, "2 with equal answers"), (EMPTY, "2 with an empty answer")):
        with pytest.raises(
            UserError, match=rf"a\.jsonl: none of 2 pairs is left to train on: {why}; the first: .*line 1"
        ):
            feed_of(tmp_path, rows, objective, tokenizer)


def test_judged_answers_that_are_empty_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "Ask", "completion": text, "label": True} for text in ("some", "", "\t")]
    assert "2 dropped (2 with an empty answer)" in feed_of(tmp_path, rows, KTO(), tokenizer).report()
    with pytest.raises(UserError, match="none of 2 judged is left to train on: 2 with an empty answer"):
        feed_of(tmp_path, rows[1:], KTO(), tokenizer)


@pytest.mark.parametrize("values", [{"margin": v} for v in (-1, "two", True, float("inf"), float("nan"), 10**400)])
def test_a_margin_is_a_finite_number_that_is_not_negative(tmp_path, tokenizer, values):
    with pytest.raises(UserError, match=r"a\.jsonl line 2: margin must be a finite number of 0 or more, found"):
        feed_of(tmp_path, [GOOD[0], {**GOOD[1], **values}], RewardModel(margins=True), tokenizer)
    for objective in (RewardModel(), DPO()):  # which do not read it
        assert "2 pairs" in feed_of(tmp_path, [GOOD[0], {**GOOD[1], **values}], objective, tokenizer).report()


@pytest.mark.parametrize("tie", [2, "yes", 0.5, [], float("nan")])
def test_a_tie_is_true_or_false(tmp_path, tokenizer, tie):
    with pytest.raises(UserError, match=r"a\.jsonl line 2: tie must be true or false \(or 1 or 0\), found"):
        feed_of(tmp_path, [GOOD[0], {**GOOD[1], "tie": tie}], DPO(), tokenizer)


@pytest.mark.parametrize("true", [True, 1, 1.0, "true", "1"])
def test_flags_may_be_numbers_as_other_tools_write_them(tmp_path, tokenizer, true):
    rows = [*GOOD, {**GOOD[0], "tie": true}, {**GOOD[0], "tie": 0}, {**GOOD[0], "tie": None}]
    assert "1 dropped (1 tied)" in feed_of(tmp_path, rows, DPO(), tokenizer).report()
    judged = [{"prompt": "Ask", "completion": "a", "label": label} for label in (true, 0)]
    batch = feed_of(tmp_path, judged, KTO(), tokenizer, batch_size=2).batch(0)
    assert sorted(batch.desirable.tolist()) == [0.0, 1.0]


def turns(*contents):
    """A conversation that the user begins."""
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, contents, strict=False)]


def test_whole_conversations_ask_what_they_share(tmp_path, tokenizer):
    row = {"chosen": turns("Hi", "Hello", "Which?", "good"), "rejected": turns("Hi", "Hello", "Which?", "bad")}
    asked = turns("Hi", "Hello", "Which?")
    assert chat.preference_messages(row, "here") == (row["chosen"], row["rejected"])
    assert chat.prompt_messages(row, "here") == asked
    system = {"role": "system", "content": "Be kind."}
    with_system = {side: [system, *row[side]] for side in row}
    assert chat.preference_messages(with_system, "here")[0] == with_system["chosen"]
    # As if the prompt had a column: the same tokens, and the same side of the held-out split.
    apart = {"prompt": asked, "chosen": "good", "rejected": "bad"}
    assert split_key(row) == split_key(apart) == split_key({**row, "rejected": turns("Hi", "Hello", "Which?", "x")})
    one, other = (feed_of(tmp_path, [written], DPO(), tokenizer, batch_size=1).batch(0) for written in (row, apart))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.weights, other.weights)


@pytest.mark.parametrize("prompt", ["Hi", turns("Hi")])
def test_a_conversation_may_begin_with_the_prompt_again(prompt):
    row = {"prompt": prompt, "chosen": turns("Hi", "good"), "rejected": "bad"}
    assert chat.preference_messages(row, "here") == (turns("Hi", "good"), turns("Hi", "bad"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": turns("Hi", "Hello", "Which one?", "x"), "rejected": turns("Hi", "Hello", "Which two?", "x")},
            "line 2, turn 3: chosen has user 'Which one?', rejected has user 'Which two?'; both answers must be to the",
        ),
        (
            {"chosen": turns("Hi", "x"), "rejected": turns("Hi", "x", "And?", "y")},
            "line 2, turn 2: chosen has no such turn, rejected has assistant 'x'",
        ),
        (
            {"prompt": "Hi", "chosen": turns("Hi", "x"), "rejected": turns("Ho", "y")},
            "line 2, turn 1: prompt has user 'Hi', rejected has user 'Ho'",
        ),
        (
            {"prompt": "a" * 90 + "!", "chosen": turns("a" * 90 + "?", "x"), "rejected": "y"},
            f"turn 1: prompt has user '{'a' * 20}!', chosen has user '{'a' * 20}?'",
        ),
        (
            {"prompt": "Hi", "chosen": turns("Hi", "x")[1:] + turns("So?", "y"), "rejected": "y"},
            "line 2, turn 2: chosen has assistant 'x', rejected has no such turn;",
        ),
        (
            {"chosen": turns("Hi", "x")[1:], "rejected": turns("Hi", "x")},
            "line 2: this stage needs the columns prompt, chosen and rejected; the columns found are chosen, rejected",
        ),
        (
            {"chosen": "x", "rejected": "y", "id": 1},
            "line 2: this stage needs the columns prompt, chosen and rejected; the columns found are chosen, rejected, id",
        ),
    ],
)
def test_answers_to_different_prompts_are_refused_where_they_part(tmp_path, tokenizer, row, message):
    with pytest.raises(UserError) as error:
        feed_of(tmp_path, [GOOD[0], row], DPO(), tokenizer)
    assert "a.jsonl" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def pieces_of(messages, tokenizer):
    """(prompt, the answer's header, its text with the end of turn and what follows), token for token."""
    tokens, mask = chat.render(messages, tokenizer)[:2]
    start = len(tokens) - 1 - tokens[::-1].index(tokenizer.special_ids[TURN_START])
    first = start + mask[start:].index(1)
    return tokens[:start], tokens[start:first], tokens[first:]


WORDS = st.text("abc \n", min_size=1, max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=WORDS, chosen=WORDS, rejected=WORDS, seq_len=st.integers(16, 80))
def test_what_is_too_long_keeps_the_ends_of_its_answers(tokenizer, prompt, chosen, rejected, seq_len):
    """The prompt loses its beginning, the same for both; without any of it an answer loses its own, after its header."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    store = store_in_memory([(row, "here")], "pairs", tokenizer)
    sides = [pieces_of(messages, tokenizer) for messages in chat.preference_messages(row, "here")]
    longest = max(sum(map(len, side)) for side in sides)
    lost = min(len(sides[0][0]), max(0, longest - seq_len))
    for example, (asked, header, answer) in zip(store.ends(np.arange(2), seq_len), sides, strict=True):
        room = seq_len - len(asked) + lost - len(header)
        expected = [*asked[lost:], *header, *answer[max(0, len(answer) - room) :]]
        assert example.tokens.tolist() == expected and len(expected) <= seq_len
        end = len(expected) - len(tokenizer.encode("\n"))
        kept = min(len(answer), room)
        assert expected[end - 1] == tokenizer.special_ids[TURN_END]
        assert np.flatnonzero(example.mask).tolist() == list(range(len(expected) - kept, end))


@pytest.mark.parametrize("objective", [DPO(), KTO(), RewardModel()])
def test_what_is_cut_is_counted_and_what_has_no_room_left_out(tmp_path, tokenizer, objective):
    long = [
        {"prompt": "ask " * 100, "chosen": "yes", "rejected": "no"},
        {"prompt": "Ask", "chosen": "yes " * 100, "rejected": "no"},
        {"prompt": "Ask", "chosen": "so " + "yes " * 100, "rejected": "no " + "yes " * 100},
    ]
    feed = feed_of(tmp_path, [*GOOD, *long], objective, tokenizer, batch_size=16)
    assert "9 pairs" in feed.report() and "1 cut, 2 dropped (" in feed.report()
    gone = "whose prompt is truncated away, in seq_len 64"
    equal = "with answers that are equal once truncated, in seq_len 64"
    assert feed.supplies[0].tally.reasons == {gone: 1, equal: 1}
    assert f"1 dropped ({gone}), the first: {tmp_path}/a.jsonl line 8: " in feed.report()
    batch = feed.batch(0)
    texts = answers_in(batch, tokenizer)
    assert all(text.endswith(TURN_END) for text in texts) and f"yes{TURN_END}" in texts
    tally = feed.supplies[0].tally
    if not isinstance(objective, KTO):
        seen = [feed.supplies[0].row(0, place) for place in range(7)]
        rows = [row for pair in seen for row in pair]
        assert tally.tokens == sum(int((row.segments > 0).sum()) for row in rows)
        assert tally.trained == sum(int(row.weights.sum()) for row in rows)
    with pytest.raises(UserError, match=r"none of 9 pairs is left .*: 9 with no room for an answer in seq_len 4"):
        feed_of(tmp_path, [*GOOD, *long], objective, tokenizer, seq_len=4)


def test_judged_answers_and_their_mismatches_keep_their_ends(tmp_path, tokenizer):
    """The prompts are longer than a row, the answers are not: every prompt meets the whole answer of another."""
    rows = [{"prompt": f"{i} ask " * 60, "completion": f"say {i} " * (i + 1), "label": i % 2 == 0} for i in range(4)]
    feed = feed_of(tmp_path, rows, KTO(), tokenizer)
    assert "4 cut, 0 dropped," in feed.report()
    batch = feed.batch(0)
    own, others = answers_in(batch, tokenizer), answers_in(batch.mismatched, tokenizer)
    assert sorted(own) == sorted(row["completion"] + TURN_END for row in rows)
    assert others == [own[-1], *own[:-1]]
    assert (batch.segments == 1).all()
    tails = [tokenizer.decode(ids.tolist(), specials=True) for ids in batch.mismatched.tokens]
    assert all(
        f"{TURN_END}\n{TURN_START}assistant\n{other}\n" in text for text, other in zip(tails, others, strict=True)
    )
