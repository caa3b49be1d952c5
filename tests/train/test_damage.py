"""Whatever is in a file of a run or of the cache, its reader gives a value or one line that names the file, and a command the
same numbers or one line."""

import dataclasses
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lm import json_lines
from lm.changes import changes, normalised, read_experiment, stored_experiment
from lm.choices.log import read_log
from lm.cli.main import main
from lm.data.cache import Cache
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import SFT, Experiment, Source, Stage, UserError, from_dict, to_dict
from lm.json_lines import checksums, read_json_lines
from lm.stored import read_sealed, sealed, write_json_atomic, write_sealed
from lm.sweep.results import read_description, read_result, read_trial
from lm.train import goodput
from lm.train.checkpoint import Checkpoints
from lm.train.loaded_run import origin_of
from lm.train.metrics import KINDS, MetricsLog, read_lines
from lm.train.provenance import last_session
from lm.train.resume import check_run_inputs
from lm.train.run_files import read_run, read_stage
from lm.train.run_folder import RunFolder
from lm.user_functions import search_recorded
from tests.train.runs import experiment, write_questions

pytestmark = pytest.mark.slow

TIMES = 60
SESSION = {"versions": {"jax": "1"}, "started": "now", "functions": {"mine.py:score": "/home/mine.py"}}
PLAN = Experiment("plan", (Stage("sft", SFT(), (Source("gen:drills"),), steps=3),))


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a few of them flipped, cut out, doubled, or replaced by pieces that parsers stumble over."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 3))):
        at = draw.randrange(len(changed) + 1)
        end = min(len(changed), at + draw.choice((1, 1, 8, 1000)))
        piece = changed[at:end]
        changed[at:end] = draw.choice(
            (
                bytes(byte ^ (1 << draw.randrange(8)) for byte in piece[:1]) + piece[1:],
                b"",
                piece * 2,
                draw.choice(
                    (b"[" * 5000, b'"', b"{}", b"null", b"\xff\xfe", b"\x00", b"1e999", b"-1", b"9" * 5000, b"\n")
                ),
            )
        )
    return bytes(changed)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(json_lines, "RETRY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run's folder with a file of every kind."""
    run = RunFolder(tmp_path_factory.mktemp("damage") / "run")
    run.path.mkdir()
    write_json_atomic(run.experiment, to_dict(PLAN))
    write_sealed(
        run.environment,
        {
            "runs": [SESSION],
            "finished": ["sft"],
            "began": {"data": {"asked.jsonl": "0" * 64}},
            "experiments": [to_dict(PLAN)],
        },
    )
    stage = run.stage_folder("sft")
    with MetricsLog(stage) as log:
        for step in (1, 2, 3):
            log.metrics({"step": step, "time": 1.0, "loss": 0.5})
            measured = {"metric": "reward", "count": 4, "reward": 0.25}
            log.evaluation({"step": step, "when": "during", "eval": "asked"} | measured)
            log.samples([{"kind": "prompt", "step": step, "when": "during", "prompt": "a", "answer": "b"}])
    write_sealed(run.summary("sft"), {"steps": 3, "final_step": 3, "tokens": 7, "seconds": 1.0})
    write_sealed(stage / "time.json", {"seconds": 3.0})
    with Checkpoints(run.checkpoints("sft")) as checkpoints:
        checkpoints.save(3, {"policy": {"w": np.arange(4.0)}}, {"tokens": 7})
    choice = {"id": 1, "kind": "choice", "annotator": "x", "pair": "p", "prompt": "a", "choice": "left"}
    sides = {side: {"answer": side, "source": "s"} for side in ("left", "right")}
    (stage / "labels.jsonl").write_text(
        json.dumps(choice | sides) + "\n" + json.dumps({"id": 2, "kind": "undo", "annotator": "x", "of": 1}) + "\n"
    )
    SubwordTokenizer.train(["some text to learn pieces from"] * 9, 320, run.tokenizer)
    write_sealed(run.origin, {"config": "{}", "tensors": {"a": ["a.safetensors", "F32"]}, "files": {"LICENSE": "free"}})
    trial = {
        "settings": {"sft.steps": "3"},
        "seed": 0,
        "wanted": True,
        "failed": "",
        "pruned": False,
        "impossible": False,
    }
    write_sealed(run.path / "trial.json", trial)
    search = {"kind": "Grid", "most": None}
    described = {"base": to_dict(PLAN), "axes": {"sft.steps": ["3"]}, "search": search, "baseline": {}}
    write_sealed(run.path / "sweep.json", described)
    Cache(run.path / "cache").entry("test", {}, lambda writer: writer.append("numbers", np.arange(9)), "numbers")
    return run.path


def cached(run: Path) -> None:
    entry = Cache(run / "cache").entry("test", {}, lambda writer: writer.append("numbers", np.arange(9)), "numbers")
    assert len(entry.array("numbers")) == entry.length("numbers") == 9


def unrecorded(run: Path) -> None:
    """Read experiment.json as comparisons and a resume do where no environment.json says what it was."""
    plan, alone = json.loads(json.dumps(to_dict(PLAN))), run / "alone"
    alone.mkdir(exist_ok=True)
    shutil.copy(run / "experiment.json", alone)
    assert read_result(alone).seed is not None
    there = stored_experiment(alone)
    for one, other in ((there, plan), (plan, there)):
        changes(normalised(one), normalised(other), 1)


def inputs_checked(run: Path) -> None:
    now = {"data": {"asked.jsonl": "0" * 64}, "tokenizer": "1" * 64, "versions": {"jax": "1"}, "python": "3.11"}
    check_run_inputs(RunFolder(run), now, accept=True)


STAGE = "stages/sft"
READERS = {
    "experiment.json": [read_experiment, lambda run: from_dict(read_experiment(run)), read_run, unrecorded],
    "environment.json": [read_experiment, last_session, read_run, search_recorded, inputs_checked],
    "open_weights.json": [origin_of],
    "trial.json": [lambda run: read_trial(run / "trial.json")],
    "sweep.json": [read_description],
    "tokenizer/tokenizer.model": [lambda run: SubwordTokenizer.load(run / "tokenizer")],
    f"{STAGE}/metrics.jsonl": [read_run, lambda run: MetricsLog(run / STAGE).check_steps(3), lambda run: goodput.seconds_spent(run / STAGE)],
    f"{STAGE}/metrics.jsonl.crc32": [read_run],
    f"{STAGE}/eval.jsonl": [read_run],
    f"{STAGE}/samples.jsonl": [read_run],
    f"{STAGE}/summary.json": [read_run, lambda run: RunFolder(run).final_step("sft")],
    f"{STAGE}/time.json": [lambda run: goodput.seconds_spent(run / STAGE)],
    f"{STAGE}/labels.jsonl": [lambda run: read_log(run / STAGE / "labels.jsonl")],
    f"{STAGE}/checkpoints/00000003/manifest.json": [
        lambda run: Checkpoints(run / STAGE / "checkpoints").restore({"policy": {"w": np.arange(4.0)}}, only=3),
        lambda run: Checkpoints(run / STAGE / "checkpoints").newest_meta(),
    ],
    "cache/test-*/manifest.json": [cached],
    "cache/test-*/numbers": [cached],
}  # fmt: skip


BAD_LINES = {
    "metrics": ({"step": -1}, {"step": 1, "loss": "0.5"}, {"step": 1, "loss": [1]}, {"step": 1, "loss": 10**30}, {"step": 1, "loss": 1e200}),
    "eval": (
        {"metric": "reward"}, {"metric": "nope", "nope": 1}, {"metric": ["reward"], "reward": 1}, {"metric": "reward", "reward": "1"},
        {"metric": "reward", "reward": 1, "count": None}, {"metric": "reward", "reward": 1, "when": "later"},
        {"metric": "best_of_n", "best_of": 4}, {"metric": "reward", "reward": 1, "passed_over": {"why": "2"}},
    ),
    "samples": (
        {"kind": "prompt", "prompt": 5, "answer": "a"}, {"kind": "other"}, {"kind": "pair", "prompt": "a", "chosen": "b", "margin": 0},
        {"kind": "rollout", "prompt": "a", "completions": [{"text": None}]}, {"kind": "heldout", "prompt": "a", "answer": "b", "eval": {}},
        {"kind": "prompt", "prompt": "a", "answer": "b", "eval": []}, {"kind": "rollout", "prompt": "a", "completions": [], "chosen": {}},
    ),
    "warnings": ({"text": 5},),
    "benchmarks": ({"task": 5}, {"task": "a", "metric": "acc", "count": 4, "fewshot": [0]}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "line"), [(kind, line) for kind, lines in BAD_LINES.items() for line in lines])
def test_a_line_that_no_page_could_show_is_refused(tmp_path, kind, line):
    place = {"step": 1, "when": "during"} | ({"eval": "asked", "count": 4} if kind == "eval" else {})
    (tmp_path / "stages" / "sft").mkdir(parents=True)
    (tmp_path / "stages" / "sft" / f"{kind}.jsonl").write_text(json.dumps(place | line) + "\n")
    with pytest.raises(
        UserError, match=rf"{kind}\.jsonl:1 is not (a line|an object) that was written here: .*; remove that line$"
    ):
        read_stage(tmp_path, "sft", "SFT", 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": "1"},
        {"num_params": -1},
        {"sources": [5]},
        {"sources": [{"dropped": {"why": "a"}}]},
    ],
)
def test_a_summary_that_no_page_could_show_is_refused(folder, changes):
    file = RunFolder(folder).summary("sft")
    whole = file.read_bytes()
    try:
        write_sealed(file, read_sealed(file) | changes)
        with pytest.raises(UserError, match=r"summary\.json is damaged: its [a-z_.0-9]+ cannot be read"):
            read_run(folder)
    finally:
        file.write_bytes(whole)


def test_the_origin_of_open_weights_that_is_gone_is_missed(tmp_path):
    write_json_atomic(tmp_path / "experiment.json", to_dict(dataclasses.replace(PLAN, init="hf:weights")))
    with pytest.raises(UserError, match=r"open_weights\.json is gone"):
        origin_of(tmp_path)
    write_json_atomic(tmp_path / "experiment.json", to_dict(PLAN))
    assert origin_of(tmp_path) is None


def reshaped(value, draw: random.Random):
    """A JSON value of which one part, at any depth, is missing, there twice, or another value."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.05:
        return draw.choice((None, True, -1, 2.5, 10**30, "", "a/../b", "\0", [], {}, [None], {"a": [1]}))
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if draw.random() < 0.2:
        kept = dict(value) if isinstance(value, dict) else list(value)
        del kept[key]
        return kept
    if isinstance(value, list):
        return [reshaped(item, draw) if place == key else item for place, item in enumerate(value)]
    return value | {key if draw.random() < 0.9 else "other": reshaped(value[key], draw)}


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
def test_a_reader_is_total_whatever_a_right_seal_is_of(folder, name):
    (file,) = folder.glob(name)
    whole, draw = file.read_bytes(), random.Random(name)
    content, wrong = json.loads(whole), 0
    seal = content.pop("sha256", None) is not None
    try:
        for _ in range(4 * TIMES):
            changed = reshaped(content, draw)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(sealed(changed) if seal and isinstance(changed, dict) else changed))
            for read in READERS[name]:
                try:
                    read(folder)
                except UserError as error:
                    wrong += 1
                    assert "\n" not in str(error) and str(folder) in str(error)
    finally:
        file.write_bytes(whole)
    assert wrong or "cache" in name  # whose entries are built again


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("seal", [True, False])
def test_a_reader_is_total(folder, name, seal):
    (file,) = folder.glob(name)
    if not seal and file.suffix not in (".json", ".jsonl"):
        return
    whole, draw = file.read_bytes(), random.Random(name)
    beside = checksums(file)
    sums = beside.read_bytes() if beside.exists() else None
    start = whole
    if not seal:  # as an older lm wrote it
        if sums is not None:
            beside.unlink()
        elif b'"sha256"' in whole:
            start = json.dumps(read_sealed(file)).encode() if name.endswith(".json") else whole
    try:
        for number in range(TIMES):
            data = (b"", b"[]", b"{}", b"\n")[number] if number < 4 else mutated(start, draw)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
            for read in READERS[name]:
                try:
                    read(folder)
                except UserError as error:
                    assert "\n" not in str(error)
    finally:
        file.write_bytes(whole)
        if sums is not None:
            beside.write_bytes(sums)


def test_a_flipped_bit_of_a_sealed_line_is_always_found(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.metrics({"step": step, "loss": 0.5})
    file, draw = tmp_path / "metrics.jsonl", random.Random(0)
    whole = file.read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        with pytest.raises(UserError):
            read_lines(file)
    file.write_bytes(whole)
    assert len(read_json_lines(file)) == 3


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


DAMAGES = {
    "flipped": flipped,
    "cut": lambda data, draw: data[: len(data) // 2],
    "emptied": lambda data, draw: b"",
    "removed": lambda data, draw: None,
}
CLOCKS = re.compile(r"[\d.,]+\s*(µs|ms|s|min|h|MB|GB|kB)\b|[\d,.]+ tokens/s")
DAMAGED = (
    "experiment.json", "environment.json", "tokenizer/tokenizer.model", "stages/collect/made.jsonl",
    "stages/collect/answers.jsonl", "stages/collect/summary.json", "stages/sft/eval.jsonl", "stages/sft/metrics.jsonl",
    "stages/sft/metrics.jsonl.crc32",
    "stages/sft/samples.jsonl", "stages/sft/summary.json", "stages/sft/checkpoints/*4/manifest.json",
    "stages/sft/checkpoints/*4/policy/_METADATA", "stages/sft/checkpoints/*4/policy/ocdbt.process_0/d/*",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("damaged")
    write_questions(root)
    write_json_atomic(root / "plan.json", to_dict(experiment(root)))
    assert main(["run", str(root / "plan.json"), "--run-dir", str(root / "run"), "--cache", str(root / "cache")]) == 0
    return root


def outcome(root: Path, command: str, capsys) -> tuple[int, str, list[str]]:
    """Exit code, the numbers that the command gives, and the lines of its error."""
    run, cache = str(root / "run"), ["--cache", str(root / "cache")]
    words = {
        "run": ["run", str(root / "plan.json"), "--run-dir", run, "--no-report", *cache],
        "sample": ["sample", run, "--max-new-tokens", "4"],
        "eval": ["eval", run, *cache],
        "report": ["report", run],
        "runs": ["runs", str(root), "--json"],
        "compare": ["compare", run, "--page", str(root / "page.html"), "--csv", str(root / "rows.csv")],
    }
    capsys.readouterr()
    code = main(words[command])
    told = capsys.readouterr()
    stage = root / "run" / "stages" / "sft"
    lines = [line for line in told.err.splitlines() if line.startswith("lm: error")]
    if command == "runs":
        found = [(one["state"], one["metrics"]) for one in json.loads(told.out)]
        told_of = [metrics for state, metrics in found if state == "cannot be read"]
        return (2 if told_of else code), str(found), told_of
    files = {
        "run": [stage / f"{kind}.jsonl" for kind in KINDS],
        "report": [root / "run" / "report.html"],
        "compare": [root / "rows.csv"],
    }
    numbers = told.out if command != "run" else ""
    numbers += "".join(file.read_text() for file in files.get(command, ()) if code == 0 and file.exists())
    return code, CLOCKS.sub("", numbers), lines


@pytest.mark.parametrize("command", ["run", "sample", "eval", "report", "runs", "compare"])
def test_a_damaged_file_gives_the_same_numbers_or_one_line(whole, command, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "kept")
    code, numbers, _ = outcome(whole, command, capsys)
    assert code == 0
    wrong = []
    for place, name in enumerate(DAMAGED):
        for damage in ("removed", ("flipped", "cut", "emptied")[place % 3]):
            (file,) = whole.glob(f"run/{name}")
            content, times = DAMAGES[damage](file.read_bytes(), random.Random(name)), file.stat()
            file.unlink()
            if content is not None:
                file.write_bytes(content)
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            code, now, lines = outcome(whole, command, capsys)
            if not (now == numbers if code == 0 else code == 2 and len(lines) == 1):
                wrong.append((name, damage, code, lines))
            shutil.rmtree(whole / "run")
            shutil.copytree(tmp_path / "kept" / "run", whole / "run")
    assert not wrong
