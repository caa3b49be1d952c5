"""SIGKILL right before chosen changes of the disk, again and again in one run: what is left in the end is the whole run's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import orbax.checkpoint.experimental.v1 as ocp
import pytest

from lm.cli.main import main
from lm.train.metrics import read_lines
from lm.train.run_folder import RunFolder
from tests.train.runs import metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = """
from lm.experiment import GRPO, SFT, Collect, Eval, Experiment, Mesh, Model, Optimizer, Source, Stage, Tokenizer

asked = Source("asked.jsonl", holdout=0.2)
often = {"optimizer": Optimizer(peak_lr=3e-3, warmup_steps=1), "batch_size": 4, "seq_len": 48, "eval_every": 2, "evals": ("asked",)}
experiment = Experiment(
    name="killed",
    prompts=("Tell abcd",),
    tokenizer=Tokenizer(vocab_size=320),
    model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=64),
    mesh=Mesh(data=1),
    stages=(
        Stage("collect", Collect(verifier="style", max_new_tokens=4, make="best"), (asked,), steps=2, batch_size=4, seq_len=48),
        Stage("sft", SFT(), (asked,), steps=3, save_every=1, keep_moments=False, **often),
        Stage("grpo", GRPO(group_size=2, max_new_tokens=4, verifier="style"), (asked,), steps=3, save_every=2, **often),
        Stage("stale", GRPO(group_size=2, max_new_tokens=4, verifier="style", max_staleness=1), (asked,), steps=3, save_every=1, **often),
    ),
    evals=(Eval("asked", asked, verifier="style", count=4, max_new_tokens=4),),
)
"""
# Before which change the process kills itself: (event of Python's audit hooks, path in the run's folder, how many times seen).
POINTS = (
    ("os.rename", r"tokenizer/tokenizer\.model\..*tmp", 1),
    ("open", r"stages/collect/answers\.jsonl$", 2),
    ("open", r"stages/sft/eval\.jsonl$", 1),
    ("os.rename", r"stages/sft/checkpoints/00000002/manifest\.json\.tmp", 1),
    ("os.rename", r"stages/sft/summary\.json\.tmp", 1),
    ("shutil.rmtree", r"stages/sft/checkpoints/00000003/opt_state", 1),
    ("os.rename", r"stages/grpo/checkpoints/00000002/manifest\.json\.tmp", 1),
    ("os.rename", r"stages/grpo/trajectories/step-00000003.*\.tmp", 1),
    ("os.rename", r"stages/stale/ahead/step-00000003.*\.tmp", 1),
    ("os.rename", r"stages/stale/checkpoints/00000003/manifest\.json\.tmp", 1),
)
# One process loads the package, and a process that it forks runs the command for each point: loading takes longer than the rest.
COMMAND = """
import json, os, re, signal, sys
import lm.train.stages
from lm.cli.main import main

def kill_before(event, path, left):
    def hook(name, args):
        nonlocal left
        if name == event and args and isinstance(args[0], (str, os.PathLike)) and re.search(path, os.fspath(args[0])):
            if name != "open" or (isinstance(args[1], str) and "r" not in args[1]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

points, *words = sys.argv[1:]
for point in json.loads(points):
    child = os.fork()
    if not child:
        kill_before(*point)
        sys.exit(main(words))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != -signal.SIGKILL:
        sys.exit(f"{point}: {code}")
"""


def lines(run_dir: Path, stage: str, kind: str) -> list[str]:
    """The lines of a stage's file, in no order of time: what a kill interrupted is written later."""
    return sorted(json.dumps(line, sort_keys=True) for line in read_lines(run_dir / "stages" / stage / f"{kind}.jsonl"))


def test_a_run_that_was_killed_at_every_kind_of_change_is_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("killed.py").write_text(EXPERIMENT)
    words = [a + b + c for a in "bdgk" for b in "aeio" for c in "lmn"]
    rows = [{"question": f"Tell {word}", "answer": f"Gladly. {word} no"} for word in words]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("run", "killed.py", "--no-report", "--run-dir")
    assert main([*command, "whole"]) == 0
    words = [sys.executable, "-c", COMMAND, json.dumps(POINTS), *command, "pieces"]
    killed = subprocess.run(words, capture_output=True, text=True)
    assert killed.returncode == 0, killed.stdout + killed.stderr
    assert main([*command, "pieces"]) == 0
    whole, pieces = Path("whole"), Path("pieces")
    for stage in ("collect", "sft", "grpo", "stale"):
        assert metrics(whole, stage) == metrics(pieces, stage)
        for kind in ("eval", "samples"):
            assert lines(whole, stage, kind) == lines(pieces, stage, kind)
    for stage in ("sft", "grpo", "stale"):
        folders = [RunFolder(run).checkpoints(stage) for run in (whole, pieces)]
        assert [path.name for path in sorted(folders[0].iterdir())] == [
            path.name for path in sorted(folders[1].iterdir())
        ]
        one, other = (arrays(ocp.load_checkpointables((folder / "00000003").absolute())) for folder in folders)
        assert one == other and any("opt_state" in name for name in one) == (stage != "sft")
    for name in ("answers.jsonl", "made.jsonl"):
        assert (whole / "stages/collect" / name).read_bytes() == (pieces / "stages/collect" / name).read_bytes()
    assert files(whole) == files(pieces)


def arrays(value, name: str = "") -> dict[str, bytes]:
    if not isinstance(value, dict):
        return {name: value.tobytes()}
    return {key: data for part, item in value.items() for key, data in arrays(item, f"{name}/{part}").items()}


def files(run_dir: Path) -> set[str]:
    """What is in the folder, but for what only a run that was stopped has, and names by chance."""
    found = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    return {name for name in found if not re.search(r"checkpoints/|tensorboard/|/time\.json$", name)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"]
