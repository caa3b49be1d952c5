"""An entry of the cache is whole or not there, follows what it is made of, and is made once by whoever comes first."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lm.data import cache as caches
from lm.data.cache import Cache
from lm.data.pipeline import make_feed
from lm.data.python_docs import documents
from lm.data.sources import load_rows
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import Pretrain, Source, Stage, UserError
from lm.stored import cache_at, sealed, unsealed

BUILDER = """
import sys
from pathlib import Path
import numpy as np
from lm.data.cache import Cache

def build(writer):
    writer.append("numbers", np.arange(1000))
    print("begun", flush=True)
    sys.stdin.readline()
    print("made", flush=True)

entry = Cache(Path(sys.argv[1])).entry("test", {"a": 1}, build, "numbers")
print(int(entry.array("numbers").sum()), flush=True)
"""


def start(folder: Path, stdin: int = subprocess.PIPE) -> subprocess.Popen:
    """A process that builds an entry, and goes on with it when it reads a line or stdin ends."""
    command = [sys.executable, "-c", BUILDER, str(folder)]
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def thousand(writer):
    writer.append("numbers", np.arange(1000))


def refuse(writer):
    raise AssertionError("it is there already")


def test_an_entry_is_made_once_and_read_by_others(tmp_path):
    made = Cache(tmp_path).entry("test", {"a": 1}, thousand, "numbers")
    again = Cache(tmp_path).entry("test", {"a": 1}, refuse, "numbers")
    for entry in (made, again):
        assert entry.array("numbers").tolist() == list(range(1000)) == entry.span("numbers", 0, 1000).tolist()
        assert entry.span("numbers", 10, 13).tolist() == [10, 11, 12]
    with pytest.raises(AssertionError, match="already"):
        Cache(tmp_path).entry("test", {"a": 2}, refuse, "numbers")
    left = [path.name for path in tmp_path.iterdir() if path.name.endswith((".draft", ".lock"))]
    assert not left


def damage_by_cutting(file: Path):
    os.truncate(file, file.stat().st_size - 8)


def damage_by_a_bit(file: Path):
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    time.sleep(0.02)  # a later time of change, by the clock of any file system
    file.write_bytes(data)


def damage_as_a_disk_does(file: Path):
    """A bit that rots changes no time; what another process has verified before says nothing."""
    damage_by_a_bit(file)
    caches._verified[file.parent] = caches._verified[file.parent] if file.name == caches.MANIFEST else []


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_a_bit, damage_as_a_disk_does, Path.unlink])
def test_a_damaged_entry_is_told_and_made_anew(tmp_path, capsys, damage):
    entry = Cache(tmp_path).entry("test", {"a": 1}, thousand, "numbers")
    damage(entry.path("numbers"))
    assert Cache(tmp_path).entry("test", {"a": 1}, thousand, "numbers").array("numbers").sum() == 499_500
    said = capsys.readouterr().err
    assert said.splitlines() == [f"lm: {entry.path('numbers')} is damaged: rebuilding it"]
    manifest = entry.folder / "manifest.json"
    whole = manifest.read_text()
    for change in (
        lambda: manifest.write_text('{"files"'),
        lambda: manifest.write_text(whole.replace("1000", "0997")),
        lambda: manifest.write_text(whole.replace('"shape"', '"shapf"')),
        lambda: manifest.write_text("[" * 100_000),
        manifest.unlink,
    ):
        change()
        assert Cache(tmp_path).entry("test", {"a": 1}, thousand, "numbers").length("numbers") == 1000
        assert "manifest.json is damaged" in capsys.readouterr().err and manifest.read_text() == whole


def test_a_killed_build_leaves_nothing_that_counts(tmp_path):
    process = start(tmp_path)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".draft")]
    began = time.monotonic()
    entry = Cache(tmp_path).entry("test", {"a": 1}, thousand, "numbers")
    assert entry.array("numbers").sum() == 499_500
    assert time.monotonic() - began < 30  # the lock ended with its process
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".draft", ".lock"))]


def test_two_builders_at_once_give_one_entry_and_one_says_that_it_waits(tmp_path):
    first = start(tmp_path)
    assert first.stdout.readline() == "begun\n"
    second = start(tmp_path, subprocess.DEVNULL)  # if it does not wait, it builds the entry at once
    said = second.stderr.readline()
    (made, _), (waited, _) = first.communicate("\n"), second.communicate()
    assert made.split() == ["made", "499500"] and waited.split() == ["499500"]
    assert f"numbers: waiting for process {first.pid} on " in said
    assert len(list(tmp_path.glob("test-*"))) == 1


def test_a_lock_file_of_a_process_that_was_killed_stops_nobody(tmp_path):
    entry = Cache(tmp_path / "one").entry("test", {"a": 1}, thousand, "numbers")
    (tmp_path / "two").mkdir()
    lock = tmp_path / "two" / f"{entry.folder.name}.lock"
    lock.write_text("process 1 on another")
    draft = tmp_path / "two" / f"{entry.folder.name}.0123abcd-1.abcd.draft"
    draft.mkdir()
    assert Cache(tmp_path / "two").entry("test", {"a": 1}, thousand, "numbers").array("numbers").sum() == 499_500
    assert not lock.exists() and not draft.exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_without_file_locks_an_entry_is_built_and_a_line_says_so(code, tmp_path, monkeypatch, capsys):
    def no_locks(handle, how):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert Cache(tmp_path).entry("test", {"a": 1}, thousand, "numbers").array("numbers").sum() == 499_500
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"numbers: {tmp_path} has no file locks: processes may build it at the same time"


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(writer):
        thousand(writer)
        raise UserError("line 3 is broken")

    with pytest.raises(UserError, match="line 3"):
        Cache(tmp_path).entry("test", {"a": 1}, fail, "numbers")
    assert not list(tmp_path.iterdir())


def test_checksums_are_taken_once_of_files_that_have_settled(tmp_path, monkeypatch):
    file, cache = tmp_path / "a", Cache(tmp_path / "cache")
    file.write_text("one")
    one = cache.digest(file)
    assert not list((tmp_path / "cache").glob("checksums/*"))  # it may change again within the same tick of the clock
    monkeypatch.setattr(caches, "SETTLED_SECONDS", -1.0)
    assert cache.digest(file) == one
    with monkeypatch.context() as patch:
        patch.setattr(caches.hashlib, "file_digest", None)  # it is not read again
        assert cache.digest(file) == one
    time.sleep(0.02)
    stamps = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text("two")
    os.utime(file, ns=stamps)  # of the same size, inode and time of change: the inode's own time tells
    two = cache.digest(file)
    assert two != one
    (record,) = (tmp_path / "cache").glob("checksums/*.json")
    record.write_text(record.read_text().replace(two[:8], one[:8]))
    assert cache.digest(file) == two


def test_drafts_of_processes_that_have_ended_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    cache, entry = Cache(tmp_path), Cache(tmp_path).entry("test", {"a": 1}, thousand, "numbers")
    host, _, _ = caches._here().partition("-")
    (tmp_path / "checksums").mkdir(exist_ok=True)
    for gone, process in ((True, dead.pid), (False, os.getpid())):
        (tmp_path / f"{'gone' if gone else 'kept'}.{host}-{process}.abcd.draft").mkdir()
        (tmp_path / "checksums" / f"{'gone' if gone else 'kept'}.json.{host}-{process}.abcd.draft").write_text("")
    old, foreign = tmp_path / "gone.draft", tmp_path / "kept.0123abcd-1.abcd.draft"
    old.mkdir()
    foreign.mkdir()
    os.utime(old, (1e9, 1e9))
    cache.sweep()
    left = sorted(path.name for path in tmp_path.rglob("*") if path.name.endswith((".draft", ".lock")))
    assert len(left) == 3 and all(name.startswith("kept") for name in left)
    assert entry.array("numbers").sum() == 499_500


def stage(path) -> Stage:
    return Stage("here", Pretrain(), (Source(str(path), holdout=0.1),), batch_size=2, seq_len=64)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * 30}) + "\n" for i in range(60)))
    return path


def entries(folder: Path, kind: str) -> set[str]:
    return {path.name for path in folder.glob(f"{kind}-*")}


def test_runs_share_the_tokens_and_another_source_or_tokenizer_has_its_own(tmp_path, text, tokenizer):
    other = SubwordTokenizer.train([row["text"] for row in documents()[:20]], 400)
    with cache_at(tmp_path / "cache"):
        one = make_feed(stage(text), tokenizer, 0)
        for seed, split in ((1, "train"), (0, "heldout")):
            make_feed(stage(text), tokenizer, seed, split)
        first = entries(tmp_path / "cache", "tokens")
        assert len(first) == 1
        assert (make_feed(stage(text), other, 0).batch(0).tokens < 400).all()
        assert len(entries(tmp_path / "cache", "tokens")) == 2
        text.write_text(text.read_text().replace("document 5 ", "paper 5 "))
        changed = make_feed(stage(text), tokenizer, 0)
        assert len(entries(tmp_path / "cache", "tokens")) == 3
    assert changed.fingerprint != one.fingerprint
    seen = "".join(tokenizer.decode(changed.batch(step).tokens.ravel()) for step in range(200))
    assert "paper 5 paper 5 " in seen and "document 5 document 5 " not in seen


def test_a_cache_that_may_only_be_read_serves_what_it_has(tmp_path, text, tokenizer, small_disk):
    with cache_at(small_disk / "cache"):
        expected = make_feed(stage(text), tokenizer, 0).batch(3).tokens
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        np.testing.assert_array_equal(make_feed(stage(text), tokenizer, 0).batch(3).tokens, expected)
        text.write_text('{"text": "new"}\n' * 9)
        with pytest.raises(UserError, match=r"cache .* cannot be written: Read-only file system.*--cache DIR"):
            load_rows(str(text))
    caches._mapped.cache_clear()  # or the disk is busy


def test_a_full_disk_is_told_and_what_was_begun_is_removed(tmp_path, small_disk):
    def too_much(writer):
        for _ in range(10):
            writer.append("numbers", np.zeros(1 << 17))

    with pytest.raises(UserError, match=r"cache .* cannot be written: No space left on device.*--cache DIR"):
        Cache(small_disk / "cache").entry("test", {"a": 1}, too_much, "numbers")
    assert not list((small_disk / "cache").iterdir())
    assert Cache(small_disk / "cache").entry("test", {"a": 1}, thousand, "numbers").length("numbers") == 1000


NUMBERS = {"dtype": "<i8", "shape": [9], "bytes": 72}


@pytest.mark.parametrize(
    "change",
    [
        {"files": 5},
        {"files": {}},
        {"files": {"numbers": 5}},
        {"files": {"numbers": NUMBERS}},
        {"files": {"numbers": {"dtype": "nope"}}},
        {"numbers": {"shape": [8]}},
        {"numbers": {"shape": []}},
        {"numbers": {"bytes": 72.0}},
        {"numbers": {"sha256": None}},
        {"made_of": {"another": 1}},
        {"version": 1},
    ],
    ids=str,
)
def test_a_manifest_of_another_program_is_damaged_whatever_its_seal(tmp_path, change, capsys):
    cache = Cache(tmp_path)

    def entry():
        return cache.entry("test", {}, lambda writer: writer.append("numbers", np.arange(9)), "numbers")

    manifest = entry().folder / "manifest.json"
    content = unsealed(json.loads(manifest.read_bytes()))
    numbers = content["files"]["numbers"] | change.pop("numbers", {})
    manifest.write_text(json.dumps(sealed(content | {"files": {"numbers": numbers}} | change)))
    assert entry().array("numbers").tolist() == list(range(9))
    assert "manifest.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [{"dtype": "<f8"}, {"dtype": "<u8"}, {"shape": [3, 3]}, {"dtype": "<i4", "shape": [18]}], ids=str
)
def test_an_array_is_never_read_as_another_of_the_same_size(tmp_path, other, capsys):
    cache = Cache(tmp_path)

    def entry():
        return cache.entry("test", {}, lambda writer: writer.append("numbers", np.arange(9)), "numbers")

    manifest = entry().folder / "manifest.json"
    content = unsealed(json.loads(manifest.read_bytes()))
    forged = content["files"] | {"numbers": content["files"]["numbers"] | other}
    manifest.write_text(json.dumps(sealed(content | {"files": forged})))
    assert entry().array("numbers").tolist() == list(range(9))
    assert "numbers is damaged: rebuilding it" in capsys.readouterr().err


def test_an_entry_without_an_array_that_is_read_is_told_in_one_line(tmp_path):
    entry = Cache(tmp_path).entry("test", {}, lambda writer: writer.append("numbers", np.arange(9)), "numbers")
    for read in (entry.array, entry.length, lambda name: entry.span(name, 0, 1)):
        with pytest.raises(UserError, match=r"manifest\.json has no array 'letters': remove .*test-"):
            read("letters")
