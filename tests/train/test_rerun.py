"""A run again: the same to the bit, and what is said where it is not."""

import dataclasses
import json
import os
import signal
import threading
import time

import pytest

from lm.cli.main import main
from lm.experiment import Eval, Source, UserError, to_dict
from lm.json_lines import rewrite_json_lines
from lm.stored import read_json, read_sealed, write_sealed
from lm.train.fingerprints import fingerprints
from lm.train.metrics import read_lines
from lm.train.rerun import changed_conditions, first_difference
from lm.train.stages import run
from tests.sweep.tiny import base


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerun") / "run"
    run(base, folder)
    return folder


@pytest.mark.slow
def test_a_run_again_is_the_same_to_the_bit(finished, capsys):
    assert main(["rerun", str(finished)]) == 0
    said = capsys.readouterr().out
    assert "the same to the bit: every number of pretrain, sft" in said and "changed:" not in said
    assert read_json(finished.with_name("run.rerun") / "experiment.json") == json.loads(json.dumps(to_dict(base)))


@pytest.mark.slow
def test_a_rerun_that_a_signal_stops_says_how_to_go_on(finished, tmp_path, capsys):
    out = tmp_path / "again"

    def interrupt():
        while not (out / "experiment.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    words = ["rerun", str(finished), "--until", "pretrain", "--out", str(out)]
    threading.Thread(target=interrupt, daemon=True).start()
    assert main(words) == 130
    assert capsys.readouterr().err.endswith(f"To go on: lm rerun {finished} --out {out} --until pretrain\n")
    assert main(words) == 0


@pytest.mark.slow
def test_the_first_number_that_differs_is_named(finished, tmp_path, capsys):
    out = tmp_path / "again"
    assert main(["rerun", str(finished), "--until", "pretrain", "--out", str(out)]) == 0
    file = out / "stages" / "pretrain" / "metrics.jsonl"
    lines = read_lines(file)
    lines[2]["loss"] += 1e-7
    rewrite_json_lines(file, [json.dumps(line).encode() for line in lines])
    assert first_difference(finished, out, ["pretrain"]).startswith("pretrain, metrics.jsonl, step 3: loss was")
    assert main(["rerun", str(finished), "--until", "pretrain", "--out", str(out)]) == 1
    assert "different: pretrain" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_not_as_it_was_is_said_and_may_be_refused(finished, tmp_path, capsys):
    file = finished / "environment.json"
    kept = file.read_text()
    record = read_sealed(file)
    record["runs"][-1]["versions"]["jax"] = "0.0.1"
    record["runs"][-1]["data_fingerprint"] = {"gen:drills": "other"}
    try:
        write_sealed(file, record)
        now = fingerprints(base) | {"what an older lm did not record": "abc"}
        names = [name for name, _, _ in changed_conditions(finished, now)]
        assert not any("older" in name for name in names)
        assert "versions.jax" in names and any(name.startswith("data") for name in names)
        assert main(["rerun", str(finished), "--same", "--out", str(tmp_path / "never")]) == 2
        assert "changed: versions.jax: 0.0.1 →" in capsys.readouterr().out
        assert not (tmp_path / "never").exists()
    finally:
        file.write_text(kept)


def test_a_fingerprint_covers_what_is_only_measured_on():
    evals = (Eval("other", Source("gen:instruct", holdout=0.5)),)
    assert set(fingerprints(dataclasses.replace(base, evals=evals))) == {"gen:drills", "gen:arithmetic", "gen:instruct"}


def test_a_run_that_has_not_ended_is_refused(tmp_path):
    run(base, tmp_path / "half", until="pretrain")
    assert main(["rerun", str(tmp_path / "half")]) == 2
    with pytest.raises(UserError, match="never began"):
        changed_conditions(tmp_path, {})
