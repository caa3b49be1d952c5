"""The file of choices: it only grows, one process holds it, and what is cut is dropped with a word."""

import errno
import json
import os
import random
import signal
import subprocess
import sys

import pytest

from lm.choices import log as log_module
from lm.choices.desk import standing
from lm.choices.log import CLOCKS, open_log, read_log
from lm.experiment import UserError

CHOICE = {
    "kind": "choice", "annotator": "Ann", "pair": "p", "choice": "left", "prompt": "é\u2028?", "left": {"answer": "1"},
    "right": {"answer": "2"},
}  # fmt: skip


def filled(path, count: int = 3) -> bytes:
    with open_log(path) as log:
        for _ in range(count):
            log.append(CHOICE)
    return path.read_bytes()


def test_what_is_appended_is_read_again_and_numbered_on(tmp_path):
    path = tmp_path / "new" / "labels.jsonl"
    filled(path)
    with open_log(path) as log:
        assert [record["id"] for record in log.records] == [1, 2, 3] and not log.remark
        assert log.append({"kind": "undo", "annotator": "Ann", "of": 3})["id"] == 4
    assert read_log(path).records == log.records
    assert log.records[0] == {"id": 1, **CHOICE}


def test_a_line_that_was_cut_anywhere_is_dropped_with_a_message_and_all_others_are_kept(tmp_path):
    path = tmp_path / "labels.jsonl"
    content = filled(path)
    start = content[:-1].rindex(b"\n") + 1
    for size in (start + 1, start + 20, len(content) - 2):
        path.write_bytes(content[:size])
        assert len(read_log(path).records) == 2 and path.stat().st_size == size, "reading changes nothing"
        with open_log(path) as log:
            assert "line 3 was cut" in log.remark and str(path) in log.remark
            assert log.append(CHOICE)["id"] == 3
        assert path.read_bytes() == content


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "labels.jsonl"
    content = filled(path)
    path.write_bytes(content[:-1])
    with open_log(path) as log:
        assert len(log.records) == 3 and not log.remark
        log.append(CHOICE)
    assert path.read_bytes().startswith(content) and len(read_log(path).records) == 4


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b'{"id": 7}\n', b'{"kind": "choice", "id": 1}\n'])
def test_a_broken_line_that_is_not_the_last_is_named(tmp_path, line):
    path = tmp_path / "labels.jsonl"
    content = filled(path)
    path.write_bytes(content + line + content)
    with pytest.raises(UserError, match=r"labels.jsonl line 4 is not a record"), open_log(path):
        pass
    assert path.read_bytes() == content + line + content


@pytest.mark.parametrize(
    "wrong",
    [
        {"right": {"answer": None}}, {"right": None}, {"left": {"answer": 5}}, {"prompt": None}, {"prompt": []},
        {"left": {"answer": [{"role": "assistant"}]}}, {"choice": "lefty"}, {"choice": ["left"]}, {"strength": 2.0},
        {"strength": True}, {"annotator": ""}, {"pair": 3}, {"id": 1.0}, {"id": True}, {"seconds": float("nan")},
        {"left": {"answer": "1", "source": 3}}, {"comment": 3},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_not_be_read_is_not_written_and_is_named_where_it_stands(tmp_path, wrong):
    path = tmp_path / "labels.jsonl"
    content = filled(path, 1)
    with open_log(path) as log, pytest.raises(UserError, match=f"cannot be recorded: {next(iter(wrong))} is"):
        log.append({**CHOICE, **wrong})
    assert path.read_bytes() == content
    if wrong in ({"strength": 2.0}, {"id": 1.0}):
        return
    path.write_bytes(content + json.dumps({"id": 2, **CHOICE, **wrong}).encode() + b"\n")
    with pytest.raises(UserError, match=rf"line 2 is not a record of a choice \({next(iter(wrong))} is"):
        read_log(path)


def test_a_flipped_bit_changes_no_choice_in_silence(tmp_path):
    """Clocks are not sealed, so that the same choices are the same lines but for them."""
    path, draw = tmp_path / "labels.jsonl", random.Random(0)
    whole = filled(path, 2)
    kept = [{name: record[name] for name in record if name not in CLOCKS} for record in read_log(path).records]
    told = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            found = read_log(path)
            ours = [
                {name: record.get(name) for name in intact} for record, intact in zip(found.records, kept, strict=False)
            ]
            assert ours == kept or found.remark
        except UserError as error:
            told += "does not match its crc32" in str(error)
    assert told > len(whole) / 4


def test_whole_numbers_that_an_earlier_version_took_as_fractions_are_read(tmp_path):
    path = tmp_path / "labels.jsonl"
    filled(path, 1)
    older = [{"id": 2, **CHOICE, "strength": 1.0}, {"id": 3, "kind": "undo", "annotator": "Ann", "of": 2.0}]
    with path.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in older)
    with open_log(path) as log:
        assert [type(log.records[1]["strength"]), type(log.records[2]["of"])] == [int, int]
        assert standing(log.records) == log.records[:1] and log.append(CHOICE)["id"] == 4


def test_odd_files_are_refused_in_a_line(tmp_path):
    path = tmp_path / "labels.jsonl"
    content = filled(path, 1)
    path.write_bytes(content + content)
    with pytest.raises(UserError, match="line 2 has the id 1 of an earlier line"):
        read_log(path)
    path.write_bytes(content + b"[" * 100_000 + b"\n" + content)
    with pytest.raises(UserError, match="line 2 is not a record of a choice"):
        read_log(path)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="is not a file"), open_log(odd):
            pass


def test_a_second_holder_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    path = tmp_path / "labels.jsonl"
    hold = f"with open_log(Path({str(path)!r})): print(1, flush=True); time.sleep(60)"
    code = f"import time\nfrom pathlib import Path\nfrom lm.choices.log import open_log\n{hold}"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match=r"labels.jsonl is in use by another `lm label`.*--labels FILE"), open_log(path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with open_log(path) as log:
        assert log.records == []


def test_a_choice_that_the_disk_refuses_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "labels.jsonl"
    content = filled(path)
    real = os.pwrite

    def half(handle, data, at):
        if len(data) < 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[: len(data) // 2], at)

    with open_log(path) as log:
        with monkeypatch.context() as patch:
            patch.setattr(log_module.os, "pwrite", half)
            with pytest.raises(OSError, match="No space left"):
                log.append(CHOICE)
        assert path.read_bytes() == content and len(log.records) == 3
        log.append(CHOICE)
    assert len(read_log(path).records) == 4


def test_every_record_waits_for_the_disk(tmp_path, monkeypatch):
    """The bytes are in the file when it is synced, and it is synced before `append` returns."""
    path, synced = tmp_path / "labels.jsonl", []
    real = os.fsync

    def fsync(handle):
        synced.append(os.fstat(handle).st_size)
        real(handle)

    with open_log(path) as log:
        monkeypatch.setattr(log_module.os, "fsync", fsync)
        for _ in range(3):
            log.append(CHOICE)
            assert synced[-1] == path.stat().st_size
    assert len(synced) == 3
