"""Files are read in pieces: as if they were read whole, with memory that their size does not change."""

from __future__ import annotations

import functools
import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import readers, workers
from lm.data.cache import Cache
from lm.data.packing import pack
from lm.data.readers import _cut
from lm.data.sources import load_rows
from lm.data.split import split_key, split_place
from lm.data.tokens import store_of
from lm.experiment import UserError
from lm.stored import cache_at

PARAGRAPHS = [f"Paragraph {i} é " + "word " * (i % 300) for i in range(2_000)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_file_gives_the_documents_of_its_whole_text(tmp_path, end, mark, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 1_001)  # a block ends in the middle of letters and of line ends
    text = "\n\n".join(PARAGRAPHS) + "\n"
    (tmp_path / "a.txt").write_bytes((mark + text).replace("\n", end).encode())
    rows = load_rows(str(tmp_path / "a.txt"))
    assert [row["text"] for row in rows] == [one.strip("\r\n") for one in _cut([text], readers.DOCUMENT)]
    assert rows.where(3).endswith("a.txt row 3")


@given(st.lists(st.text(alphabet="ab \n\r", max_size=60), max_size=20))
def test_where_a_text_is_cut_does_not_depend_on_how_it_is_read(texts):
    assert list(_cut(texts, 20)) == list(_cut(["".join(texts)], 20))


def test_text_that_is_not_utf_8_is_told_with_its_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 7)
    (tmp_path / "a.txt").write_bytes("é".encode() * 10 + b"\xff and more")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text \(byte 20\)"):
        load_rows(str(tmp_path / "a.txt"))


def test_rows_are_found_by_their_place_in_pieces_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    monkeypatch.setattr(readers, "SPANS", 7)
    rows = [{"text": f"row {i} " * (i % 9), "key": str(i // 2)} for i in range(100)]
    lines = "\n".join(json.dumps(row) + "\n" * (number % 3) for number, row in enumerate(rows))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    with cache_at(tmp_path / "cache"):
        loaded = load_rows(str(tmp_path))
    assert list(loaded) == rows * 2
    numbers = [number for number, line in enumerate(lines.split("\n"), start=1) if line]
    for name, first in (("a.jsonl", 0), ("b.jsonl.gz", 100)):
        assert [loaded.where(first + i) for i in range(100)] == [f"{tmp_path}/{name} line {n}" for n in numbers]
    pieces = list(loaded.parts[0].pieces())
    assert (
        len(pieces) > 10
        and [piece.first for piece in pieces[1:]] == np.cumsum([len(p.spans) for p in pieces])[:-1].tolist()
    )
    places = loaded.parts[0].entry.array("places")
    assert places.tolist() == [split_place(split_key(row)) for row in rows]


def test_parquet_is_read_by_row_group(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet as parquet

    monkeypatch.setattr(readers, "COLUMNAR_ROWS", 3)
    monkeypatch.setattr(readers, "PIECE_BYTES", 1)
    rows = [{"text": f"row {i}"} for i in range(100)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=8)
    loaded = load_rows(str(tmp_path / "a.parquet"))
    assert list(loaded) == rows and loaded[97] == rows[97]
    assert [len(piece.spans) for piece in loaded.parts[0].pieces()] == [8] * 12 + [4]


@pytest.mark.slow
def test_processes_make_what_one_makes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(workers, "WORTH_BYTES", 0)
    monkeypatch.setattr(readers, "PIECE_BYTES", 10_000)
    for name in "ab":
        rows = [{"text": f"{name} {text}"} for text in PARAGRAPHS[:300]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []
    for count in (1, 2):
        monkeypatch.setattr(workers, "cores", lambda count=count: count)
        with cache_at(tmp_path / f"cache{count}"):
            store = store_of(load_rows(str(tmp_path)), "documents", tokenizer)
            made.append([store.column("tokens", number, 0, 10**6).tolist() for number in range(len(store))])
    assert made[0] == made[1] and len(made[0]) == 600


def test_what_is_wrong_with_a_row_comes_out_of_a_process_too(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "WORTH_BYTES", 0)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 50 + "[1]\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 51: every line must be a JSON object"):
        load_rows(str(tmp_path / "a.jsonl"))


def test_a_file_that_goes_while_it_is_in_use_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 5)
    rows = load_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl was removed while it was being read"):
        rows[2]


STREAMED = """
import resource, sys
from pathlib import Path
from lm.data import workers
from lm.stored import cache_at
from lm.data.sources import load_rows, split_rows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

workers.cores = lambda: 1
folder = Path(sys.argv[1])
with cache_at(folder / "cache"):
    load_rows(str(folder / f"small.{sys.argv[2]}"))
    before = peak()
    rows = load_rows(str(folder / f"large.{sys.argv[2]}"))
    train, heldout = split_rows(rows, 0.1)
    assert all(rows[index]["text"] for index in train[::50])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """Of a hundred megabytes of text no more than a few are in memory, once what reads has its own."""
    for name, times in (("small", 1), ("large", 25)):
        lines = [json.dumps({"text": f"{i} " + "words " * 650}) for i in range(1_000)]
        text = "\n".join(line[10:-2] + "\n" if kind == "txt" else line for line in lines).encode() + b"\n"
        opener = functools.partial(gzip.open, compresslevel=1) if kind.endswith("gz") else open
        with opener(tmp_path / f"{name}.{kind}", "wb") as stream:
            for _ in range(times):
                stream.write(text)
    ran = subprocess.run(
        [sys.executable, "-c", STREAMED, str(tmp_path), kind], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 25e6


def slow_pack(lengths, seq_len, open_rows):
    """The definition, row by row."""
    rows, room = [], {}
    for example, length in enumerate(lengths):
        best = min((row for row, left in room.items() if left >= length), key=room.__getitem__, default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            room[best] = seq_len
        rows[best].append(example)
        room[best] -= length
        if len(room) > open_rows:
            del room[min(room, key=room.__getitem__)]
    return rows


@given(st.lists(st.integers(1, 20), max_size=120), st.integers(1, 8))
def test_packing_is_what_its_definition_says(lengths, open_rows):
    assert pack(lengths, 20, open_rows) == slow_pack(lengths, 20, open_rows)


def test_the_cache_of_a_copy_is_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    with cache_at(tmp_path / "cache"):
        one, two = (load_rows(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert one.parts[0].entry.folder == two.parts[0].entry.folder
    assert one.where(0).endswith("a.jsonl line 1") and two.where(0).endswith("b.jsonl line 1")
    assert Cache(tmp_path / "cache").folder == one.parts[0].entry.folder.parent
