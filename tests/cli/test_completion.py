"""The Tab key: commands, names, fields of the experiment and their values, without jax, in a real shell too."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LM = [sys.executable, "-m", "lm.cli.main"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a run and an experiment of its own."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "experiments").mkdir()
    (folder / "experiments" / "mine.py").write_text((ROOT / "experiments" / "text_file.py").read_text("utf-8"))
    (folder / "runs" / "first").mkdir(parents=True)
    stages = [{"name": "early", "objective": {"kind": "Pretrain"}}]
    (folder / "runs" / "first" / "experiment.json").write_text(json.dumps({"name": "first", "stages": stages}))
    return folder


def ask(work, line, *python) -> subprocess.CompletedProcess:
    """What is offered at the end of a line, one a line in the file `offered`."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(work / "offered"),
    }  # fmt: skip
    (work / "offered").write_text("")
    command = [sys.executable, *python, "-m", "lm.cli.main"]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)


def offered(work, line) -> set[str]:
    ask(work, line)
    return set((work / "offered").read_text().splitlines())


@pytest.mark.parametrize(
    ("line", "there", "not_there"),
    [
        ("lm r", {"run", "runs", "report", "rerun"}, {"sample"}),
        ("lm run m", {"mine"}, {"quickstart", "papers"}),
        ("lm run ", {"mine", "quickstart"}, {"first"}),
        ("lm run mine --", {"--fresh", "--model.", "--pretrain.", "--seed"}, {"--model.num_layers"}),
        ("lm run mine --model.num_", {"--model.num_layers", "--model.num_heads"}, {"--model.embed_dim"}),
        ("lm run mine --pretrain.optimizer.kind ", {"adamw", "muon"}, {"--fresh"}),
        ("lm run mine --pretrain.steps ", set(), {"runs/"}),
        ("lm run nothing --model.num_", set(), {"--model.num_layers"}),
        ("lm run mine --until p", {"pretrain", "preference"}, {"sft"}),
        ("lm sweep ", {"ablations.pretraining"}, {"mine"}),
        ("lm sample f", {"first"}, {"mine"}),
        ("lm sample first --stage ", {"early"}, {"first"}),
        ("lm sample --t", {"--temperature", "--top-k", "--top-p"}, {"--seed"}),
        ("lm run 'mi", {"mine"}, set()),
    ],
)
def test_what_is_offered(work, line, there, not_there):
    found = offered(work, line)
    assert there <= found and not not_there & found


def test_an_experiment_that_fails_offers_no_fields_and_prints_nothing(work):
    (work / "broken.py").write_text("print('hello')\nraise RuntimeError")
    done = ask(work, "lm run broken.py --fr")
    assert (work / "offered").read_text() == "--fresh" and done.returncode == 0 and "RuntimeError" not in done.stderr


def test_completion_loads_nothing_slow(work):
    loaded = ask(work, "lm run mine --model.num_", "-X", "importtime").stderr
    assert "lm.overrides" in loaded and not [name for name in ("jax", "numpy", "rich") if f" {name}\n" in loaded]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_text_for_a_shell_names_the_command(shell):
    done = subprocess.run([*LM, "completion", shell], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "_ARGCOMPLETE" in done.stdout and " lm" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_with_that_text(work, tmp_path, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "lm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lm.cli.main "$@"\n')
    command.chmod(0o755)
    line = "lm run mine --model.num_l"
    asks = {
        "bash": f"""eval "$(lm completion bash)"
            COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
            $(complete -p lm | grep -o "_[a-z_]*") lm; echo "${{COMPREPLY[@]}}" """,
        "zsh": f"""autoload -Uz compinit; compinit -u; eval "$(lm completion zsh)"
            _describe() {{ print -l ${{(P)2}} }}; words=(lm run); BUFFER={line!r}; CURSOR=${{#BUFFER}}; _python_argcomplete""",
        "fish": f"lm completion fish | source; complete -C {line!r}",
    }
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [shell, "-c", asks[shell]], cwd=work, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "--model.num_layers" in done.stdout, done.stderr
