"""Whatever a file has in it: rows that stages read, or one line that says where and what is wrong, also counted."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import struct

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lm.data import chat
from lm.data.bad_rows import REASONS, BadRow
from lm.data.layouts import canonical
from lm.data.pipeline import make_feed
from lm.data.selection import select
from lm.data.sources import load_rows, texts_of
from lm.data.split import split_key
from lm.data.tokens import KINDS, encode, store_of, unread_columns
from lm.experiment import DPO, SFT, Pretrain, Source, Stage, UserError
from lm.stored import cache_at

TEXT = st.text("ab 3é\n", min_size=1, max_size=12).filter(str.strip)


def talk(ask, answer):
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


IMITATED = {
    "question": lambda a, b: {"question": a, "answer": b},
    "prompt": lambda a, b: {"prompt": a, "completion": b},
    "turns": lambda a, b: {"prompt": talk(a, b)[:1], "completion": talk(a, b)[1:], "messages": None},
    "Alpaca": lambda a, b: {"instruction": a, "input": "", "output": b},
    "Dolly": lambda a, b: {"instruction": a, "context": None, "response": b},
    "ShareGPT": lambda a, b: {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]},
    "parts": lambda a, b: {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in talk(a, b)]},
    "JSON": lambda a, b: {"messages": json.dumps(talk(a, b))},
    "marks": lambda a, b: {"messages": [{**turn, "weight": 1, "name": None} for turn in talk(a, b)]},
}  # fmt: skip
PREFERRED = {
    "turns": lambda a, b, c: {"chosen": talk(a, b), "rejected": talk(a, c)},
    "both": lambda a, b, c: {"prompt": a + " ", "chosen": talk(a, b), "rejected": talk(a, c)},
    "HH": lambda a, b, c: {
        "chosen": f"\n\nHuman: {a}\n\nAssistant: {b}", "rejected": f"\n\nHuman: {a}\n\nAssistant: {c}"
    },
    "HH prompt": lambda a, b, c: {"prompt": f"\n\nHuman: {a}\n\nAssistant:", "chosen": b, "rejected": c},
    "Orca": lambda a, b, c: {"system": "", "question": a, "chosen": b, "rejected": c},
    "Alpaca": lambda a, b, c: {"instruction": a, "input": None, "chosen": b, "rejected": c},
    "ShareGPT": lambda a, b, c: {
        "conversations": [{"from": "human", "value": a}], "chosen": {"from": "gpt", "value": b},
        "rejected": {"from": "gpt", "value": c},
    },
}  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(ask=TEXT, answer=TEXT, other=TEXT)
def test_every_layout_gives_the_tokens_of_the_plain_one(tokenizer, ask, answer, other):
    ask, answer, other = ask.strip(), answer.strip(), other.strip()
    assume(answer != other)

    def tokens(row, kind):
        columns = encode(KINDS[kind], tokenizer, [(row, "here")], drop=False)
        return {name: values.tolist() for name, values in columns.items() if name != "unread"}

    plain = {"messages": talk(ask, answer)}
    for name, make in IMITATED.items():
        row = make(ask, answer)
        assert tokens(row, "conversations") == tokens(plain, "conversations"), name
        assert tokens(canonical(row), "conversations") == tokens(plain, "conversations"), name
        assert split_key(row) == split_key(plain), name
    pair = {"prompt": ask, "chosen": answer, "rejected": other}
    for name, make in PREFERRED.items():
        row = make(ask, answer, other)
        assert tokens(row, "pairs") == tokens(pair, "pairs"), name
        assert split_key(row) == split_key(plain), name


SEEDS = [
    {"text": "Some text."},
    *(make("Why?", "So.") for make in IMITATED.values()),
    *(make("Why?", "So.", "No.") | {"tie": 0, "margin": 0.5} for make in PREFERRED.values()),
    {"prompt": "Why?", "completion": "So.", "label": True, "system": "Be brief."},
    {"messages": [{"role": "system", "content": "x"}, *talk("a", "b"), *talk("c", "d")], "tools": [], "key": "x"},
]
JUNK = [None, True, False, 0, 1, -1, 2.5, float("nan"), 10**30, "", " ", "text", "[{", "user", "assistant", "\ud800", [], {},
        [None], [[]], {"role": "user"}, {"from": "gpt"}, b"\xff", "system", "tool", [1, "a"], "Human: \n\nAssistant:"]  # fmt: skip


def mutated(row, draw):
    """The row with a few of its values, at any depth, replaced, removed, doubled or put elsewhere."""
    row = copy.deepcopy(row)
    for _ in range(draw.randint(1, 3)):
        holder: dict | list = row
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw.choice(keys)
            inside = holder[key]
            if isinstance(inside, dict | list) and inside and draw.random() < 0.7:
                holder = inside
                continue
            change = draw.randrange(4)
            if change == 0:
                holder[key] = draw.choice(JUNK)
            elif change == 1:
                del holder[key]
            elif change == 2:
                holder[key] = [inside, inside]
            elif isinstance(holder, dict):
                names = [
                    "role",
                    "content",
                    "weight",
                    "train",
                    "tool_calls",
                    "prompt",
                    "messages",
                    "chosen",
                    "label",
                    "tools",
                ]
                holder[draw.choice(names)] = inside
            break
    return row


READERS = (
    lambda row: chat.training_messages(row, "here"),
    lambda row: chat.training_messages(row, "here", "all"),
    lambda row: chat.prompt_messages(row, "here"),
    lambda row: chat.preference_messages(row, "here"),
    lambda row: chat.judged_messages(row, "here"),
    lambda row: chat.is_tie(row, "here"),
    lambda row: chat.margin_of(row, "here"),
    split_key,
    texts_of,
    lambda row: [
        list(unread_columns(row, reads)) for reads in ("documents", "conversations", "pairs", "judged", "prompts")
    ],
)


@pytest.mark.slow
def test_ten_thousand_broken_rows_are_read_or_refused_in_one_line():
    draw, refused = random.Random(0), 0
    for number in range(10_000):
        row = mutated(SEEDS[number % len(SEEDS)], draw)
        for read in READERS:
            try:
                read(row)
            except BadRow as error:
                refused += 1
                assert "\n" not in str(error) and str(error).startswith("here") and 0 < error.reason < len(REASONS)
    assert refused > 10_000


def rows_as(kind):
    """A sound file of a kind."""
    rows = [{"text": f"a text of {i}", "n": i} for i in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        stream = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), stream, row_group_size=8)
        return stream.getvalue()
    return {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines, mtime=0),
        "json": json.dumps({"data": rows}).encode(),
        "csv": b"text,n\n" + b"".join(b'"a ""text""\nof %d",%d\n' % (i, i) for i in range(20)),
        "tsv": b"text\tn\n" + b"".join(b"a text of %d\t%d\n" % (i, i) for i in range(20)),
        "txt": b"Some text.\n\nMore of it.\n" * 20,
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "txt", "parquet"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, tokenizer, kind):
    sound, draw = rows_as(kind), random.Random(kind)
    refused = 0
    for number in range(40):
        data = bytearray(sound)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            data[at : at + draw.choice([0, 1, 1, 1, 9])] = bytes(draw.choices(range(256), k=draw.choice([0, 1, 1, 5])))
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(data)
        for drop in (False, True):
            try:
                with cache_at(tmp_path / "cache"):
                    store_of(load_rows(str(path), drop=drop), "documents", tokenizer)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and str(path) in str(error)
    assert refused or kind == "txt"


def feed(path, objective, tokenizer, **changes):
    stage = Stage("here", objective, (Source(str(path), holdout=0.0, **changes),), batch_size=2, seq_len=64)
    return make_feed(stage, tokenizer, 0)


BAD_LINES = [
    ("{", "that are not valid JSON"),
    ('!"x"', "that are not valid JSON"),
    ('{"question": "a", "question": "b", "answer": "c"}', "that are not valid JSON"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}', "that are not valid JSON"),
    ('{"question": "a"}', "without the columns of this stage"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "with turns that are no conversation"),
    ('{"question": "a", "answer": ["b"]}', "with content that is not text"),
    ('{"question": "a", "answer": " "}', "with an empty answer"),
    (json.dumps({"messages": [*talk("a", "b")[:1], {**talk("a", "b")[1], "weight": 0}]}), "whose marks leave no turn to learn"),
    (json.dumps({"messages": [*talk("a", "b")[:1], {**talk("a", "b")[1], "weight": 0.5}]}), "with a flag, margin or mark that cannot be read"),
    (json.dumps({"messages": [*talk("a", "b")[:1], {**talk("a", "b")[1], "tool_calls": [1]}]}), "with tools"),
    (json.dumps({"messages": [*talk("a", "b")[:1], {**talk("a", "b")[1], "thinking": "hm"}]}), "with reasoning beside the answer"),
    (json.dumps({"messages": talk("a", "b"), "tools": [{"name": "x"}]}), "with tools"),
    (json.dumps({"messages": [{"role": "system", "content": "x"}, *talk("a", "b")], "system": "y"}), "with a system column that disagrees"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_row_stops_with_its_line_or_is_dropped_and_counted(tmp_path, tokenizer, line, reason):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"question": "Why?", "answer": "So.", "id": 7})
    path.write_text("\n".join([good, good, line, good, line]))
    dropped = feed(path, SFT(), tokenizer, bad_rows="drop")
    (source,) = dropped.sources()
    assert source["dropped"] == {reason: 2} and source["examples"] == 5 and source["unit"] == "conversations"
    assert source["first"][reason].startswith(f"{path} line 3") and source["unread"] == ["id"]
    assert f"2 dropped (2 {reason})" in dropped.report() and "not read by this stage: id" in dropped.report()
    if REASONS.index(reason) > REASONS.index("whose marks leave no turn to learn"):
        with pytest.raises(UserError, match=r"a\.jsonl line 3.*; bad_rows drop leaves such rows out, counted$"):
            feed(path, SFT(), tokenizer)
    path.write_text("\n".join([line, line]))
    with pytest.raises(UserError, match="none of 2 conversations is left to train on: 2 "):
        feed(path, SFT(), tokenizer, bad_rows="drop")


def test_marks_of_turns_take_them_out_of_the_loss(tmp_path, tokenizer):
    def learnt(marks, **objective):
        turns = [turn | mark for turn, mark in zip([*talk("a", "WRONG"), *talk("c", "right")], marks, strict=True)]
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
        batch = feed(tmp_path / "a.jsonl", SFT(**objective), tokenizer).batch(0)
        return tokenizer.decode(batch.tokens[0][batch.weights[0] > 0].tolist(), specials=True)

    for mark in ({"weight": 0}, {"train": False}, {"loss": 0.0}, {"train": "false"}):
        assert learnt([{}, mark, {}, {"weight": 1, "train": True}]) == "right<|im_end|>"
    everything = "user\na<|im_end|>\n<|im_start|>assistant\nWRONG<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    everything += "<|im_start|>assistant\nright<|im_end|>\n"
    assert learnt([{}] * 4, loss_on="all") == everything
    assert learnt([{}, {"train": 0}, {}, {}], loss_on="all") == everything.replace(
        "<|im_start|>assistant\nWRONG<|im_end|>\n", ""
    )
    assert learnt([{}] * 4, learn_end=False) == "WRONGright"
    with pytest.raises(UserError, match="line 1, turn 1: train asks for loss on a user turn"):
        learnt([{"train": True}, {}, {}, {}])


def test_loss_on_all_learns_from_prompts_that_answers_do_not_fit_behind(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk("word " * 200, "never seen")}))
    tally = feed(tmp_path / "a.jsonl", SFT(loss_on="all"), tokenizer).supplies[0].tally
    assert (tally.examples, tally.tokens, tally.trained, tally.truncated) == (1, 64, 63, 1) and tally.lost > 100


def test_columns_are_read_under_the_names_that_a_field_gives(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text('ask,"reply",prompt\n"Why,\nso?",3,x\nHow?,4,y\n')
    made = feed(path, SFT(), tokenizer, columns=("prompt=ask", "completion=reply"))
    rows, _ = select(Source(str(path), holdout=0.0, columns=("prompt=ask", "completion=reply")), "train")
    assert [chat.training_messages(row, "here")[0]["content"] for row in rows] == ["Why,\nso?", "How?"]
    assert rows.where(1) == f"{path} line 4" and "2 conversations" in made.report()
    with pytest.raises(
        UserError, match="columns names 'asks', which no row has; the columns found are ask, reply, prompt"
    ):
        feed(path, SFT(), tokenizer, columns=("prompt=asks",))
    for wrong in (("prompt",), ("prompt=ask", "prompt=reply"), ("a=ask", "b=ask"), ("=x",), ("x=",)):
        with pytest.raises(UserError, match="it has ours=theirs"):
            feed(path, SFT(), tokenizer, columns=wrong)


def test_tables_and_lists_are_read_with_their_lines(tmp_path, tokenizer):
    rows = [{"question": "a\nb", "answer": 'say "c"'}, {"question": "d", "answer": "e"}]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows, "version": 2}))
    (tmp_path / "b.csv").write_bytes('\ufeffquestion,answer\r\n"a\nb","say ""c"""\r\n\r\nd,e\r\n'.encode())
    (tmp_path / "c.tsv").write_text('question\tanswer\n"a\nb"\t"say ""c"""\nd\te')
    for name in ("a.json", "b.csv", "c.tsv"):
        assert list(load_rows(str(tmp_path / name))) == rows
    (tmp_path / "pandas.csv").write_text(",question,answer\n0,d,e\n")
    assert list(load_rows(str(tmp_path / "pandas.csv"))) == [{"column 1": "0", **rows[1]}]
    (tmp_path / "d.csv").write_text("question,answer\na,b\nc\n")
    with pytest.raises(UserError, match=r"d\.csv line 3: 1 fields, and the header has 2"):
        feed(tmp_path / "d.csv", SFT(), tokenizer)
    assert feed(tmp_path / "d.csv", SFT(), tokenizer, bad_rows="drop").sources()[0]["dropped"] == {
        "with other fields than the header of the file": 1
    }
    for name, content, words in (
        ("e.csv", "a;b\n1;2\n", "the header has no ','"),
        ("f.csv", "a,a\n1,2\n", "the column 'a' twice"),
        ("g.json", '{"a": 1}', "a .json source is a list of objects"),
        ("h.json", '{"text": "a"} {"text": "b"}\n', r"not valid JSON \(Extra data"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=words):
            load_rows(str(tmp_path / name))


def offsets(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


@pytest.mark.parametrize(
    ("was", "damaged", "told"),
    [
        (offsets(0, 2, 4, 6), offsets(0, 2, 4, 1 << 24), "not a whole arrow file"),  # of the lists of turns
        (
            offsets(0, 4, 13, 17, 26, 30, 39),
            offsets(0, 4, 13, 17, 26, 30, -1),
            "not a whole arrow file",
        ),  # of their roles
        (b"messages", b"messag\x9cs", "its columns have names that cannot be read"),
        (b"content", b"conten\x9c", "its columns have names that cannot be read"),
    ],
)
def test_an_arrow_file_of_other_offsets_or_names_is_refused_in_a_line(tmp_path, was, damaged, told):
    """Reading at such offsets would end the process."""
    table = pyarrow.Table.from_pylist([{"messages": talk("a", "b")} for _ in range(3)])
    stream = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    content = stream.getvalue().to_pybytes()
    assert was in content
    (tmp_path / "a.arrow").write_bytes(content.replace(was, damaged))
    with pytest.raises(UserError, match=told):
        load_rows(str(tmp_path / "a.arrow"))


def test_tools_that_are_no_definitions_are_named_as_not_read():
    texts = ("search, calculator", "", "null", "[]", None)
    found = [list(unread_columns({"messages": [], "tools": text}, "conversations")) for text in texts]
    assert found == [["tools"], [], [], [], []]


def test_columns_that_no_stage_reads_cannot_refuse_a_row(tmp_path, tokenizer):
    deep = "[" * 50_000 + "]" * 50_000
    odd = ["NaN", "1e400", '{"x": 1, "x": 2}', '1, "meta": 2', "9" * 5_000, deep, '"\\ud800"', '{"a": {"b": null}}']
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "so", "meta": {value}}}\n' for value in odd))
    (tmp_path / "b.jsonl").write_bytes('{"text": "a\u2028b", "x": 1}\r\n\r\n'.encode())
    assert feed(tmp_path / "a.jsonl", Pretrain(), tokenizer).sources()[0]["examples"] == 8
    assert load_rows(str(tmp_path / "b.jsonl"))[0]["text"] == "a\u2028b"
    table = pyarrow.table(
        {"text": ["a", "b"], "when": pyarrow.array([2**62, 0], pyarrow.timestamp("us")), "raw": [b"\xff", b""]}
    )
    parquet.write_table(table, tmp_path / "c.parquet")
    assert [row["text"] for row in load_rows(str(tmp_path / "c.parquet"))] == ["a", "b"]
    broken = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xffb")
    )
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet row 0: text cannot be read .*utf-8"):
        load_rows(str(tmp_path / "d.parquet"))
    assert feed(tmp_path / "d.parquet", Pretrain(), tokenizer, bad_rows="drop").sources()[0]["dropped"] == {
        "with a value that cannot be read": 1
    }


def test_numpy_and_null_margins_do_not_matter_to_those_who_do_not_read_them(tmp_path, tokenizer):
    rows = [
        {"prompt": None, "chosen": talk("a", "b"), "rejected": talk("a", "c"), "margin": m} for m in (-1, None, "x")
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = feed(tmp_path / "a.jsonl", DPO(), tokenizer).report()
    assert "3 pairs" in report and "0 dropped" in report and "not read by this stage: margin" in report
