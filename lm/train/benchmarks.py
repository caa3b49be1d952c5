"""Benchmark tasks on a run's model or a published one, with the results kept in the run's stage."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.data.selection import held_out_elsewhere
from lm.evals.core import CONFIG, CoreTask, core_items, core_score, read_core
from lm.evals.harness import Answers, HarnessModel, TaskResult, find_tasks, measure_tasks
from lm.evals.overlap import Contamination, Overlap, item_texts, overlaps
from lm.experiment import UserError
from lm.files import is_open_weights
from lm.json_lines import JsonLines
from lm.parallel.distributed import fetch
from lm.stored import cache_folder, make_folder
from lm.train.collected import with_collected_paths
from lm.train.compilations import keep_compilations
from lm.train.loaded_run import LoadedRun, load_adapters, load_run
from lm.train.metrics import json_value
from lm.train.run_folder import RunFolder

CORE = "core:"
"""Beginning of the name of a task that is the CORE score of a folder."""
FILE = "benchmarks.jsonl"
"""The results of a stage, one line a task and metric; of equal lines the last counts."""


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are asked. `limit` items of each (None: all) after `fewshot` examples (None: as the task says).

    `chat`: through the chat template; None: where the model has been trained on conversations. `contamination`: the number of words of
    the n-grams that are looked for in the training data; None: they are not.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    fewshot: int | None = None
    chat: bool | None = None
    contamination: int | None = None


def run_benchmarks(
    run_dir: Path, stage: str | None, adapter: str | None, settings: TaskSettings, tell: Callable[[str], None]
) -> tuple[str, list[TaskResult], list[dict[str, Any]]]:
    """Measure tasks; returns the model's name, the results, and what was asked and answered for each item.

    What has been answered is kept in the cache, by the weights' SHA-256, so that the same command goes on where it ended. The
    results are added to `stages/STAGE/benchmarks.jsonl` of a run, unless there is an adapter.

    Raises:
        UserError: no such task, or its data is not here.
    """
    if settings.contamination is not None and is_open_weights(run_dir):
        raise UserError(
            f"--contamination compares with the training data of a run, and {run_dir} is a published model; "
            "lm data EXPERIMENT --against FILE compares a file with the data of an experiment"
        )
    folders = {
        name: read_core(Path(name[len(CORE) :]).expanduser()) for name in settings.tasks if name.startswith(CORE)
    }
    names, manager = find_tasks([name for name in settings.tasks if name not in folders])
    if folders and (settings.fewshot is not None or settings.chat):
        raise UserError(
            f"--fewshot and --chat are not for {next(iter(folders))}: its {CONFIG} says how its tasks are asked"
        )
    if folders and settings.contamination is not None:
        raise UserError(
            f"--contamination compares tasks of lm-evaluation-harness, not {next(iter(folders))}: `lm data EXPERIMENT --against "
            "FILE` compares a file of its eval_data with the training data"
        )
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
    asked = functools.partial(measure_tasks, limit=settings.limit, fewshot=settings.fewshot, chat=chat)
    results, samples = asked(model, names, manager) if names else ([], [])
    core = [one for name, tasks in folders.items() for one in _core_results(name, tasks, model, settings.limit)]
    if settings.contamination is not None:
        results = _with_contamination(results, samples, loaded, RunFolder(run_dir), settings.contamination, tell)
    after = f", after stage {loaded.stage}" if loaded.stage else ""
    if loaded.stage and adapter is None and not is_open_weights(run_dir):
        for found, as_chat in ((results, chat), (core, False)):
            _record(RunFolder(run_dir).stage_folder(loaded.stage), loaded.step, found, as_chat, settings.limit)
    return f"{run_dir}{after}{', chat template' if chat and names else ''}", [*results, *core], samples


def _core_results(name: str, tasks: Sequence[CoreTask], model: HarnessModel, limit: int | None) -> Iterator[TaskResult]:
    """The CORE score of a folder, and the accuracy of each of its tasks."""
    items = [one for task in tasks for one in core_items(task, model.own, model.max_length, limit or len(task.items))]
    found = core_score(model.likelihoods, items)
    yield TaskResult(name, "core", found.values["core"], found.values["core_stderr"], found.count, None, "")
    for task in tasks:
        rate, count = found.values[f"task/{task.label}"], min(limit or len(task.items), len(task.items))
        stderr = float(np.sqrt(rate * (1 - rate) / count))
        yield TaskResult(f"{name}/{task.label}", "acc", rate, stderr, count, task.fewshot, "")


def _with_contamination(
    results: Sequence[TaskResult],
    samples: Sequence[dict[str, Any]],
    loaded: LoadedRun,
    folder: RunFolder,
    words: int,
    tell: Callable[[str], None],
) -> list[TaskResult]:
    """The results with what the training data of the run's stages, up to the measured one, has of each task's items."""
    experiment = with_collected_paths(loaded.experiment, folder)
    names = [stage.name for stage in experiment.stages]
    stages = experiment.stages[: names.index(loaded.stage) + 1]
    sources = [source for stage in stages if stage.objective.trains for source in stage.sources]
    tasks = list(dict.fromkeys(one["task"] for one in samples))
    tell(f"{words}-grams of {len(samples):,} items in the training data of {', '.join(stage.name for stage in stages)}")
    found = overlaps([item_texts(one["doc"]) for one in samples], sources, held_out_elsewhere(experiment), words)
    of_task = {
        task: [(one, item) for one, item in zip(samples, found.items, strict=True) if one["task"] == task]
        for task in tasks
    }
    return [
        dataclasses.replace(one, contamination=_contamination(one.metric, of_task[one.task], found))
        if one.task in of_task
        else one
        for one in results
    ]


def _contamination(
    metric: str, items: Sequence[tuple[dict[str, Any], Overlap]], found: Contamination
) -> dict[str, Any]:
    """Counts of a task's items, and the metric of those that were compared and not found in the training data."""
    own = dataclasses.replace(found, items=[item for sample, item in items if metric in sample["values"]])
    clean = [
        sample["values"][metric]
        for sample, item in items
        if item.grams and not item.found and metric in sample["values"]
    ]
    counts = {"words": own.words, "items": len(own.items), "compared": own.compared, "contaminated": own.contaminated}
    score: dict[str, Any] = {"count": len(clean), "value": None, "stderr": None}
    if clean and all(isinstance(value, int | float) for value in clean):
        score["value"] = float(np.mean(clean))
        score["stderr"] = float(np.std(clean, ddof=1) / np.sqrt(len(clean))) if len(clean) > 1 else None
    return counts | {"share": own.share, "clean": score, "examples": own.examples(), "text": own.describe()}


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
