"""Tokens per second of the engine, against that of another clone, in turns.

    python benchmarks/engine.py --against CLONE [--cases geometric shared plain] [--rounds 3] [--dtype bfloat16] [--small]

CLONE is the folder of another commit. Each case runs in one process for each clone, which take turns, round by round: what else the
machine does slows both. Rates are by wall clock and by CPU time, ratios are medians over rounds. No token ends a completion:
lengths are drawn beforehand, and given as limits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from lm.experiment import Model
from lm.model.transformer import Transformer
from lm.rollout.engine import LocalEngine, Request

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engine.json"
VOCAB = 8192
SIZES = {
    False: {"num_layers": 8, "embed_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_dim": 1408},
    True: {"num_layers": 2, "embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 704},
}


@dataclass(frozen=True)
class Case:
    """A request. `median` is that of the lengths, whose 99th percentile is 8 times as much; 0: all have `new` tokens."""

    prompts: int
    group: int
    prompt: int
    new: int
    median: int = 0

    def lengths(self) -> np.ndarray:
        """Tokens of each completion: log-normal, cut at `new`."""
        rows = self.prompts * self.group
        if not self.median:
            return np.full(rows, self.new)
        spread = np.log(8) / statistics.NormalDist().inv_cdf(0.99)
        drawn = self.median * np.exp(spread * np.random.default_rng(0).standard_normal(rows))
        return np.clip(np.round(drawn), 1, self.new).astype(int)


CASES = {
    "plain": Case(prompts=16, group=1, prompt=64, new=192),
    "geometric": Case(prompts=128, group=1, prompt=64, new=256, median=32),
    "shared": Case(prompts=4, group=8, prompt=1024, new=192),
    "both": Case(prompts=16, group=8, prompt=1024, new=256, median=32),
}


def serve(case: Case, dtype: str, small: bool) -> None:
    """Complete the request once, and again for each line of the standard input; print seconds as JSON."""
    config = Model(
        head_dim=64, max_len=2048, qk_norm=False, tied_head=False, compute_dtype=dtype, param_dtype=dtype, **SIZES[small]
    )  # fmt: skip
    model = jax.jit(lambda key: Transformer(config, VOCAB, key))(jax.random.key(0))
    tokenizer: Any = SimpleNamespace(end_ids=(VOCAB,), pad_id=0, vocab_size=VOCAB)
    prompts = np.random.default_rng(1).integers(3, VOCAB, (case.prompts, case.prompt)).tolist()
    lengths = case.lengths()
    request = Request(
        prompts, jax.random.key(0), case.new, 1.0, case.group, case.prompt, limits=lengths.tolist()
    )  # fmt: skip
    engine = LocalEngine(model, tokenizer)
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        found = engine.complete(request)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        assert [len(one.tokens) for one in found] == lengths.tolist()
        print(json.dumps(seconds | {"tokens": int(lengths.sum())}), flush=True)
        if not sys.stdin.readline():
            return


def measure(name: str, clones: list[Path], rounds: int, options: list[str]) -> dict[str, Any]:
    """The rates of the clones in one case, and the ratios of the first to the second."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", name, *options]
    servers = [
        subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(clone)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for clone in clones
    ]  # fmt: skip
    found: list[list[dict[str, float]]] = [[] for _ in servers]
    for turn in range(rounds + 1):
        for server, seen in zip(servers, found, strict=True):
            assert server.stdin and server.stdout
            if turn:
                server.stdin.write("again\n")
                server.stdin.flush()
            line = json.loads(server.stdout.readline())
            seen += [line] if turn else []  # the first compiles
            print(name, turn, line, file=sys.stderr, flush=True)
    for server in servers:
        server.communicate()
    rates = {
        f"tokens_per_{kind}_s": [round(max(one["tokens"] / one[kind] for one in seen), 1) for seen in found]
        for kind in ("wall", "cpu")
    }
    ratios = {
        f"ratio_{kind}": round(statistics.median(old[kind] / new[kind] for new, old in zip(*found, strict=True)), 2)
        for kind in ("wall", "cpu")
    }
    return rates | ratios | {"rounds": rounds, "options": options}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CLONE")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--small", action="store_true", help="2 layers of width 256 instead of 8 of 512")
    parser.add_argument("--serve", choices=tuple(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(CASES[arguments.serve], arguments.dtype, arguments.small)
        return
    if not arguments.against:
        parser.error("--against CLONE: the folder of the commit to compare with")
    options = ["--dtype", arguments.dtype, *(["--small"] if arguments.small else [])]
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.cases:
        result = measure(name, [HERE.parent, arguments.against.resolve()], arguments.rounds, options)
        kept[" ".join([name, *options[1:]])] = result
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(name, json.dumps(result))


if __name__ == "__main__":
    main()
