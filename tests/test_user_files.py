"""Whatever a user's file holds or raises, and whatever stands where a folder should be, is told in one line."""

import json
import os

import pytest

from lm.cli.main import main
from lm.experiment import SFT, Experiment, Source, Stage, UserError, to_dict
from lm.files import defined_in, load
from lm.papers.paper import Paper
from lm.stored import LONGEST_PATH, cache_at
from lm.sweep.sweep import Sweep
from lm.sweep.sweep import load as load_sweep
from lm.train.run_files import read_run
from lm.train.run_folder import RunFolder

SOUND = Experiment("x", (Stage("sft", SFT(), (Source("gen:instruct"),)),))
HEAD = "from lm.experiment import *\n"
STAGE = "Stage('a', SFT(), (Source('x'),))"
FILES = {
    "a bracket that is not closed": ("x = 1\nexperiment = (", "bad.py:2: SyntaxError: '(' was never closed"),
    "an error": ("x = 1\n\n1 / 0", "bad.py:3: ZeroDivisionError: division by zero"),
    "an error of several lines": ("raise ValueError('a\\nb\\n\\nc')", "bad.py:1: ValueError: a b c"),
    "a user error": (f"{HEAD}raise UserError('a\\nb')", "bad.py:2: a b"),
    "an error below": ("def f():\n    return {}['x']\n\nf()", "bad.py:2: KeyError: 'x'"),
    "no such module": ("import nothing_of_this_name", "bad.py:1: ModuleNotFoundError"),
    "no such name": ("from lm.experiment import Experimnt", "bad.py:1: ImportError"),
    "an end": ("import sys\nsys.exit(0)", "bad.py:2: SystemExit: 0"),
    "an end with words": ("import sys\nsys.exit('so')", "bad.py:2: SystemExit: so"),
    "no end": ("def f():\n    f()\nf()", "bad.py:2: RecursionError"),
    "a neighbour that is no Python": ("import neighbour", "neighbour.py:2: SyntaxError"),
    "bytes": (b"\x00\x01\x02", "bad.py"),
    "a compiled file": (b"\xa7\r\r\n\x00\x00\x00\x00rest", "bad.py"),
    "UTF-16": ("experiment = 1".encode("utf-16"), "bad.py"),
    "Latin-1": ("# ä".encode("latin-1"), "bad.py"),
    "brackets without end": ("x = " + "(" * 5000, "bad.py"),
    "nothing": ("", "defines no `experiment`"),
    "another name": ("experimnt = 1", "defines no `experiment`"),
    "None": ("experiment = None", "`experiment` is None; it should be a value of lm.experiment.Experiment"),
    "a class": (f"{HEAD}experiment = Experiment", "`experiment` is <class"),
    "a plain value": (f"{HEAD}experiment = to_dict(Experiment('x', ({STAGE},)))", "`experiment` is {"),
    "text for a number": (f"{HEAD}experiment = Experiment('x', (Stage('a', SFT(), (Source('x'),), steps='2'),))", "a.steps is '2'"),
    "one source": (f"{HEAD}experiment = Experiment('x', (Stage('a', SFT(), Source('x')),))", "a.sources is Source("),
    "one stage": (f"{HEAD}experiment = Experiment('x', {STAGE})", "stages is Stage("),
    "text for prompts": (f"{HEAD}experiment = Experiment('x', ({STAGE},), prompts='hello')", "prompts is 'hello'"),
    "a class for an objective": (f"{HEAD}experiment = Experiment('x', (Stage('a', SFT, (Source('x'),)),))", "a.objective is <class"),
    "a text for an objective": (f"{HEAD}experiment = Experiment('x', (Stage('a', 'dpo', (Source('x'),)),))", "a.objective is 'dpo'"),
    "a dict for a model": (f"{HEAD}experiment = Experiment('x', ({STAGE},), model={{'num_layers': 1}})", "model is {'num_layers': 1}"),
    "a list that holds itself": (f"{HEAD}x = []\nx.append(x)\nexperiment = Experiment('x', ({STAGE},), prompts=x)", "prompts.0 is [[...]]"),
    "what cannot be shown": (f"{HEAD}class A:\n    def __repr__(self): 1 / 0\nexperiment = Experiment(A(), ({STAGE},))", "name is"),
}  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neighbour.py").write_text("x = 1\ny = (", "utf-8")
    return tmp_path


def refused(capsys, *words: str) -> str:
    """The one line that the command says before it exits with 2."""
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("lm: error: ") and said.count("\n") == 1 and len(said) < 1000, said
    return said


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_defines_no_experiment_is_one_line_with_its_place(work, capsys, case):
    content, told = FILES[case]
    (work / "bad.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert told in refused(capsys, "config", "bad.py")


def test_ctrl_c_in_a_file_stays_ctrl_c(work):
    (work / "bad.py").write_text("raise KeyboardInterrupt", "utf-8")
    assert main(["config", "bad.py"]) == 130


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "a/b", "a\nb", "x" * 300, "folder.py", "fifo.py", "fifo.json", "folder.json"]
)
def test_what_is_no_file_is_told(work, capsys, name):
    for kind in ("py", "json"):
        (work / f"folder.{kind}").mkdir()
        os.mkfifo(work / f"fifo.{kind}")
    refused(capsys, "config", name)


@pytest.mark.parametrize("kind, name", [(Sweep, "sweep"), (Paper, "paper")])
def test_sweeps_and_papers_are_read_as_experiments_are(work, kind, name):
    file = work / "bad.py"
    for content, told in (
        ("1 / 0", "bad.py:1: Zero"),
        ("exit(3)", "bad.py:1: SystemExit: 3"),
        ("", "defines no"),
        (f"{name} = 3", "is 3; it"),
    ):
        file.write_text(content, "utf-8")
        with pytest.raises(UserError, match=told):
            defined_in(file, name, kind)


@pytest.mark.parametrize(
    "change, told",
    [
        ("name='../x'", "sweep name is '../x'"),
        ("name=3", "sweep name is 3"),
        ("base=3", "experiment is 3"),
        ("base=Experiment('x', 3)", "stages is 3"),
        ("axes=3", "axes is 3"),
        ("seeds=0", "seeds is 0"),
        ("seeds=(-1,)", "seeds.0 is -1"),
        ("seeds=(True,)", "seeds.0 is True"),
        ("search='grid'", "search is 'grid'"),
        ("keep=3", "keep is 3"),
    ],
)
def test_a_sweep_is_read_strictly(work, change, told):
    given = {"name": "'s'", "base": f"Experiment('x', ({STAGE},))"} | dict([change.split("=", 1)])
    text = ", ".join(f"{key}={value}" for key, value in given.items())
    (work / "bad.py").write_text(f"{HEAD}from lm.sweep.sweep import Sweep\nsweep = Sweep({text})", "utf-8")
    with pytest.raises(UserError) as refusal:
        load_sweep("bad.py")
    assert told in str(refusal.value) and "\n" not in str(refusal.value)


def plain(**changes) -> str:
    return json.dumps(to_dict(SOUND) | changes)


STAGES = to_dict(SOUND)["stages"]
JSON = {
    "an integer": "5", "a list": "[]", "null": "null", "text": '"x"', "true": "true", "nothing": "", "no object": "{}", "garbage": "{]",
    "two": plain() + plain(), "depth": "[" * 100_000, "deep objects": '{"a":' * 100_000, "a long number": "9" * 5000,
    "not UTF-8": b'{"name": "\xff"}', "UTF-16": plain().encode("utf-16"), "a null": plain().encode() + b"\0",
    "no stages": plain(stages=None), "stages that are text": plain(stages="sft"), "stages by name": plain(stages={"sft": STAGES[0]}),
    "a stage that is text": plain(stages=["sft"]), "an objective that is text": plain(stages=[STAGES[0] | {"objective": "SFT"}]),
    "an objective without kind": plain(stages=[STAGES[0] | {"objective": {}}]), "an unknown field": plain(sead=1),
    "an objective of another kind": plain(stages=[STAGES[0] | {"objective": {"kind": ["SFT"]}}]),
    "NaN": plain(seed=float("nan")), "a large seed": plain(seed=2**63), "half a pair": plain(prompts=["\ud800"]),
    "a key twice": plain()[:-1] + ', "seed": 1}', "a path for a name": plain(name="../x"),
}  # fmt: skip


@pytest.mark.parametrize("case", JSON)
def test_an_experiment_in_json_that_is_none_is_one_line(work, capsys, case):
    content = JSON[case]
    (work / "bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(capsys, "config", "bad.json")


@pytest.mark.parametrize("case", [case for case in JSON if case not in ("a path for a name",)])
def test_a_run_folder_with_it_is_one_line_for_every_reader(work, capsys, case):
    content = JSON[case]
    (work / "r").mkdir()
    (work / "r" / "experiment.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in ("report", "sample", "eval", "chat", "label", "rerun"):
        refused(capsys, command, "r")


def test_absent_fields_of_json_have_their_defaults(work):
    stage = {"name": "sft", "objective": {"kind": "SFT"}, "sources": [{"path": "gen:instruct"}]}
    (work / "e.json").write_text(json.dumps({"name": "x", "stages": [stage]}), "utf-8")
    assert load("e.json") == SOUND


@pytest.mark.parametrize(
    "name", ["file", "file/x", "x" * 300, "/proc/x", "fifo", "fifo/x", "loop", "file/../x", "/dev/null"]
)
def test_what_cannot_be_a_folder_of_a_run_or_the_cache_is_told(work, name):
    (work / "file").write_text("x", "utf-8")
    os.mkfifo(work / "fifo")
    (work / "loop").symlink_to("loop")
    with (
        pytest.raises(UserError, match=r"cannot be made: .*; name another one \(--run-dir DIR") as refusal,
        RunFolder(work / name).lock(),
    ):
        pass
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < LONGEST_PATH + 200
    with pytest.raises(UserError, match=r"cannot be made: .*; name another one \(--cache DIR"), cache_at(work / name):
        pass
    with pytest.raises(UserError):
        read_run(work / name)
