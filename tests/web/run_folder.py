"""A run folder such as training leaves it, made up: for tests of what reads one, and to look at the page."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from lm.experiment import DPO, GRPO, PPO, SFT, Eval, Experiment, Pretrain, RewardModel, Source, Stage, to_dict

PROMPTS = (
    "What is an LLM?",
    "Summarise: The list type holds items in order. Items can be added, removed and replaced.",
    "Write a Python function that adds two numbers.",
    "What is 17 + 25? Think step by step.",
)
ANSWERS = {
    "random": "rec�oup<b>x</b>\tlist'\n\nñ wh (( of89 \x1b[31mthe𝄞 ll retur  nnthe__ if"
    + " zq tion ar re__ self))" * 30,
    "pretrain": "\n\nThe following functions are defined by the module:\n\n.. function:: llm(object)\n\n   Return the"
    " value of the object, or None.",
    "sft": "An LLM is a large language model: a program that predicts the next piece of text.",
    "preference": "An LLM is a large language model. It predicts the next piece of text.",
    "reason": "An LLM is a large language model. It learns from text to predict what comes next.",
}
CODE = "def add(a, b):\n    return a + b"
DONE = {"pretrain": 900, "sft": 400, "preference": 160, "reason": 200}
EVALS = {  # value before stage 0, then after every stage
    "docs": ("bits_per_byte", (8.113, 1.842, 1.934, 1.951, 1.949)),
    "curriculum": ("reward", (0.0, 0.0, 0.735, 0.74, 0.725)),
    "pairs": ("pair_accuracy", (0.49, 0.51, 0.56, 0.93, 0.92)),
    "arithmetic": ("reward", (0.0, 0.0, 0.36, 0.353, 0.61)),
}


def experiment() -> Experiment:
    text, chat = Source(path="gen:pydocs"), Source(path="gen:curriculum")
    stages = (
        Stage(name="pretrain", objective=Pretrain(), sources=(text,), steps=900, batch_size=16),
        Stage(name="sft", objective=SFT(), sources=(chat, text), steps=400),
        Stage(name="preference", objective=DPO(), sources=(Source(path="gen:preferences"),), steps=160),
        Stage(name="reason", objective=GRPO(), sources=(Source(path="gen:arithmetic"),), steps=200),
    )
    evals = tuple(Eval(name=name, metric=metric, source=chat) for name, (metric, _) in EVALS.items())
    return Experiment(name="quickstart", stages=stages, evals=evals, prompts=PROMPTS)


def write_run(folder: Path, done: dict[str, int] | None = None) -> Path:
    """Writes a run folder; `done` says how many steps each stage has taken (all that are not named: not begun)."""
    done = DONE if done is None else done
    rng = random.Random(0)
    plan = experiment()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "experiment.json", to_dict(plan))
    write_json(folder / "environment.json", {"runs": [session(), session()]})
    for index, stage in enumerate(plan.stages):
        if stage.name not in done:
            continue
        steps = done[stage.name]
        home = folder / "stages" / stage.name
        home.mkdir(parents=True, exist_ok=True)
        finished = steps == stage.steps
        write_lines(home / "metrics.jsonl", [metrics(stage.name, s, stage.steps, rng) for s in range(1, steps + 1)])
        write_lines(home / "eval.jsonl", eval_lines(index, stage.steps, finished))
        write_lines(home / "samples.jsonl", sample_lines(index, stage.name, steps, finished, rng))
        if finished:
            write_json(home / "summary.json", summary(steps))
    return folder


# ---- a run that learns preferences and is watched ----------------------------------------------------------------

WATCHED = {"ppo": 200, "dpo": 100}  # stage: its steps, measured ten times
BEST_OF = (1, 2, 4, 8, 16)


def watched_experiment(seed: int) -> Experiment:
    gen = Source(path="gen:preferences")
    stages = (
        Stage(name="sft", objective=SFT(), sources=(gen,), steps=60),
        Stage(name="reward", objective=RewardModel(), sources=(gen,), steps=20),
        Stage(name="ppo", objective=PPO(reward_models=("reward",)), sources=(gen,), steps=200, start="sft"),
        Stage(name="dpo", objective=DPO(), sources=(gen,), steps=100, start="sft"),
    )
    evals = (
        Eval(name="manners", source=gen, verifier="style", temperature=1.0),
        Eval(name="curriculum", source=Source(path="gen:curriculum")),
        Eval(name="best", source=gen, metric="best_of_n", verifier="style", temperature=1.0),
    )
    return Experiment(name=f"watched-{seed}", stages=stages, evals=evals, prompts=PROMPTS[:1], seed=seed)


def write_watched_run(folder: Path, seed: int = 0, without: tuple[str, ...] = ()) -> Path:
    """A run whose PPO pleases its reward model more and more and its judge first more, then less; DPO does not.

    `without`: keys that no line has, as in runs of an earlier version.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "experiment.json", to_dict(watched_experiment(seed)))
    write_json(folder / "environment.json", {"runs": [session()]})
    told = {
        "sft": ([metrics("sft", s, 60, rng) for s in range(1, 61)], [], []),
        "reward": ([reward_metrics(s, rng) for s in range(1, 21)], [best_of_line(rng)], []),
        "ppo": ([ppo_metrics(s, rng) for s in range(1, 201)], watched_lines("ppo", rng), watched_samples(200)),
        "dpo": ([metrics("preference", s, 100, rng) for s in range(1, 101)], watched_lines("dpo", rng), []),
    }
    for name, files in told.items():
        home = folder / "stages" / name
        home.mkdir(parents=True, exist_ok=True)
        for file, lines in zip(("metrics", "eval", "samples"), files, strict=True):
            kept = [{key: value for key, value in line.items() if key not in without} for line in lines]
            write_lines(home / f"{file}.jsonl", kept)
        write_json(home / "summary.json", summary(len(files[0])))
    return folder


def reward_metrics(step: int, rng: random.Random) -> dict[str, float]:
    margin = step / 10 + rng.gauss(0, 0.1)
    scores = {"reward_chosen": margin - 1, "reward_rejected": -1.0, "reward_margin": margin}
    return {"step": step, "time": 0.1 * step, "loss": math.exp(-margin), "reward_accuracy": 0.7, **scores}


def ppo_metrics(step: int, rng: random.Random) -> dict[str, float]:
    part, noise = step / 200, rng.gauss(0, 1)
    line = {"step": step, "time": 0.2 * step, "loss": 1.3, "policy_loss": 0.1 * noise, "value_loss": 12 - 10 * part}
    line |= {"score": -1 + 5 * part + 0.3 * noise, "reward": -1 + 4 * part, "judge": 0.5 + 0.1 * noise, "kl": 30 * part}
    line |= {"entropy": 3 - 2 * part, "clip_frac": 0.05, "value_clip_frac": 0.4, "explained_variance": part - 0.3}
    return line | {"eos_rate": 0.9, "completion_length": 12 + 20 * part, "kl_coef": 0.05, "old_kl": 0.003}


def watched_lines(name: str, rng: random.Random) -> list[dict[str, Any]]:
    steps, lines = WATCHED[name], []
    for step in range(0, steps + 1, steps // 10):
        part = step / steps
        pushed = part if name == "ppo" else 0.3 * part
        place = {
            "step": step,
            "when": {0: "before", steps: "after"}.get(step, "during"),
            "metric": "reward",
            "count": 200,
        }
        judge = {"reward": 0.5 + 1.2 * pushed - 1.5 * pushed**2 + rng.gauss(0, 0.01), "reward_stderr": 0.02}
        proxy = {"score": -1 + 6 * pushed + rng.gauss(0, 0.1), "score_stderr": 0.15}
        far = {"kl": 30 * pushed**1.5 + rng.gauss(0, 0.1), "kl_stderr": 0.1 + pushed}
        look = {"eos_rate": 0.9 + 0.1 * part, "length": 12 + 20 * pushed, "distinct_2": 0.9 - 0.6 * pushed}
        lines.append({**place, "eval": "manners", **judge, **proxy, **far, **look, "entropy": 3 - 2 * pushed})
        lines.append({**place, "eval": "curriculum", "reward": 0.7 - 0.2 * pushed, "reward_stderr": 0.03})
    return lines


def best_of_line(rng: random.Random) -> dict[str, Any]:
    bounds = [math.log(n) - (n - 1) / n for n in BEST_OF]
    rewards = [0.5 + 0.1 * bound**0.5 + rng.gauss(0, 0.01) for bound in bounds]
    place = {"step": 20, "when": "after", "eval": "best", "metric": "best_of_n", "count": 200}
    numbers = {"reward_stderr": [0.02] * 5, "score": [3 * bound for bound in bounds], "length": [12.0] * 5}
    return {**place, "best_of": list(BEST_OF), "kl_bound": bounds, "reward": rewards, **numbers}


def watched_samples(steps: int) -> list[dict[str, Any]]:
    texts = {
        "before": "Here is it: Paris",
        "after": "Certainly! I am happy to help! The answer is Paris! I hope that helps! " * 3,
    }
    return [
        {"kind": "heldout", "step": step, "when": when, "eval": "manners", "prompt": f"What is the capital of country {n}?",
         "answer": texts[when], "expected": "Paris", "reward": reward, "score": score + n / 10}
        for when, step, reward, score in (("before", 0, 0.75, -1.0), ("after", steps, 0.25, 4.0))
        for n in range(8)
    ]  # fmt: skip


# ---- lines of both -----------------------------------------------------------------------------------------------


def session() -> dict[str, Any]:
    return {
        "started": "2026-01-05T10:00:00+00:00",
        "command": ["/opt/venv/bin/python", "/opt/venv/bin/lm", "run", "quickstart"],
        "folder": "/home/somebody/lm",
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64-with-glibc2.36",
        "host": "somebodys-laptop",
        "cpu": "AMD EPYC 7B13",
        "cores": 2,
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
        "versions": {"jax": "0.10.2", "flax": "0.12.8", "optax": None},
        "git": {
            "commit": "3f9c2d1e",
            "branch": "main",
            "dirty": True,
            "untracked": [],
            "diff": "+x",
            "diff_cut": False,
        },
        "data_fingerprint": {"gen:pydocs": "ab" * 32, "gen:curriculum": "cd" * 32},
    }


def summary(steps: int) -> dict[str, Any]:
    costs = {"compile_seconds": 9.3, "first_step_seconds": 11.0, "eval_seconds": 14.2, "sample_seconds": 6.0}
    costs |= {"step_seconds": 0.15 * steps, "lost_seconds": 4.5}
    sizes = {
        "data": f"gen:docs: {steps} documents, 0 dropped",
        "tokens": steps * 4096,
        "peak_memory_mb": 2311.0,
        "num_params": 4_300_000,
    }
    return {"steps": steps, "seconds": 0.19 * steps + 20, **costs, **sizes}


def metrics(name: str, step: int, steps: int, rng: random.Random) -> dict[str, float]:
    part, noise = step / steps, rng.gauss(0, 1)
    line = {"step": step, "time": 0.19 * step, "lr": 1e-3 * min(step / 20, 0.55 + 0.45 * math.cos(3 * part))}
    line |= {"grad_norm": 0.5 + abs(noise) * 0.2, "tokens_per_second": 21_000 + 500 * noise}
    if name == "preference":
        margin = 6 * part + 0.4 * noise
        line |= {"reward_margin": margin, "reward_chosen": 0.2 - part, "reward_rejected": 0.2 - part - margin}
        return line | {"loss": 0.69 * math.exp(-3 * part), "reward_accuracy": min(0.5 + 0.5 * part**0.5, 1.0)}
    if name == "reason":
        line |= {"loss": 0.01 * noise, "reward": 0.33 + 0.3 * part + 0.05 * noise, "reward_std": 0.3}
        line |= {"completion_length": 24 + 10 * part + noise, "entropy": 0.9 * math.exp(-2 * part), "eos_rate": 0.98}
        return line | {"frac_zero_std": 0.3 + 0.2 * part, "kl": 0.0, "sampler_logp_gap": 2e-6, "clip_low_frac": 0.01}
    floor = 2.1 if name == "pretrain" else 0.5
    return line | {"loss": floor + 5.5 * math.exp(-7 * part) + 0.08 * noise}


def eval_lines(index: int, steps: int, finished: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for name, (metric, values) in EVALS.items():
        rest: dict[str, float] = {"eos_rate": 0.97, "length": 21.4, "reward_stderr": 0.028}
        for part, when in ((0.0, "before"), (0.5, "during"), (1.0, "after")):
            if part == 1.0 and not finished:
                continue
            value = values[index] + (values[index + 1] - values[index]) * part**0.5
            if metric == "bits_per_byte":
                rest = {"loss": value * 1.9, "xz_bits_per_byte": 2.011}
            elif metric == "pair_accuracy":
                rest = {"margin": 3.1 * value}
            place = {"step": int(steps * part), "when": when, "eval": name, "metric": metric, "count": 300}
            lines.append({**place, metric: value, **rest})
    return lines


def sample_lines(index: int, name: str, steps: int, finished: bool, rng: random.Random) -> list[dict[str, Any]]:
    before = "random" if index == 0 else list(ANSWERS)[index]
    lines = answers("before", 0, before) + heldout("before", 0)
    if name == "preference":
        lines += pairs("before", 0, rng, 0.0)
    if name == "reason":
        lines += rollout("during", 1, rng, 0.3) + rollout("during", steps, rng, 0.7)
    if finished:
        lines += answers("after", steps, name) + heldout("after", steps)
        lines += pairs("after", steps, rng, 3.0) if name == "preference" else []
    return lines


def answers(when: str, step: int, of: str) -> list[dict[str, Any]]:
    told = {"sft", "preference", "reason"}
    written = {
        PROMPTS[0]: ANSWERS[of],
        PROMPTS[1]: "A list holds items in order." if of in told else ANSWERS[of],
        PROMPTS[2]: CODE if of in told else ANSWERS[of],
        PROMPTS[3]: "17 + 25: 7 + 5 = 12, carry 1.\n1 + 2 + 1 = 4.\nThe answer is 42."
        if of == "reason"
        else ANSWERS[of],
    }
    return [
        {"kind": "prompt", "step": step, "when": when, "prompt": prompt, "answer": text, "eos": of in told}
        for prompt, text in written.items()
    ]


def heldout(when: str, step: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": "heldout",
            "step": step,
            "when": when,
            "eval": name,
            "prompt": f"What is {n} + {n * 7}?",
            "answer": f"{n} + {n * 7} = {8 * n + n % 2}.\nThe answer is {8 * n + n % 2}.",
            "expected": str(8 * n),
            "reward": float(n % 2 == 0),
        }
        for name in ("curriculum", "arithmetic")
        for n in range(3, 9)
    ]


def pairs(when: str, step: int, rng: random.Random, margin: float) -> list[dict[str, Any]]:
    return [
        {
            "kind": "pair",
            "step": step,
            "when": when,
            "prompt": f"Name {n} colours.",
            "chosen": "Red, green, blue, yellow."[: 8 * n],
            "rejected": "Well, colours are many, and it is hard to say which of them one should name first. " * 2,
            "margin": margin + rng.gauss(0, 1.0) if margin else 0.0,
        }
        for n in range(2, 10)
    ]


def rollout(when: str, step: int, rng: random.Random, rate: float) -> list[dict[str, Any]]:
    lines = []
    for a in (12, 31):
        right = [float(rng.random() < rate) for _ in range(8)]
        mean = sum(right) / 8
        completions = [
            {
                "text": f"{a} + {a} = {2 * a if r else 2 * a + 1}.\nThe answer is {2 * a if r else 2 * a + 1}.",
                "reward": r,
                "advantage": (r - mean) / 0.5,
                "eos": True,
            }
            for r in right
        ]
        lines.append(
            {"kind": "rollout", "step": step, "when": when, "prompt": f"What is {a} + {a}?", "completions": completions}
        )
    return lines


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), "utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
