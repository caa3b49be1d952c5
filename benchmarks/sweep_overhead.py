"""What a sweep costs beyond its runs: 24 small trials by two workers, with and without kills, against `lm run` of each alone.

python benchmarks/sweep_overhead.py        (about five minutes on two cores)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from lm.sweep.worker import environment

SWEEP = """
from lm.experiment import SFT, Eval, Experiment, Model, Optimizer, Pretrain, Source, Stage, Tokenizer
from lm.sweep.sweep import Sweep

fast = Optimizer(warmup_steps=2)
sizes = {"steps": 60, "batch_size": 4, "seq_len": 64, "save_every": 20, "optimizer": fast}
drills = Source("gen:drills", holdout=0.1)
base = Experiment(
    name="many",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=400),
    model=Model(num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64, max_len=64),
    stages=(
        Stage("pretrain", Pretrain(), (drills,), **sizes),
        Stage("sft", SFT(), (Source("gen:arithmetic", holdout=0.5),), **sizes),
    ),
    evals=(Eval("text", drills, "bits_per_byte", count=4, max_new_tokens=8),),
)
axes = {"sft.optimizer.peak_lr": (1e-3, 2e-3, 3e-3, 4e-3), "pretrain.optimizer.peak_lr": (1e-3, 2e-3)}
sweep = Sweep("many", base, axes, seeds=(0, 1, 2))
"""
LM = [sys.executable, "-m", "lm.cli.main"]


def seconds(work) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def sweep(folder: Path, kills: int = 0) -> None:
    """The whole sweep; `kills`: SIGKILL so many of its runs, half a minute apart."""
    words = [
        "sweep",
        str(folder.parent / "many.py"),
        "--workers",
        "2",
        "--folder",
        str(folder),
        "--store",
        f"{folder}-shared",
    ]
    child = subprocess.Popen([*LM, *words], stdout=subprocess.DEVNULL, start_new_session=True)
    for _ in range(kills):
        time.sleep(25)
        found = subprocess.run(
            ["pgrep", "-n", "-f", f"run {folder}/trials"], capture_output=True, text=True
        ).stdout.split()
        if found:
            os.kill(int(found[0]), signal.SIGKILL)
    assert child.wait() == 0


def bare(folder: Path, out: Path) -> None:
    """Every trial as a run of its own, two at a time on a core each, with the compilation cache that a sweep has."""
    trials = sorted((folder / "trials").iterdir())
    cores = sorted(os.sched_getaffinity(0))

    def some(place: int) -> None:
        for trial in trials[place::2]:
            words = ["run", str(trial / "experiment.json"), "--run-dir", str(out / trial.name)]
            child = subprocess.Popen(
                [*LM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(out / "cache")
            )
            os.sched_setaffinity(child.pid, {cores[place % len(cores)]})
            assert child.wait() == 0

    workers = [threading.Thread(target=some, args=(place,)) for place in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main() -> None:
    place = Path(tempfile.mkdtemp(prefix="lm-sweep-"))
    (place / "many.py").write_text(SWEEP)
    sweep(place / "warm")  # compiles, and tokenises
    shutil.rmtree(place / "warm-shared")
    (place / "bare").mkdir()
    shutil.copytree(Path.home() / ".cache" / "lm" / "compiled", place / "bare" / "cache" / "compiled")
    alone = seconds(lambda: bare(place / "warm", place / "bare"))
    for name, kills in (("undisturbed", 0), ("one run killed twice", 2)):
        took = seconds(lambda name=name, kills=kills: sweep(place / name.replace(" ", "-"), kills))
        ended = len(list((place / name.replace(" ", "-")).glob("trials/*/stages/sft/summary.json")))
        print(
            f"{name}: {took:.0f} s, {took / alone:.2f} of the {alone:.0f} s that the bare runs take; {ended} of 24 trials ended"
        )
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
