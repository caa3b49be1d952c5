"""The page of `lm rollouts` at speed: first page, filters, search and tokens, with 100,000 rollouts on file.

  python benchmarks/rollouts.py [--steps 200] [--rollouts-a-step 512] [--folder DIR]

The rollouts are made up, and written as training writes them; a folder with rollouts is used as it is. Prints wall and CPU milliseconds of
each request, the first of which makes the index."""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import GRPO, Experiment, Source, Stage, to_dict
from lm.rollout.trajectory import Rollout, Trajectory
from lm.stored import write_json_atomic
from lm.train.trajectory_files import trajectory_files
from lm.train.trajectory_writer import keep_trajectories
from lm.web.rollout_viewer import serve_rollouts

GROUP = 8
WORDS = (
    "the number is forty two and so we add seven then carry one because therefore the sum of each minus three".split()
)
REQUESTS = (
    "groups",
    "groups?filter=no_signal",
    "groups?filter=truncated,disagreement&sort=gap",
    "groups?steps=50-150&sort=reward_low&page=7",
    "groups?search=because+therefore+seven",
    "groups?search=because+therefore+seven&page=2",
    "group?step=1&group=3",
    "tokens?step=1&group=3&place=2",
)


def write_run(folder: Path, stage: Stage, steps: int, count: int) -> None:
    """A run with `count` rollouts of 60 to 260 tokens at each step."""
    write_json_atomic(folder / "experiment.json", json.loads(json.dumps(to_dict(Experiment("bench", (stage,))))))
    tokenizer = SubwordTokenizer.train([" ".join(WORDS)], 300, folder / "tokenizer")
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        found, numbers = [], {}
        for place in range(count):
            question = f"What is {step % 20} times {place // GROUP}? Show the steps."
            answer = " ".join(rng.choice(WORDS, int(rng.integers(30, 130))))
            parts = [np.array(tokenizer.encode(text), np.int32) for text in (question, answer)]
            authors = np.repeat(np.array([0, 1], np.int8), list(map(len, parts)))
            logp = np.where(authors == 1, -rng.exponential(0.5, len(authors)), 0).astype(np.float32)
            turns = (("user", question, "prompt"), ("assistant", answer, "model"))
            messages = tuple(dict(zip(("role", "content", "author"), turn, strict=True)) for turn in turns)
            right, finish = float(rng.random() < 0.5), "stop" if rng.random() < 0.9 else "length"
            rewards = {"answer": right, "style": float(rng.random())}
            task = {"question": question, "answer": "42"}
            found.append(
                Trajectory(task, messages, np.concatenate(parts), authors, logp, finish, step - 1, rewards, right)
            )
            numbers[place] = {"trainer_logp": logp + rng.normal(0, 1e-5, len(logp)).astype(np.float32)}
        rollout = Rollout([], found, rng.normal(size=count), np.arange(count), {})
        keep_trajectories(folder / "stages" / stage.name, stage, step, rollout, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rollouts-a-step", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="lm-rollouts-"))
    folder.mkdir(parents=True, exist_ok=True)
    stage = Stage("reason", GRPO(group_size=GROUP), (Source("gen:arithmetic"),), trajectory_mb=10**5)
    if not trajectory_files(folder / "stages" / stage.name):
        write_run(folder, stage, arguments.steps, arguments.rollouts_a_step)
    files = trajectory_files(folder / "stages" / stage.name)
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB")
    server = serve_rollouts(folder, None, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for request in REQUESTS:
        wall, cpu = time.perf_counter(), time.process_time()
        with urllib.request.urlopen(f"http://localhost:{server.server_port}/api/{request}") as reply:
            told = json.load(reply)
        wall, cpu = (1000 * (now - then) for now, then in ((time.perf_counter(), wall), (time.process_time(), cpu)))
        found = f"{told['rollouts_found']:,} of {told['total']['rollouts']:,} rollouts" if "groups" in told else ""
        print(f"{wall:8.0f} ms ({cpu:.0f} CPU)  {request}  {found}", flush=True)


if __name__ == "__main__":
    main()
