"""Benchmark tasks on a run's model or a published one, with the results kept in the run's stage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.evals.harness import Answers, HarnessModel, TaskResult, find_tasks, measure_tasks
from lm.experiment import UserError
from lm.files import is_open_weights
from lm.json_lines import JsonLines
from lm.parallel.distributed import fetch
from lm.stored import cache_folder, make_folder
from lm.train.compilations import keep_compilations
from lm.train.loaded_run import LoadedRun, load_adapters, load_run
from lm.train.metrics import json_value
from lm.train.run_folder import RunFolder

FILE = "benchmarks.jsonl"
"""The results of a stage, one line a task and metric; of equal lines the last counts."""


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are asked. `limit` items of each (None: all) after `fewshot` examples (None: as the task says).

    `chat`: through the chat template; None: where the model has been trained on conversations.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    fewshot: int | None = None
    chat: bool | None = None


def run_benchmarks(
    run_dir: Path, stage: str | None, adapter: str | None, settings: TaskSettings, tell: Callable[[str], None]
) -> tuple[str, list[TaskResult], list[dict[str, Any]]]:
    """Measure tasks; returns the model's name, the results, and what was asked and answered for each item.

    What has been answered is kept in the cache, by the weights' SHA-256, so that the same command goes on where it ended. The
    results are added to `stages/STAGE/benchmarks.jsonl` of a run, unless there is an adapter.

    Raises:
        UserError: no such task, or its data is not here.
    """
    names, manager = find_tasks(settings.tasks)
    keep_compilations()
    loaded = load_run(run_dir, stage)
    (loaded,) = load_adapters(loaded, run_dir, [] if adapter is None else [adapter]).values()
    chat = _is_chat(loaded) if settings.chat is None else settings.chat
    if chat and not loaded.tokenizer.chats:
        raise UserError(f"{run_dir} has no chat template, so tasks cannot be asked through it: leave out --chat")
    started = last = time.monotonic()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 5:
            last = time.monotonic()
            tell(f"{','.join(settings.tasks)}: {done:,} of {total:,} {what}, {last - started:,.0f} s")

    folder = cache_folder() / "benchmarks"
    make_folder(folder, "--cache DIR")
    answers = Answers(folder / f"{model_digest(loaded)}.jsonl", progress)
    model = HarnessModel(loaded.model, loaded.tokenizer, answers)
    results, samples = measure_tasks(model, names, manager, limit=settings.limit, fewshot=settings.fewshot, chat=chat)
    after = f", after stage {loaded.stage}" if loaded.stage else ""
    if loaded.stage and adapter is None and not is_open_weights(run_dir):
        _record(RunFolder(run_dir).stage_folder(loaded.stage), loaded.step, results, chat, settings.limit)
    return f"{run_dir}{after}{', chat template' if chat else ''}", results, samples


def model_digest(loaded: LoadedRun) -> str:
    """SHA-256 of the weights, the model's config and the tokenizer."""
    digest = hashlib.sha256(repr((loaded.model.config, loaded.tokenizer.fingerprint)).encode())
    for leaf in jax.tree.leaves(loaded.model):
        array = np.asarray(fetch(leaf))
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _is_chat(loaded: LoadedRun) -> bool:
    """Whether the model answers conversations: a published one with a chat template, or a stage after one that reads no plain text."""
    if not loaded.stage:
        return loaded.tokenizer.chats
    names = [stage.name for stage in loaded.experiment.stages]
    before = loaded.experiment.stages[: names.index(loaded.stage) + 1]
    return any(stage.objective.data != "text" for stage in before)


def _record(folder: Path, step: int, results: Sequence[TaskResult], chat: bool, limit: int | None) -> None:
    """Add results to the file of the stage."""
    common = {"step": step, "chat": chat, "limit": limit, "lm_eval": version("lm_eval"), "time": round(time.time(), 1)}
    lines = [json.dumps(json_value(dataclasses.asdict(one) | common)).encode() for one in results]
    file = JsonLines(folder / FILE)
    file.append(lines)
    file.close()
