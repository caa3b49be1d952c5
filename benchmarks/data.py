"""Data at speed: making the cache with one process and with several, reading batches from it, and what the loop waits.

  python benchmarks/data.py [--data ../shared/data/pretrain] [--processes 1,2]

prints the tables and keeps the numbers in benchmarks/results/data.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lm.data import packing, workers
from lm.data.pipeline import make_feed
from lm.data.selection import select
from lm.data.supply import Order, windows
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import Pretrain, Source, Stage
from lm.stored import cache_at
from lm.train.metrics import peak_memory_mb

RESULTS = Path(__file__).with_name("results") / "data.json"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "pretrain"
ROWS, SEQ_LEN, VOCAB = 32, 2048, 8192
STEPS = 400


def build(data: Path, tokenizer: SubwordTokenizer, processes: int) -> dict[str, float]:
    """Read and tokenise a folder with so many processes, from nothing and then from what is there."""
    workers.cores = lambda: processes  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, cache_at(Path(folder)):
        began = time.monotonic()
        rows, indices = select(Source(str(data)), "train")
        read = time.monotonic()
        supply = windows(rows, indices, SEQ_LEN, tokenizer, Order(1))
        made = time.monotonic()
        windows(*select(Source(str(data)), "train"), SEQ_LEN, tokenizer, Order(1))
        again = time.monotonic()
        size = sum(part.text_bytes for part in rows.parts)
    return {
        "processes": processes,
        "text_bytes": size,
        "tokens": supply.tally.tokens,
        "read_seconds": read - began,
        "tokenise_seconds": made - read,
        "tokens_per_second": supply.tally.tokens / (made - read),
        "again_seconds": again - made,
        "peak_memory_mb": peak_memory_mb(),
    }


def assemble(data: Path, tokenizer: SubwordTokenizer) -> dict[str, float]:
    """Batches of pretraining rows from the cache: the best and the median of five runs."""
    stage = Stage("bench", Pretrain(), (Source(str(data)),), batch_size=ROWS, seq_len=SEQ_LEN)
    with tempfile.TemporaryDirectory() as folder, cache_at(Path(folder)):
        feed = make_feed(stage, tokenizer, 0)
        rates = []
        for run in range(5):
            began = time.monotonic()
            for step in range(run * STEPS, (run + 1) * STEPS):
                feed.batch(step)
            rates.append(STEPS * ROWS * SEQ_LEN / (time.monotonic() - began))
    return {"rows": ROWS, "seq_len": SEQ_LEN, "best": max(rates), "median": float(np.median(rates))}


def pack(count: int = 1_000_000) -> dict[str, float]:
    """Which of a million conversations share a row of 2048."""
    lengths = np.random.default_rng(0).integers(20, 1000, count).tolist()
    began = time.monotonic()
    rows = packing.pack(lengths, SEQ_LEN)
    return {"conversations": count, "seconds": time.monotonic() - began, "filled": sum(lengths) / len(rows) / SEQ_LEN}


def waiting(data: Path, model: Path) -> dict[str, float]:
    """A short real pretraining: seconds that its loop waited for data, of its seconds in steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        small = "--model.num_layers 2 --model.embed_dim 128 --pretrain.steps 60 --pretrain.batch_size 8 --mesh.data 1"
        command = [
            sys.executable,
            "-m",
            "lm.cli.main",
            "run",
            "quickstart",
            "--run-dir",
            str(run),
            "--until",
            "pretrain",
        ]
        command += ["--tokenizer.path", str(model), "--pretrain.sources.0.path", str(data), *small.split()]
        command += ["--cache", str(Path(folder) / "cache"), "--pretrain.eval_every", "0"]
        root = Path(__file__).resolve().parents[1]
        subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL)
        summary = json.loads((run / "stages" / "pretrain" / "summary.json").read_text())
    steps = summary["seconds"] - sum(summary.get(f"{name}_seconds", 0.0) for name in ("compile", "eval", "save"))
    return {"steps": summary["steps"], "step_seconds": steps, "data_seconds": summary["data_seconds"]}


def measure(data: Path, processes: list[int]) -> dict[str, Any]:
    """Every number, each build in a process of its own, so that its peak of memory is its own."""
    rows, indices = select(Source(str(data)), "train")
    texts = [rows[int(i)]["text"][:20_000] for i in indices[:: max(1, len(indices) // 200)]]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = SubwordTokenizer.train(texts, VOCAB, folder)
        model = Path(folder) / "tokenizer.model"
        builds = [_alone(build, data, model, count) for count in processes]
        return {
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "build": builds,
            "assemble": assemble(data, tokenizer),
            "pack": pack(),
            "waiting": waiting(data, model),
        }


def _alone(function: Callable[..., dict[str, float]], data: Path, model: Path, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--data", str(data), "--build", str(count), "--model", str(model)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def tables(data: Path = DATA, processes: str = "1,2") -> str:
    """Measure, keep the numbers, and give them as Markdown."""
    found = measure(data, [int(count) for count in processes.split(",")])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return markdown(found)


def markdown(found: dict[str, Any]) -> str:
    """The tables of a measurement."""
    first = found["build"][0]
    lines = [
        f"Making the cache: {first['text_bytes'] / 1e6:.0f} MB of text, {first['tokens'] / 1e6:.1f} M tokens, "
        f"{found['machine']['cores']} cores",
        "",
        "| processes | read and split | tokenise | tokens/s | the same again | peak memory of the parent |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {b['processes']} | {b['read_seconds']:.1f} s | {b['tokenise_seconds']:.1f} s | "
        f"{b['tokens_per_second'] / 1e6:.2f} M | {b['again_seconds']:.2f} s | {b['peak_memory_mb']:.0f} MB |"
        for b in found["build"]
    ]
    read, packed, wait = found["assemble"], found["pack"], found["waiting"]
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| batches of {read['rows']} rows of {read['seq_len']} from the cache, one thread | "
        f"{read['median'] / 1e6:.1f} M tokens/s (best {read['best'] / 1e6:.1f} M) |",
        f"| packing {packed['conversations']:,} conversations into rows of {SEQ_LEN} | {packed['seconds']:.1f} s, "
        f"{packed['filled']:.1%} filled |",
        f"| the loop waits for data | {wait['data_seconds'] / wait['step_seconds']:.2%} of {wait['step_seconds']:.0f} s "
        f"({wait['steps']} steps) |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of texts (%(default)s)")
    parser.add_argument("--processes", default="1,2", help="how many make the cache, each in turn (%(default)s)")
    parser.add_argument("--build", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        print(json.dumps(build(arguments.data, SubwordTokenizer.load(arguments.model), arguments.build)))
    else:
        print(tables(arguments.data, arguments.processes))


if __name__ == "__main__":
    main()
