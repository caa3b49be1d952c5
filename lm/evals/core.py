"""The CORE score: few-shot accuracy over the tasks of a folder, each centred so that guessing is 0 and perfection 1.

As in DCLM (Li et al. 2024, arXiv:2406.11794) and nanochat: the score is the mean over tasks of (accuracy - baseline) / (1 - baseline).
The folder has their layout: `core.yaml` lists the tasks, `eval_meta_data.csv` has the baseline of each in percent, and `eval_data/` has
the items as JSON lines. Items are drawn in nanochat's order, and have the same examples before them.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lm.data.text_tokenizer import TextTokenizer
from lm.evals.continuations import Continuation, Likelihood
from lm.evals.rows import Measured
from lm.experiment import UserError, nearest
from lm.json_lines import read_json_lines

CONFIG, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
COLUMNS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
ORDER_SEED, EXAMPLES_SEED = 1337, 1234  # nanochat's


@dataclass(frozen=True)
class CoreTask:
    """A task of the folder: `fewshot` examples before each item, `baseline` the accuracy of guessing, and all its items."""

    label: str
    kind: str
    fewshot: int
    delimiter: str
    baseline: float
    items: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CoreItem:
    """An item to score: its task, its continuations, and the index of the right one; None: greedy decoding should give the only one."""

    task: CoreTask
    asked: list[Continuation]
    gold: int | None


def read_core(folder: Path) -> list[CoreTask]:
    """Read the tasks of a folder.

    Raises:
        UserError: a file is missing, or a task or an item lacks something; names the file and the line or the task.
    """
    config = folder / CONFIG
    try:
        tasks = yaml.safe_load(config.read_text("utf-8"))["icl_tasks"]
        with (folder / BASELINES).open(encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; metric core reads a folder with {CONFIG}, {BASELINES} and {DATA}/"
        ) from error
    except (yaml.YAMLError, csv.Error, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder}: {CONFIG} needs icl_tasks, and {BASELINES} the columns Eval Task and Random baseline ({error!r:.100})"
        ) from error
    if not isinstance(tasks, list) or not tasks:
        raise UserError(f"{config}: icl_tasks is {tasks!r:.60}; it should be a list of tasks")
    return [_read_task(folder, number, task, baselines) for number, task in enumerate(tasks)]


def _read_task(folder: Path, number: int, task: Any, baselines: Mapping[str, float]) -> CoreTask:
    where = f"{folder / CONFIG}: icl_tasks.{number}"
    needed = {"label": str, "dataset_uri": str, "num_fewshot": list, "icl_task_type": str}
    wrong = [
        name for name, kind in needed.items() if not isinstance(task, dict) or not isinstance(task.get(name), kind)
    ]
    if wrong or not task["num_fewshot"] or type(task["num_fewshot"][0]) is not int or task["num_fewshot"][0] < 0:
        raise UserError(
            f"{where}.{(wrong or ['num_fewshot'])[0]} cannot be read; a task has label, dataset_uri, num_fewshot (a list) and icl_task_type"
        )
    label, kind, fewshot = task["label"], task["icl_task_type"], task["num_fewshot"][0]
    if kind not in COLUMNS:
        raise UserError(f"{where}.icl_task_type is {kind!r}; there are {', '.join(COLUMNS)}")
    if label not in baselines or not 0 <= baselines[label] < 1:
        raise UserError(
            f"{folder / BASELINES}: task {label} has no Random baseline from 0 to below 100{nearest(label, baselines)}"
        )
    file = folder / DATA / task["dataset_uri"]
    if not os.path.isfile(file):  # also false of a name that is too long
        raise UserError(f"{file!s:.300}: there is no such file ({where}.dataset_uri)")
    items = [item for _, item in read_json_lines(file, COLUMNS[kind])]
    for line, item in enumerate(items, start=1):
        options = item.get("choices", item.get("context_options")) if "gold" in COLUMNS[kind] else ["the only one"]
        if (
            not options
            or any(not isinstance(one, str) for one in options)
            or not 0 <= item.get("gold", 0) < len(options)
        ):
            raise UserError(
                f"{file}:{line}: gold is {item.get('gold')!r:.40}; it should be the index of one of the texts to choose from"
            )
    if len(items) <= fewshot:
        raise UserError(
            f"{file} has {len(items)} items; {label} needs more than the {fewshot} examples before each (num_fewshot)"
        )
    random.Random(ORDER_SEED).shuffle(items)
    return CoreTask(label, kind, fewshot, str(task.get("continuation_delimiter", " ")), baselines[label], tuple(items))


def core_items(task: CoreTask, tokenizer: TextTokenizer, max_len: int, count: int) -> list[CoreItem]:
    """The first `count` items of a task in its order, as continuations for a model with a context of `max_len`."""
    return [_encoded(task, index, tokenizer, max_len) for index in range(min(count, len(task.items)))]


def _encoded(task: CoreTask, index: int, tokenizer: TextTokenizer, max_len: int) -> CoreItem:
    others = [i for i in range(len(task.items)) if i != index]
    chosen = random.Random(EXAMPLES_SEED + index).sample(others, task.fewshot) if task.fewshot else []
    examples = "".join(f"{_solved(task, task.items[i])}\n\n" for i in chosen)
    item = task.items[index]
    if task.kind == "language_modeling":
        texts = [f"{examples}{item['context'].strip()}{task.delimiter}".strip(), examples + _solved(task, item)]
    elif task.kind == "schema":
        texts = [f"{examples}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    else:
        texts = [f"{examples}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    rows = [[tokenizer.document_ids[0], *tokenizer.encode(text)] for text in texts]
    least = min(map(len, rows))
    if task.kind == "schema":  # what the texts end with in common is scored
        starts = [len(row) - _in_common([one[::-1] for one in rows], least - 1) for row in rows]
    else:  # what follows the common beginning
        most = min(least, len(rows[-1]) - 1) if task.kind == "language_modeling" else least - 1
        starts = [_in_common(rows, most)] * len(rows)
    asked = [Continuation(row[:start], row[start:][-max_len:]) for row, start in zip(rows, starts, strict=True)]
    return CoreItem(task, asked[1:], None) if task.kind == "language_modeling" else CoreItem(task, asked, item["gold"])


def _solved(task: CoreTask, item: Mapping[str, Any]) -> str:
    """The text of an item with its right answer."""
    if task.kind == "language_modeling":
        return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"


def _in_common(rows: Sequence[Sequence[int]], most: int) -> int:
    """Number of tokens that all rows begin with, at most `most`."""
    return next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)


def core_score(score: Callable[[list[Continuation]], Sequence[Likelihood]], items: Sequence[CoreItem]) -> Measured:
    """Metric `core`: the score, the accuracy of each task as task/LABEL, and `tasks`, their number.

    Args:
        score: gives the likelihoods of continuations, as `score_continuations` does.
    """
    scores = iter(score([one for item in items for one in item.asked]))
    right: dict[str, list[float]] = {}
    tasks = {item.task.label: item.task for item in items}
    for item in items:
        right.setdefault(item.task.label, []).append(float(_is_right(item, [next(scores) for _ in item.asked])))
    centred, variance = [], 0.0
    for label, task in tasks.items():
        rate, room = float(np.mean(right[label])), 1 - task.baseline
        centred.append((rate - task.baseline) / room)
        variance += rate * (1 - rate) / len(right[label]) / room**2
    values = {
        "core": float(np.mean(centred)),
        "core_stderr": float(np.sqrt(variance)) / len(tasks),
        "tasks": float(len(tasks)),
    }
    return Measured(values | {f"task/{label}": float(np.mean(found)) for label, found in right.items()}, len(items))


def _is_right(item: CoreItem, scores: Sequence[Likelihood]) -> bool:
    if item.gold is None:
        return scores[0].greedy
    means = [score.logp / len(one.tokens) for score, one in zip(scores, item.asked, strict=True)]
    return means.index(max(means)) == item.gold
