"""`lm` as a contestant: one contest of the peers' kit with the product's own step and sampler, one JSON line at the end.

    python benchmarks/contest_lm.py A --dtype float32 --kit FOLDER

FOLDER has the kit's `contests.py`, which says what each contest is and times it; $PEER_KIT if not given. Contest `lora` is A with
an adapter of rank 16 on all linear layers of a base in the contest's dtype.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from lm.algorithms.grpo import grpo_rollout, grpo_sample
from lm.allocator import keep_freed_memory
from lm.data.prompts import Prompts
from lm.experiment import DPO, GRPO, LoRA, Mesh, Model, Objective, Optimizer, Pretrain, Source, Stage
from lm.model.transformer import Transformer
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import batch_sharding
from lm.rollout.engine import LocalEngine, Request
from lm.rollout.environment import RewardsByName
from lm.rollout.episodes import EnvironmentSpec, Episode, Tasks, environment_spec
from lm.train.loop import start_state
from lm.types import TokenBatch

FIRST_WORD = 3  # smaller token ids are special
PAD = 0


def load_kit(folder: str | None) -> ModuleType:
    """The kit's definitions; ends the program with one clear line where they are missing."""
    if not folder or not (Path(folder) / "contests.py").is_file():
        sys.exit(f"contest_lm: skipped, no contests.py in {folder!r}: name the kit's folder by --kit or PEER_KIT")
    sys.path.insert(0, folder)
    return importlib.import_module("contests")


def model_of(kit: ModuleType, contest: str, dtype: str) -> Transformer:
    """The contests' decoder. What trains is in float32, the parameters that are only read in `dtype`."""
    m = kit.MODEL
    config = Model(
        num_layers=m["layers"], embed_dim=m["d_model"], num_heads=m["heads"], num_kv_heads=m["kv_heads"],
        head_dim=m["head_dim"], mlp_dim=m["ffn"], max_len=1024, rope_theta=m["rope_theta"], norm_eps=m["norm_eps"],
        qk_norm=False, tied_head=m["tied"], scan_unroll=m["layers"], compute_dtype=dtype,
        param_dtype=dtype if contest in ("B", "lora") else "float32",
    )  # fmt: skip
    return jax.jit(lambda key: Transformer(config, m["vocab"], key))(jax.random.key(0))


def stage_of(kit: ModuleType, objective: Objective, rows: int, length: int) -> Stage:
    """A stage with the contests' AdamW."""
    o = kit.OPT
    optimizer = Optimizer(
        peak_lr=o["lr"], schedule="constant", warmup_steps=0, b2=o["b2"], weight_decay=o["weight_decay"],
        clip_norm=o["clip"],
    )  # fmt: skip
    return Stage("contest", objective, (Source("random tokens"),), optimizer, batch_size=rows, seq_len=length)


class Trainer:
    """A training state and its step, as `lm run` has them."""

    def __init__(self, stage: Stage, model: Transformer):
        self.mesh = make_mesh(Mesh())
        jax.set_mesh(self.mesh)
        self.state, self.step = start_state(stage, model, self.mesh, key=jax.random.key(0))

    def __call__(self, batch: TokenBatch) -> float:
        """One update; the loss, read back."""
        self.state, metrics = self.step(self.state, jax.device_put(batch, batch_sharding(self.mesh)))
        return float(metrics["loss"])


def random_rows(kit: ModuleType, rows: int, length: int, prompt: int) -> TokenBatch:
    """Random tokens, each row one segment, with weight on what follows the prompt."""
    tokens = random_tokens(kit, rows, length)
    weights = np.broadcast_to(np.arange(length) >= prompt, tokens.shape).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return TokenBatch(tokens, weights, np.ones_like(tokens), positions)


def random_tokens(kit: ModuleType, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(FIRST_WORD, kit.MODEL["vocab"], shape).astype(np.int32)


def pretrain(
    kit: ModuleType, c: dict[str, Any], model: Transformer, rank: int = 0, microbatches: int = 1
) -> dict[str, Any]:
    lora = LoRA(rank=rank, alpha=2 * rank or 1)
    stage = stage_of(kit, Pretrain(), c["batch"], c["seq"])
    train = Trainer(replace(stage, lora=lora, microbatches=microbatches), model)
    batch = random_rows(kit, c["batch"], c["seq"], prompt=1)
    return kit.timed(lambda: train(batch), "A")


def adapter(kit: ModuleType, c: dict[str, Any], model: Transformer, microbatches: int = 1) -> dict[str, Any]:
    keep_freed_memory(False)  # as `lm run` does where an adapter trains
    return pretrain(kit, c, model, rank=16, microbatches=min(microbatches, c["batch"]))


def sampling(kit: ModuleType, c: dict[str, Any], model: Transformer) -> dict[str, Any]:
    tokens = random_tokens(kit, c["batch"], c["prompt"])
    tokenizer: Any = Words(kit.MODEL["vocab"])
    engine = LocalEngine(model, tokenizer)

    def step() -> None:
        request = Request(tokens, jax.random.key(0), c["new"], c["temperature"])
        assert all(len(one.tokens) == c["new"] for one in engine.complete(request))

    return kit.timed(step, "B")


def preference(kit: ModuleType, c: dict[str, Any], model: Transformer) -> dict[str, Any]:
    train = Trainer(stage_of(kit, DPO(beta=c["beta"]), c["pairs"], c["seq"]), model)
    batch = random_rows(kit, 2 * c["pairs"], c["seq"], c["prompt"])
    return kit.timed(lambda: train(batch), "C")


class Words:
    """A tokenizer of one word an id, in which nothing ends an answer: no such token is ever sampled."""

    pad_id = PAD
    chats, has_template = True, False

    def __init__(self, vocab_size: int):
        self.vocab_size, self.end_ids = vocab_size, (vocab_size,)

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


class RandomPrompts:
    """A feed of random prompts, the same ones at every step."""

    def __init__(self, kit: ModuleType, prompts: int, length: int):
        rows = [{"prompt": f"prompt {i}"} for i in range(prompts)]
        self.prompt_len, self.tokenizer = length, Words(kit.MODEL["vocab"])
        self.all = Prompts(random_tokens(kit, prompts, length), np.full(prompts, length, np.int32), rows)

    def batch(self, step: int) -> Prompts:
        return self.all


def judge(spec: EnvironmentSpec, episodes: Sequence[Episode]) -> list[RewardsByName | None]:
    """The reward that the peers' GRPO contestants have."""
    return [{"reward": float(sum(map(ord, episode.text[:64])) % 7)} for episode in episodes]


def reinforcement(kit: ModuleType, c: dict[str, Any], model: Transformer) -> dict[str, Any]:
    objective = GRPO(
        group_size=c["group"], max_new_tokens=c["new"], temperature=c["temperature"], kl_coef=c["beta"]
    )  # fmt: skip
    stage = stage_of(kit, objective, c["prompts"], c["prompt"] + c["new"])
    train = Trainer(stage, model)
    feed: Any = RandomPrompts(kit, c["prompts"], c["prompt"])
    spec = dataclasses.replace(environment_spec((), "", stage.name, stage.name, 10.0), judge=judge)
    tasks, place = Tasks(feed, spec), batch_sharding(train.mesh)
    seconds: list[float] = []

    def step() -> None:
        began, number = time.perf_counter(), len(seconds)
        engine = LocalEngine(train.state.models["policy"], feed.tokenizer, number)
        key = jax.random.key(number)
        sampled = grpo_sample(engine, {}, tasks, stage, number, key, place)
        rollout = grpo_rollout(sampled, train.state, tasks, stage, number, key, place)
        seconds.append(time.perf_counter() - began)
        for batch in rollout.batches:
            train(batch)

    result = kit.timed(step, "D")
    rollout = statistics.median(seconds[c["warmup"] :])
    update = statistics.median(result["times"]) - rollout
    return result | {"rollout_ms": round(rollout * 1e3, 1), "update_ms": round(update * 1e3, 1)}


CONTESTS = {"A": pretrain, "B": sampling, "C": preference, "D": reinforcement, "lora": adapter}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contest", choices=tuple(CONTESTS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--microbatches", type=int, default=1, help="of the contest `lora`: gradient accumulation")
    parser.add_argument("--kit", default=os.environ.get("PEER_KIT"), help="folder of the kit's contests.py")
    arguments = parser.parse_args()
    kit = load_kit(arguments.kit)
    model = model_of(kit, arguments.contest, arguments.dtype)
    sizes = "A" if arguments.contest == "lora" else arguments.contest
    options = {"microbatches": arguments.microbatches} if arguments.contest == "lora" else {}
    result = CONTESTS[arguments.contest](kit, kit.CONTESTS[sizes], model, **options)
    extra = {name: result.pop(name) for name in ("rollout_ms", "update_ms") if name in result}
    kit.emit("lm", sizes, arguments.dtype, result, **extra)


if __name__ == "__main__":
    main()
