"""Sinks show what the run's files hold, in one run of theirs over all sessions, and no error of theirs reaches training."""

import importlib.util
import json
import re
import sqlite3
import struct
import sys
import threading
import time
from collections import defaultdict
from dataclasses import replace

import pytest

from lm.cli.main import main
from lm.experiment import to_dict
from lm.stored import write_json_atomic
from lm.sweep.shared import stage_keys
from lm.sweep.trials import key_of
from lm.train.metrics import MetricsLog, read_lines
from lm.train.run_folder import RunFolder
from lm.train.sinks.feed import SINKS, SinkKind, feeding, send_run
from lm.train.sinks.sink import numbers_of, without_secrets
from lm.train.stages import run
from tests.train.runs import experiment, write_questions

STEPS = 6


class Recorder:
    """A sink that keeps what it is sent; `lines` of all its sessions."""

    where, run = "in memory", "one"

    def __init__(self):
        self.lines, self.closed = [], 0

    def send(self, lines):
        self.lines += lines

    def flush(self):
        pass

    def close(self):
        self.closed += 1


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "runs" / "one")
    made.path.mkdir(parents=True)
    write_json_atomic(made.experiment, to_dict(experiment(tmp_path)))
    return made


@pytest.fixture
def recorder(monkeypatch):
    one = Recorder()
    monkeypatch.setattr(SinkKind, "open", lambda kind, target: one)
    return one


def session(tmp_path, folder, name, start, end, offset=0.0, told=None):
    """A session of stage sft, steps `start` + 1 to `end`, with an eval at its beginning and end."""
    value = replace(experiment(tmp_path), sinks=(name,))
    with (
        feeding(value, folder, (told if told is not None else []).append, patience=None) as feeds,
        MetricsLog(
            folder.stage_folder("sft"), lambda kind, line: [feed.write("sft", kind, line) for feed in feeds]
        ) as log,
    ):
        log.rewind(start)
        for step in range(start + 1, end + 1):
            log.metrics({"step": step, "time": offset + step, "loss": offset + 1 / step, "note": "text"})
            if step % 2 == 0:
                log.evaluation({"step": step, "when": "during", "eval": "asked", "metric": "reward", "reward": offset})


def shown_by_tensorboard(folder):
    """What TensorBoard shows: a session that begins at a step ends what earlier ones wrote from there on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = defaultdict(dict)
    for file in sorted(
        folder.stage_folder("sft").glob("tensorboard/events*"), key=lambda file: file.stat().st_mtime_ns
    ):
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = struct.unpack_from("<Q", data, place)[0]
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += size + 16
            if event.session_log.status == SessionLog.START:
                shown = {name: {s: v for s, v in one.items() if s < event.step} for name, one in shown.items()}
                shown = defaultdict(dict, shown)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    name = value.tag.removeprefix("train/")
                    shown[f"sft/{name}"][event.step] = value.simple_value
    return dict(shown)


def shown_by_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("lm").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["model.embed_dim"] == "16"
    return {
        name: {one.step: one.value for one in client.get_metric_history(found.info.run_id, name)}
        for name in found.data.metrics
    }


def shown_by_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    shown, ids, config = defaultdict(dict), set(), {}
    for file in sorted(folder.path.glob("sinks/wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                config |= {item.key: item.value_json for item in record.run.config.update}
            values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for name in values.keys() - {"sft/step"}:
                if name.startswith("sft/"):
                    shown[name][values["sft/step"]] = values[name]
    assert len(ids) == 1 and json.loads(config["model.embed_dim"]) == 16
    return dict(shown)


def records(data: bytes):
    """The records of a log of LevelDB's form, after a header of seven bytes: blocks of 32 KiB of pieces of records."""
    place, record = 7, b""
    while place + 7 <= len(data):
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768


def shown_by_trackio(folder):
    import trackio.utils

    shown = defaultdict(dict)
    with sqlite3.connect(trackio.utils.TRACKIO_DIR / "lm.db") as base:
        for step, text in base.execute("select step, metrics from metrics order by id"):
            for name, value in json.loads(text).items():
                shown[name][step - 1] = value  # stage collect has one step
    return dict(shown)


READ = {
    "tensorboard": shown_by_tensorboard,
    "wandb": shown_by_wandb,
    "trackio": shown_by_trackio,
    "mlflow": shown_by_mlflow,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SINKS)
def test_a_sink_shows_the_files_after_a_session_that_rewound(name, tmp_path, folder, monkeypatch):
    pytest.importorskip(SINKS[name].library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    told = []
    session(tmp_path, folder, name, 0, 4, told=told)
    session(tmp_path, folder, name, 2, STEPS, offset=10.0, told=told)
    wanted = defaultdict(dict)
    for kind in ("metrics", "eval"):
        for line in read_lines(folder.stage_folder("sft") / f"{kind}.jsonl"):
            for key, value in numbers_of("sft", kind, line, 1).named.items():
                wanted[key][line["step"]] = pytest.approx(value)
    assert len(told) == 2 and sorted(wanted["sft/loss"]) == [*range(1, STEPS + 1)]
    assert READ[name](folder) == dict(wanted)


def test_a_sink_that_lacks_earlier_lines_gets_them_first(tmp_path, folder, recorder):
    with MetricsLog(folder.stage_folder("collect")) as log:
        log.evaluation({"step": 0, "when": "before", "eval": "asked", "metric": "reward", "reward": 0.5})
    folder.summary("collect").write_text("{}")
    with MetricsLog(folder.stage_folder("sft")) as log:
        log.metrics({"step": 1, "loss": 1.0})
    session(tmp_path, folder, "wandb", 1, 3)
    assert [(one.stage, one.kind, one.step) for one in recorder.lines if one.kind == "metrics" or one.stage == "collect"] == [
        ("collect", "eval", 0), ("sft", "metrics", 1), ("sft", "metrics", 2), ("sft", "metrics", 3)
    ]  # fmt: skip


def test_a_line_that_the_sink_has_is_not_sent_again_by_the_next_session(tmp_path, folder, recorder):
    session(tmp_path, folder, "wandb", 0, 2)
    session(tmp_path, folder, "wandb", 2, 4)
    assert [one.step for one in recorder.lines if one.kind == "metrics"] == [1, 2, 3, 4]


def test_lines_beyond_what_waits_in_memory_are_read_from_the_file(tmp_path, folder, recorder, monkeypatch):
    monkeypatch.setattr("lm.train.sinks.feed.MOST_WAITING", 3)
    go_on = threading.Event()
    monkeypatch.setattr(SinkKind, "open", lambda kind, target: go_on.wait(600) and recorder)
    threading.Timer(0.3, go_on.set).start()
    session(tmp_path, folder, "wandb", 0, 20)
    session(tmp_path, folder, "wandb", 20, 22)
    assert [one.step for one in recorder.lines if one.kind == "metrics"] == [*range(1, 23)]


class Failing(Recorder):
    def send(self, lines):
        raise ConnectionError("no route to http://me:secret@host/api?key=abc")


def refused(kind, target):
    raise ConnectionError("no\nroute")


@pytest.mark.parametrize("opened", [lambda kind, target: Failing(), refused], ids=["sending", "opening"])
def test_an_error_of_a_sink_is_told_once_without_secrets(tmp_path, folder, monkeypatch, opened):
    monkeypatch.setattr(SinkKind, "open", opened)
    told = []
    session(tmp_path, folder, "mlflow", 0, 4, told=told)
    errors = [line for line in told if line.endswith("the run goes on without it")]
    assert len(errors) == 1 and re.match(r"sink mlflow: no route", errors[0])
    assert "secret" not in errors[0] and "abc" not in errors[0]


def test_a_sink_that_hangs_holds_up_no_step_and_the_end_only_for_its_patience(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(SinkKind, "open", lambda kind, target: time.sleep(60))
    value = replace(experiment(tmp_path), sinks=("wandb",))
    told, began = [], time.monotonic()
    with feeding(value, folder, told.append, patience=0.2):
        pass
    assert time.monotonic() - began < 30
    assert told == [
        f"sink wandb: not all was sent within 0.2 s: `lm runs send {folder.path} --sinks wandb` sends the rest"
    ]


@pytest.mark.slow
def test_a_run_ends_as_without_sinks_when_all_of_them_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SinkKind, "open", refused)
    write_questions(tmp_path)
    value = experiment(tmp_path)
    run(value, tmp_path / "without")
    run(replace(value, sinks=tuple(SINKS)), tmp_path / "with")
    losses = [
        [line["loss"] for line in read_lines(tmp_path / name / "stages" / "sft" / "metrics.jsonl")]
        for name in ("without", "with")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    said = capsys.readouterr().out
    assert all(said.count(f"sink {name}: no route; the run goes on without it") == 1 for name in SINKS)


def test_sinks_may_change_when_a_run_is_resumed(tmp_path, recorder):
    write_questions(tmp_path)
    value = experiment(tmp_path)
    run(value, tmp_path / "run", until="collect")
    run(replace(value, sinks=("mlflow",)), tmp_path / "run")
    assert [one.step for one in recorder.lines if (one.stage, one.kind) == ("sft", "metrics")] == [1, 2, 3, 4]


def test_sinks_are_no_part_of_what_a_trial_of_a_sweep_is(tmp_path):
    value = experiment(tmp_path)
    other = replace(value, sinks=("wandb",))
    assert stage_keys(value) == stage_keys(other) and key_of(value) == key_of(other)


def test_a_finished_run_is_sent_by_a_command(tmp_path, folder, recorder, capsys):
    with MetricsLog(folder.stage_folder("sft")) as log:
        log.metrics({"step": 1, "loss": 1.0})
    assert main(["runs", "send", str(folder.path), "--sinks", "mlflow,wandb"]) == 0
    assert capsys.readouterr().out == f"{folder.path}: 1 lines to mlflow\n{folder.path}: 1 lines to wandb\n"
    assert send_run(folder, ["mlflow"]) == {"mlflow": 0}
    (folder.stage_folder("sft") / "metrics.jsonl").unlink()
    assert main(["runs", "send", str(folder.path), "--sinks", "mlflow"]) == 2
    assert "metrics.jsonl:1 is gone: 1 lines were written" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--sinks", "mlfow"], [], ["--sinks", ""]])
def test_what_is_no_sink_is_told(folder, capsys, words):
    assert main(["runs", "send", str(folder.path), *words]) == 2
    assert "there are tensorboard, wandb, trackio, mlflow" in capsys.readouterr().err


def test_a_sink_whose_library_is_missing_names_the_extra(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["runs", "send", str(folder.path), "--sinks", "mlflow"]) == 2
    told = f"sink mlflow: mlflow is not installed: {sys.executable} -m pip install 'lm[mlflow]'"
    assert told in capsys.readouterr().err


def test_urls_lose_users_passwords_and_queries():
    assert without_secrets(["see https://me:pw@host:1/v1?key=abc end", 3]) == ["see https://host:1/v1 end", 3]
