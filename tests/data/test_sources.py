"""Sources read every format, say clearly what is wrong with a file, and split by content alone."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.curriculum import LENGTH
from lm.data.readers import _cut
from lm.data.selection import check_files, check_sources
from lm.data.sources import Rows, load_rows, split_rows
from lm.data.split import ALWAYS_TRAINED, split_key, split_place
from lm.experiment import Experiment, Pretrain, Source, Stage, UserError


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_comes_back_with_line_numbers(tmp_path, name):
    rows = [{"text": f"row {i} \u00e9"} for i in range(5)]
    loaded = load_rows(write_jsonl(tmp_path / name, rows))
    assert list(loaded) == rows and len(loaded) == 5 and loaded[1:3] == rows[1:3]
    assert loaded.where(2).endswith(f"{name} line 3")
    with pytest.raises(IndexError):
        loaded[5]


def test_blank_lines_do_not_shift_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert load_rows(str(path)).where(1).endswith("line 3")


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(load_rows(str(tmp_path / "rows.parquet"))) == rows
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="not a parquet file"):
        load_rows(str(tmp_path / "bad.parquet"))


def test_the_fingerprint_is_of_the_content(tmp_path):
    one = load_rows(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])).fingerprint
    same = load_rows(write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}])).fingerprint
    other = load_rows(write_jsonl(tmp_path / "c.jsonl", [{"text": "y"}])).fingerprint
    assert one == same != other
    assert (
        len({load_rows(f"gen:{name}").fingerprint for name in ("docs", "instruct", "arithmetic", "preferences")}) == 4
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "bad.jsonl line 2: not valid JSON"),
        (b'{"text": "a"}\n[1, 2]\n', r"bad.jsonl line 2: every line must be a JSON object, found \[1, 2\]"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "bad.jsonl line 2: not UTF-8 text"),
        (b"", "bad.jsonl: the file is empty"),
        (b"\n\n", "bad.jsonl: the file is empty"),
    ],
)
def test_bad_jsonl_is_told_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(str(path))


def test_half_a_gzip_file_is_told(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 10_000 + bytes(range(256)))
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    for name in ("half.jsonl.gz", "no.jsonl.gz"):
        with pytest.raises(UserError, match=f"{name}: not a whole gzip file"):
            load_rows(str(tmp_path / name))


def test_a_folder_is_its_files_one_after_another(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "2"}, {"text": "3"}])
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "deeper.txt").mkdir()
    rows = load_rows(str(tmp_path))
    assert [row["text"] for row in rows] == ["1", "2", "3"]
    assert rows.where(2) == f"{tmp_path}/b.jsonl line 2"
    before = rows.fingerprint
    (tmp_path / "a.txt").write_text("one")
    assert load_rows(str(tmp_path)).fingerprint != before
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"c\.jsonl line 1: not valid JSON"):
        load_rows(str(tmp_path))
    with pytest.raises(UserError, match=r"there is no \.txt.* file in this folder"):
        load_rows(str(tmp_path / "deeper.txt"))


def test_missing_and_unknown_sources_suggest_what_is_there(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"no such file; did you mean train\.jsonl"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="there is no folder"):
        load_rows(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(UserError, match="did you mean gen:arithmetic"):
        load_rows("gen:arithmetics")
    with pytest.raises(UserError, match="say which split"):
        load_rows("tfds:python_docs")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UserError, match=r"cannot read this kind of file; a source is \.txt, \.jsonl"):
        load_rows(str(tmp_path / "a.xlsx"))


LINES = st.lists(st.text(alphabet="abc d", max_size=40), max_size=60).map("\n".join)


@given(LINES)
def test_a_text_is_cut_into_documents_that_are_the_text_again(text):
    documents = list(_cut([text], 100))
    assert all(0 < len(document) <= 150 for document in documents)
    assert "".join(documents) == text


def test_a_text_file_is_cut_at_blank_lines_and_one_line_too(tmp_path):
    paragraphs = [f"Paragraph {i} " + "word " * 60 for i in range(100)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    rows = load_rows(str(tmp_path / "a.txt"))
    assert all(row["text"].startswith("Paragraph") and 2_500 < len(row["text"]) < 6_500 for row in rows[:-1])
    (tmp_path / "b.txt").write_text("word " * 10_000)
    assert len(load_rows(str(tmp_path / "b.txt"))) > 8
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(UserError, match="empty"):
        load_rows(str(tmp_path / "c.txt"))


def memory(rows):
    return Rows("memory", len(rows), rows.__getitem__, "", str)


def test_the_split_depends_on_the_example_alone():
    rows = [{"text": f"example {i}"} for i in range(2000)]
    shuffled = random.Random(0).sample(rows, 1500)
    sides = [split_rows(memory(some), 0.2) for some in (rows, shuffled)]
    held = [{some[i]["text"] for i in heldout} for some, (_, heldout) in zip((rows, shuffled), sides, strict=True)]
    assert held[1] == held[0] & {row["text"] for row in shuffled}
    assert sorted([*sides[0][0], *sides[0][1]]) == list(range(2000))
    assert 0.15 < len(sides[0][1]) / 2000 < 0.25
    assert set(split_rows(memory(rows), 0.1)[1]) <= set(sides[0][1])


def test_rows_that_share_a_key_or_a_prompt_are_on_one_side():
    rows = [{"text": str(i), "key": f"module {i // 4}"} for i in range(400)]
    _, heldout = split_rows(memory(rows), 0.3)
    assert {i // 4 for i in heldout} and all(4 * (i // 4) + j in set(heldout) for i in heldout for j in range(4))
    pair = {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}
    assert split_key(pair) == split_key({**pair, "chosen": "c"})
    assert split_key({"question": "1+1", "answer": "2"}) == split_key({"question": "1+1", "answer": "two"})
    assert split_key({"a": 1, "b": 2}) == split_key({"b": 2, "a": 1}) != split_key({"a": 1, "b": 3})


@pytest.mark.parametrize("none", [None, "", " ", float("nan")])  # as tables write a missing one
def test_a_null_key_is_no_key_and_one_key_is_never_held_out(none):
    rows = [{"text": str(i), "key": none} for i in range(100)]
    assert [split_key(row) for row in rows] == [split_key({"text": str(i)}) for i in range(100)]
    assert list(split_rows(memory(rows), 1.0)[0]) == []
    kept = [{"text": str(i), "key": ALWAYS_TRAINED} for i in range(100)]
    assert list(split_rows(memory(kept), 1.0)[0]) == list(range(100))


def test_split_place_is_pinned():
    assert abs(split_place("a key") - 0x8FA3AAB2FAA9B79E / 2**64) < 1e-15  # printf "a key" | sha256sum
    places = np.array([split_place(str(i)) for i in range(4000)])
    assert np.abs(np.histogram(places, bins=8, range=(0, 1))[0] / 500 - 1).max() < 0.2


def test_extreme_holdouts():
    rows = memory([{"text": str(i)} for i in range(10)])
    assert len(split_rows(rows, 0.0)[1]) == 0 and len(split_rows(rows, 1.0)[0]) == 0
    with pytest.raises(UserError, match=r"holdout is 1\.5"):
        split_rows(rows, 1.5)


@pytest.mark.parametrize("name", ["instruct", "arithmetic", "preferences"])
def test_generated_rows_split_without_end_and_without_leaks(name):
    rows = load_rows(f"gen:{name}")
    assert len(rows) == LENGTH
    train, heldout = split_rows(rows, 0.05)
    held = [rows[i]["key"] for i in heldout[:200]]
    assert len(held) == len(set(held)) > 100 and ALWAYS_TRAINED not in held
    assert not {rows[train[k]]["key"] for k in range(3000)} & set(held)
    assert train[len(train) - 1] < LENGTH
    assert len(split_rows(rows, 0.0)[1]) == 0


def test_what_is_no_file_is_refused_in_one_line_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    (tmp_path / "a.txt").write_text("a")
    address = str(tmp_path / "s.txt")
    unreadable = tmp_path / "memory.txt"  # a file by its kind, that no read succeeds on, as on a disk that fails
    unreadable.symlink_to("/proc/self/mem")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(address)
        for path, words in (
            (tmp_path / "fifo.jsonl", "is a FIFO, not a file"),
            (tmp_path / "loop.txt", "Too many levels of symbolic links"),
            (tmp_path / "zero.txt", "is a device, not a file"),
            (tmp_path / "gone.txt", "is a link to .*nothing.txt, which is not there"),
            (tmp_path / "a.txt" / "b.txt", "Not a directory"),
            (tmp_path / ("x" * 300 + ".txt"), "File name too long"),
            (address, "is a socket, not a file"),
            ("a\0b.txt", "null byte"),
            (unreadable, "Input/output error"),
            ("~nobody-of-this-name/a.txt", "home directory"),
            (" ", "empty path"),
            (tmp_path, "FIFO"),
        ):
            with pytest.raises(UserError, match=words) as raised:
                load_rows(str(path))
            assert "\n" not in str(raised.value)
            source = Source(str(path))
            stage = Stage("here", Pretrain(), (source,))
            with pytest.raises(UserError):
                check_sources(Experiment("x", (stage,)))
                check_files(Experiment("x", (stage,)))
                load_rows(str(path))


def test_a_folder_says_what_it_does_not_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "info.json").write_text("{}")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\26\7")
    (tmp_path / "more").mkdir()
    assert load_rows(str(tmp_path)).notes == ("1 file is read; not read: ._a.jsonl, README.md, info.json, more/",)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "info.json").write_text('[{"text": "y"}]')
    assert [row["text"] for row in load_rows(str(tmp_path))] == ["y"]
