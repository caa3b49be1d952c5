"""The `lm` command: exit codes, one-line errors, and help that imports nothing slow."""

import glob
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm.allocator import ALLOCATOR
from lm.cli.main import COMMANDS, Parser, main, split_overrides

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = """
from lm.experiment import Experiment, Optimizer, Pretrain, SFT, Source, Stage

text, few = Source(path="text.txt"), Optimizer(warmup_steps=2)
experiment = Experiment(
    name="small",
    stages=(
        Stage(name="pretrain", objective=Pretrain(), sources=(text,), optimizer=few, steps=3),
        Stage(name="sft", objective=SFT(), sources=(text,), optimizer=few, steps=2),
    ),
)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with one experiment, `small`."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "small.py").write_text(EXPERIMENT, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys, *words: str) -> str:
    """The one line that a user's error prints."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lm: error: ") and captured.err.count("\n") == 1
    return captured.err


def python(*words: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, **options)


@pytest.mark.parametrize(
    "words",
    [
        "run small.py --run-dir r --cache 'a b' --until sft --process-id 0 --no-report --callback a:b --callback c:d --watchdog 0",
        "sweep small.py --folder s --workers 2 --store t --cache c",
        "sweep small.py",
        "reproduce muon --quick --workers 3 --folder f --cache c",
        "rerun runs/small --out o --until sft --same --cache c",
    ],
)
def test_the_command_to_go_on_has_the_flags_that_were_given(words):
    command, *given = shlex.split(words)
    module = importlib.import_module(f"lm.cli.{command}")
    parser = Parser()
    module.configure(parser)
    parser.set_defaults(overrides=[])
    arguments = parser.parse_args(given)
    lm, again, *told = shlex.split(module.command_to_go_on(arguments))
    assert (lm, again) == ("lm", command) and parser.parse_args(told) == arguments


@pytest.mark.parametrize("words", [["--help"], [], *[[name, "--help"] for name in COMMANDS]])
def test_help_imports_nothing_slow_and_fits_the_terminal(words):
    slow = "{'jax', 'numpy', 'rich', 'jinja2', 'matplotlib', 'flax'}"
    code = f"import sys; from lm.cli.main import main; assert main({words!r}) == 0; print(sorted({slow} & set(sys.modules)))"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    *text, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert "usage: lm" in text[0]
    assert max(map(len, text)) <= 80


def test_every_command_has_its_file():
    files = {path.stem for path in (ROOT / "lm" / "cli").glob("*.py")}
    assert set(COMMANDS) <= files
    assert files - set(COMMANDS) == {"__init__", "main", "arguments"}


def test_an_experiment_of_the_clone_is_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "quickstart"]) == 0
    assert "sft.steps" in capsys.readouterr().out
    Path("experiments").mkdir()
    Path("experiments/quickstart.py").write_text("x = 1")  # what is here comes first
    assert "defines no `experiment`" in error_of(capsys, "config", "quickstart")


def test_an_unknown_command_gets_the_nearest_one(capsys):
    assert "did you mean run?" in error_of(capsys, "rum", "quickstart")
    assert "there are run, config" in error_of(capsys, "frobnicate")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run"], "EXPERIMENT"),
        (["run", "nowhere"], "no experiment 'nowhere'; there are "),
        (["run", "small", "--sft.stps", "3"], "did you mean sft.steps"),
        (["run", "small", "--sft.steps", "many"], "an integer"),
        (["run", "small", "--sft.steps"], "needs a value"),
        (["run", "small", "--model.num_kv_heads", "3"], "num_kv_heads"),
        (["run", "small", "--until", "stf"], "did you mean sft?"),
        (["data", "small", "--stage", "pretain"], "did you mean pretrain?"),
        (["data", "small", "--rows", "0"], "from 1 to "),
        (["config"], "which EXPERIMENT?"),
        (["config", "small", "-x"], "-x"),
        (["sample", "nothing"], "no run 'nothing'"),
        (["sample", "nothing", "--temperature", "hot"], "number from 0"),
        (["chat", "nothing", "--top-p", "1.5"], "number from 0 to 1"),
        (["chat", "nothing", "--seed", "-1"], "from 0 to "),
        (["eval", "nothing"], "runs/ here has: nothing"),
        (["report", "experiments"], "has no experiment.json"),
    ],
)
def test_a_users_error_is_one_line_that_teaches(here, capsys, words, told):
    assert told in error_of(capsys, *words)
    assert not (here / "runs").exists()


def test_a_bug_shows_its_traceback(here):
    code = "import sys, lm.cli.config as c, lm.cli.main as m; c.call = lambda _: 1 / 0; sys.exit(m.main(['config', 'small']))"
    done = python("-c", code, cwd=here)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


def told_of(here, text):
    """Exit code and output of a command that reads an experiment with this text."""
    (here / "experiments" / "slow.py").write_text(text, "utf-8")
    done = python("-m", "lm.cli.main", "config", "slow", cwd=here)
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_is_quiet(here):
    assert told_of(here, "raise KeyboardInterrupt") == (130, "", "")


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("run small --fresh", "Checkpoints, and data in the cache, are kept. To go on: lm run small"),
        ("rerun runs/small", "Checkpoints, and data in the cache, are kept. To go on: lm rerun runs/small"),
        ("data small", "Files that were tokenised to their end are in the cache: the same command goes on after them"),
        ("eval small --tasks t", "The answers so far are in the cache: the same command goes on after them"),
        ("export small out", "out is not written: the same command begins anew"),
        ("eval small", ""),
        ("plan small --topology v5e:2x2", ""),
        ("report small", ""),
    ],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_can_go_on_says_what_it_has_kept(monkeypatch, capsys, words, kept, number, code):
    name = words.split()[0]

    def interrupted(_):
        raise KeyboardInterrupt(number)

    monkeypatch.setattr(importlib.import_module(f"lm.cli.{name}"), "call", interrupted)
    assert main(words.split()) == code
    assert capsys.readouterr().err == (f"lm {name}: stopped. {kept}\n" if kept else "")


def test_after_ctrl_c_python_runs_what_it_promised_and_takes_nothing_apart(here):
    """A computation that is still running in a thread would crash, as of an evaluation's batch."""
    text = (
        "import atexit, json, os\nclass Used:\n    def __del__(self, write=os.write):\n        write(1, b'taken apart')\n"
        "json.used = Used()\natexit.register(print, 'promised')\nraise KeyboardInterrupt\n"
    )
    assert told_of(here, text) == (130, "promised\n", "")


def test_sigterm_removes_what_was_begun_and_is_quiet(here):
    """As Ctrl-C does; without a handler, a draft would stay."""
    text = (
        "import os, signal\nfrom pathlib import Path\nfrom lm.stored import new_folder\n"
        "with new_folder(Path('out')):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert told_of(here, text) == (-signal.SIGTERM, "", "")
    assert not [path for path in here.iterdir() if "out" in path.name]


def test_a_reader_who_leaves_is_no_error(here):
    command = f"{sys.executable} -u -m lm.cli.main config small | head -n 1; echo ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=here, env=environment)
    assert done.stderr == ""
    first, code = done.stdout.splitlines()
    assert first.split() == ["name", "small"] and code in ("0", "141")


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
@pytest.mark.parametrize("given", [{}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}])
def test_the_command_runs_with_memory_that_it_keeps_unless_told_otherwise(here, given):
    code = "import os; print(os.environ['GLIBC_TUNABLES'], os.getpid()); raise KeyboardInterrupt"
    (here / "experiments" / "shows.py").write_text(code, "utf-8")
    bare = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    child = subprocess.Popen(
        [sys.executable, "-m", "lm.cli.main", "config", "shows"],
        stdout=subprocess.PIPE, text=True, cwd=here, env=bare | given | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wanted = given.get("GLIBC_TUNABLES", ALLOCATOR["GLIBC_TUNABLES"])
    assert child.communicate()[0].split() == [wanted, str(child.pid)] and child.returncode == 130


@pytest.mark.parametrize(
    ("installed", "device", "environment", "platforms"),
    [
        (True, "", {}, "cpu"),
        (False, "", {}, None),
        (True, "/dev/accel*", {}, None),
        (True, "/dev/nvidia[0-9]*", {}, None),
        (True, "", {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (True, "", {"JAX_PLATFORMS": "tpu"}, "tpu"),
    ],
)
def test_no_tpu_is_asked_for_where_there_is_no_accelerator(
    monkeypatch, capsys, installed, device, environment, platforms
):
    found = {"libtpu": object() if installed else None}
    monkeypatch.setattr(os, "environ", dict(environment))
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    monkeypatch.setattr(glob, "glob", lambda pattern: [pattern] if pattern == device else [])
    assert main(["--version"]) == 0
    assert os.environ.get("JAX_PLATFORMS") == platforms


def test_overrides_are_what_no_flag_is():
    words = ["small", "--sft.steps", "-3", "--fresh", "--seed=7", "--until", "sft", "--name", "x"]
    own, overrides = split_overrides(words, {"--fresh", "--until"})
    assert own == ["small", "--fresh", "--until", "sft"]
    assert overrides == ["--sft.steps", "-3", "--seed=7", "--name", "x"]


@pytest.mark.parametrize(
    ("words", "flag"),
    [(["run", "small", "--run-dri", "x"], "--run-dir"), (["eval", "runs/x", "--taks=arc"], "--tasks"),
     (["plan", "small", "--topologi", "v5e:2x2"], "--topology")],
)  # fmt: skip
def test_a_misspelt_flag_is_no_field_of_the_experiment(here, capsys, words, flag):
    assert main(words) == 2
    misspelt = words[2].partition("=")[0]
    assert f"no flag {misspelt}; did you mean {flag}" in capsys.readouterr().err


def test_config_shows_the_resolved_value_and_what_changed(here, capsys):
    assert main(["config", "small", "--sft.steps=12", "--model.tied_head", "false"]) == 0
    lines = {line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["sft.steps"] == "12  (was 2)"
    assert lines["model.tied_head"] == "false  (was true)"
    assert lines["pretrain.steps"] == "3"


def test_config_as_json_is_what_a_run_saves(here, capsys):
    from lm.experiment import from_dict
    from lm.files import load
    from lm.overrides import override

    assert main(["config", "experiments/small.py", "--json", "--seed", "5"]) == 0
    saved = json.loads(capsys.readouterr().out)
    assert from_dict(saved) == override(load("small"), ["--seed", "5"])


def test_config_help_lists_every_knob_with_its_help(here, capsys):
    from lm.files import load
    from lm.overrides import knobs

    assert main(["config", "small", "--help"]) == 0
    text = capsys.readouterr().out
    for knob in knobs(load("small")):
        assert f"\n--{knob.name} " in text
        assert " ".join(knob.help.split()) in " ".join(text.split())
    assert "      peak learning rate, after the warmup (a number from 1e-12 to 1000; default\n      0.001)\n" in text
    assert max(map(len, text.splitlines())) <= 80


def test_config_help_is_grouped_by_the_part_of_the_experiment(here, capsys):
    assert main(["config", "small", "--help"]) == 0
    title, *blocks = re.split(r"^== (.*) ==$", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    groups = dict(zip([title, *blocks[1::2]], blocks[::2], strict=True))
    assert "--seed" in groups["the experiment"] and len(groups) == len({*groups})
    for title, text in groups.items():
        part = title.split(",")[0].replace("the experiment", "")
        assert all(name.rpartition(".")[0] == part for name in re.findall(r"^--(\S+)", text, flags=re.MULTILINE))


def test_config_search_shows_the_fields_that_have_all_words(here, capsys):
    assert main(["config", "small", "--search", "LEARNING warmup"]) == 0
    text = capsys.readouterr().out
    assert "peak_lr" in text and "warmup_steps" not in text and "usage" not in text


@pytest.mark.parametrize(("words", "told"), [("warmpu", "warmup"), ("", "a word")])
def test_config_search_of_nothing_tells_what_is_near(here, capsys, words, told):
    assert main(["config", "small", "--search", words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "code, returned, told",
    [
        ("import interrupted", -signal.SIGINT, ""),
        ("kill()", 0, "caught\n"),
        ("Destroyed(); time.sleep(60)", 0, "caught\n"),  # Python ignores exceptions of destructors
    ],
)
def test_ctrl_c_ends_the_process_inside_an_import_and_raises_elsewhere(tmp_path, code, returned, told):
    (tmp_path / "interrupted.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", "utf-8")
    script = f"""
import os, signal, sys, time
from lm.cli.main import interrupt, interrupted_again
sys.unraisablehook = interrupted_again
class Destroyed:
    def __del__(self):
        kill()
kill = lambda: os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, interrupt)
try:
    {code}
except KeyboardInterrupt:
    print("caught")
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout, done.stderr) == (returned, told, "")


@pytest.mark.parametrize("before", ["SIG_DFL", "SIG_IGN"])  # ignored: as a script has what it begins in its background
def test_ctrl_c_before_the_command_has_begun_waits_for_it(here, before):
    begin = (
        f"import os, signal, sys; signal.signal(signal.SIGINT, signal.{before}); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); os.kill(os.getpid(), signal.SIGINT); "
    )
    done = python(
        "-c", begin + "os.execv(sys.executable, [sys.executable, '-m', 'lm.cli.main', 'config', 'small'])", cwd=here
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_current_folder_that_was_removed_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["config", "tiny"]) == 2
    assert (
        capsys.readouterr().err == "lm: error: the current folder has been removed: change to one that is there (cd)\n"
    )
