"""A PPO update against a GRPO update of the same tokens and model, in turns, by processor time.

    python benchmarks/ppo_update.py [--rounds 5] [--dtype float32]

Rows are prompts of 64 tokens with answers of 128, 32 of them; eight answers share a prompt in GRPO and in `GRPO, each prompt
its own` none do, as in PPO. Prints the median seconds of an update and its ratio to GRPO's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import jax
import numpy as np

from lm.experiment import GRPO, PPO, Mesh, Model, Optimizer, Source, Stage
from lm.model.heads import Scorer
from lm.model.transformer import Transformer
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import batch_sharding
from lm.train.loop import start_state
from lm.types import SharedPrompt, TokenBatch

VOCAB, PROMPT, ANSWER, ROWS, GROUP = 8192, 64, 128, 32, 8


def batch_of(group: int) -> TokenBatch:
    """Random rows whose neighbours, `group` at a time, share their prompt."""
    rng = np.random.default_rng(0)
    shape = (ROWS, PROMPT + ANSWER)
    tokens = rng.integers(3, VOCAB, shape).astype(np.int32)
    tokens[:, :PROMPT] = np.repeat(tokens[::group, :PROMPT], group, axis=0)
    weights = np.broadcast_to(np.arange(shape[1]) >= PROMPT, shape).astype(np.float32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    drawn = [(rng.standard_normal(shape) * weights).astype(np.float32) for _ in range(5)]
    plain = TokenBatch(tokens, weights, np.ones(shape, np.int32), positions, shared=SharedPrompt(group, PROMPT))
    names = ("advantages", "old_logp", "ref_logp", "values", "returns")
    return replace(plain, **dict(zip(names, drawn, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    config = Model(
        num_layers=8, embed_dim=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1408, max_len=1024, qk_norm=False,
        tied_head=False, scan_unroll=8, compute_dtype=arguments.dtype,
    )  # fmt: skip
    model = jax.jit(lambda key: Transformer(config, VOCAB, key))(jax.random.key(0))
    mesh = make_mesh(Mesh())
    jax.set_mesh(mesh)
    contestants = {
        "GRPO": (GRPO(max_new_tokens=ANSWER), GROUP),
        "GRPO, each prompt its own": (GRPO(max_new_tokens=ANSWER), 1),
        "PPO, values from a head on the policy": (PPO(verifier="answer", max_new_tokens=ANSWER, critic="head"), 1),
        "PPO, a critic of its own": (PPO(verifier="answer", max_new_tokens=ANSWER), 1),
    }
    ready = {}
    for name, (objective, group) in contestants.items():
        stage = Stage(
            "update",
            objective,
            (Source("random tokens"),),
            Optimizer(warmup_steps=0),
            batch_size=ROWS,
            seq_len=PROMPT + ANSWER,
        )
        scorers: tuple[Scorer, ...] = ()
        state, step = start_state(stage, model, mesh, scorers)
        ready[name] = [state, step, jax.device_put(batch_of(group), batch_sharding(mesh))]
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(arguments.rounds + 1):
        for name, (state, step, batch) in ready.items():
            began = time.process_time()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            ready[name][0] = state
            if turn:  # the first compiles
                seconds[name].append(time.process_time() - began)
    base = statistics.median(seconds["GRPO"])
    print("| update | processor s, median | to GRPO's | least and most of a round |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratios = [one / other for one, other in zip(found, seconds["GRPO"], strict=True)]
        print(
            f"| {name} | {statistics.median(found):.2f} | {statistics.median(found) / base:.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
