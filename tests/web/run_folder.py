"""A run folder such as training leaves it, made up: for tests of what reads one, and to look at the page."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from lm.experiment import DPO, GRPO, SFT, Eval, Experiment, Pretrain, Source, Stage, to_dict

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
    sizes = {"tokens": steps * 4096, "peak_memory_mb": 2311.0, "num_params": 4_300_000}
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
