"""Lines are whole, valid and consistent with the step that a run goes on from; progress says where it stands."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import rich
from rich.console import Console

from lm.experiment import UserError
from lm.json_lines import JsonLines, checksums, read_json_lines, rewrite_json_lines
from lm.train.metrics import MetricsLog, Progress, json_value, peak_memory_mb, read_lines

ROOT = Path(__file__).resolve().parents[2]


def steps_of(folder, kind="metrics") -> list[int]:
    return [line["step"] for line in read_lines(folder / f"{kind}.jsonl")]


def test_lines_come_back_and_are_there_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path)
    log.metrics({"step": 1, "loss": jnp.float32(0.5), "count": np.int64(3)})
    log.sample({"kind": "prompt", "step": 1, "when": "during", "answer": "zwei\nZeilen ✓", "eos": True})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "count": 3}]
    assert read_lines(tmp_path / "samples.jsonl")[0]["answer"] == "zwei\nZeilen ✓"
    log.close()


def test_what_is_not_finite_is_null_and_the_line_valid_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.metrics({"step": 1, "loss": float("nan"), "norm": jnp.inf, "nested": [np.float32("-inf"), {"x": jnp.nan}]})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {"step": 1, "loss": None, "norm": None, "nested": [None, {"x": None}]}


def test_plain_turns_arrays_into_lists():
    assert json_value({"a": np.arange(3), 1: (jnp.bfloat16(0.5), True)}) == {"a": [0, 1, 2], "1": [0.5, True]}


def test_rewind_forgets_later_lines_in_every_file_and_appends_after_them(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.metrics({"step": step, "loss": 1.0})
        for step in (0, 2, 4):
            log.evaluation({"step": step, "when": "during", "eval": "held_out", "reward": 0.5})
            log.sample({"step": step, "kind": "prompt", "when": "during"})
    with MetricsLog(tmp_path) as log:
        log.rewind(3)
        assert steps_of(tmp_path) == [1, 2, 3]
        log.metrics({"step": 4, "loss": 2.0})
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert steps_of(tmp_path, "eval") == steps_of(tmp_path, "samples") == [0, 2]


def test_a_cut_last_line_is_dropped_by_reading_rewinding_and_appending(tmp_path):
    file = tmp_path / "metrics.jsonl"
    cut = '{"step": 1, "loss": 1.0}\n{"step": 2, "lo'
    file.write_text(cut)
    assert steps_of(tmp_path) == [1]
    with MetricsLog(tmp_path) as log:
        log.metrics({"step": 2, "loss": 0.5})
    assert steps_of(tmp_path) == [1, 2]
    checksums(file).unlink()
    file.write_text(cut)
    with MetricsLog(tmp_path) as log:
        log.rewind(9)
    assert file.read_text() == '{"step": 1, "loss": 1.0}\n' and checksums(file).read_bytes().count(b"\n") == 1


def test_a_cut_line_that_is_valid_by_chance_does_not_count(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("broken", ['{"step": 1,', "[1]", '{"loss": 1}', ""])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=rf"{file}:2 "):
        read_lines(file)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda raw: raw.replace(b"1.5", b"1.7"), 2),
        (lambda raw: raw[: raw.index(b"1.5")], 2),
        (lambda raw: raw[: raw.rindex(b"{")], 3),
        (lambda raw: b"", 1),
    ],
)
def test_a_line_that_is_not_what_was_written_or_gone_is_named(tmp_path, damage, line):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.metrics({"step": step, "loss": step - 0.5})
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    for read in (lambda: read_lines(file), lambda: MetricsLog(tmp_path).rewind(3)):
        with pytest.raises(UserError, match=rf"{file}:{line} (does not match its checksum|is gone)"):
            read()
    file.unlink()
    with pytest.raises(UserError, match=rf"{file}:1 is gone"):
        MetricsLog(tmp_path).rewind(3)


def test_a_kill_between_a_line_and_its_checksum_loses_nothing(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = JsonLines(file)
    lines.append([b'{"step": 1}', b'{"step": 2}'])
    lines.close()
    sums = checksums(file).read_bytes()
    for left in (sums[:9], sums[:13], b""):
        checksums(file).write_bytes(left)
        assert steps_of(tmp_path) == [1, 2]
        JsonLines(file).close()
        assert checksums(file).read_bytes() == sums
    file.unlink()
    checksums(file).write_bytes(b"")
    MetricsLog(tmp_path).rewind(3)
    assert steps_of(tmp_path) == []
    rewrite_json_lines(file, [b'{"step": 9}'])
    assert read_json_lines(file) == [(b'{"step": 9}', {"step": 9})]


def test_the_steps_must_be_all_up_to_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 3):
            log.metrics({"step": step})
        with pytest.raises(UserError, match="step 2 is missing"):
            log.check_steps(3)


def test_no_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_a_killed_writer_leaves_every_line_that_it_wrote(tmp_path):
    code = """
import os, signal, sys
from lm.train.metrics import MetricsLog
log = MetricsLog(sys.argv[1])
for step in range(50):
    log.sample({"step": step, "kind": "prompt", "when": "during", "text": "x" * 20_000})
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=300)
    assert run.returncode == -signal.SIGKILL
    assert steps_of(tmp_path, "samples") == list(range(50))


def test_a_refused_write_is_one_clear_line(tmp_path):
    log = MetricsLog(tmp_path)
    log.sample({"step": 1})
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._files["samples"]._lines.fileno())
    with pytest.raises(UserError, match=r"samples\.jsonl cannot be written: No space left on device"):
        log.sample({"step": 2})
    log.close()


def test_reading_lines_loads_nothing_slow():
    code = "import sys, lm.train.metrics, lm.train.run_folder; print({'jax', 'orbax'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "set()", run.stderr


def test_plain_progress_shows_the_first_and_last_step_and_where_it_stands(capsys):
    progress = Progress("sft", total=4)
    for step in range(1, 5):
        time.sleep(0.02)
        progress.update(step, {"loss": 1.23456, "reward": 0.5, "lr": 1e-3}, tokens=100)
    progress.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("sft  step 1/4  loss 1.235  reward 0.5  ") and "? left" in first
    assert last.startswith("sft  step 4/4") and "tokens/s" in last and "0:00 left" in last


def test_a_terminal_of_80_columns_shows_stage_step_and_time_left(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=written, width=80, force_terminal=True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress("preference", total=2000)
    progress.update(1, {"loss": 0.6931}, tokens=4096)
    progress.update(1500, {"loss": 0.6931, "reward": 0.5, "reward_accuracy": 0.625}, tokens=4096)
    progress.close()
    last = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue()).strip())[-1]
    assert len(last) <= 80 and re.match(r"preference +1500/2000 0:00 left  loss 0\.6931  reward 0\.5", last), last


def test_compiling_and_evaluating_are_plain_lines_at_a_bounded_rate(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("sft", total=100)
    progress.show_activity("compiling")
    for _ in range(2):
        for number in range(1, 13):
            progress.show_activity(f"evaluating {number}/12: docs")  # two evaluations of 12 s
            now[0] += 1.0
        now[0] += 6.0
        progress.update(1, {"loss": 1.0}, 10)
    for number in range(50):  # many short ones
        progress.show_activity(f"{('compiling', 'evaluating')[number % 2]} {number}")
        now[0] += 0.1
    lines = [line.removeprefix("sft  ") for line in capsys.readouterr().out.splitlines()]
    assert [line.split(":")[0] for line in lines[:2]] == ["compiling", "evaluating 3/12"]
    told = [line for line in lines if not line.startswith("step")]
    assert 4 <= len(told) <= 8, told


def test_rate_is_that_of_a_usual_step_and_asking_twice_changes_nothing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("pretrain", total=100, start=10)
    for step, seconds in enumerate([30.0, 0.5, 0.5, 0.5, 8.0, 0.5, 0.5], start=11):
        now[0] += seconds
        rate = progress.rate(step, tokens=1000)
        assert progress.rate(step, tokens=1000) == rate
    assert rate == 2000.0
    assert progress.seconds_left(17) == pytest.approx((100 - 17) * 10.5 / 6)


def test_progress_on_a_terminal_is_one_line_that_moves(tmp_path):
    code = """
from lm.train.metrics import Progress
progress = Progress("dpo", total=2, start=0)
progress.show_activity("evaluating 3/12: docs")
progress.update(1, {"loss": 2.5}, 10)
progress.say("a line [above] it")
progress.update(2, {"loss": 1.5}, 10)
progress.close()
"""
    main, terminal = os.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=terminal, env=env, timeout=300)
    os.close(terminal)
    shown = os.read(main, 65536).decode()
    os.close(main)
    assert run.returncode == 0
    assert "compiling" in shown and "evaluating 3/12: docs" in shown
    assert "2/2" in shown and "loss 1.5" in shown and "a line [above] it" in shown


def test_peak_memory_is_in_megabytes():
    block = np.ones(25_000_000)  # 200 MB
    assert 200 < peak_memory_mb() < 20_000
    del block
