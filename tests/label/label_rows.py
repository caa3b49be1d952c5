"""Rows and choices that several tests of the label page share."""

import itertools
import json
from contextlib import contextmanager
from pathlib import Path

from lm.choices.desk import Desk
from lm.choices.log import Record, open_log
from lm.choices.pairs import LabelTask, make_task
from lm.data.sources import load_rows

NUMBERS = itertools.count(1)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def questions(count: int) -> list[dict]:
    return [{"prompt": f"Question {i}?", "answers": [f"short {i}", f"a longer answer {i}"]} for i in range(count)]


def task_of(folder: Path, rows: list[dict]) -> LabelTask:
    return make_task(load_rows(str(write_rows(folder / "answers.jsonl", rows))))


@contextmanager
def desk_of(folder: Path, rows: list[dict], **options):
    task = task_of(folder, rows)
    with open_log(folder / "labels.jsonl") as log:
        yield Desk(task.pairs, log, **options)


def chosen(annotator: str, prompt: str, left: str, right: str, choice: str, **more) -> Record:
    """A record as the desk writes it."""
    names = {side: more.pop(f"{side}_source", None) for side in ("left", "right")}
    sides = {side: {"answer": text, **({"source": names[side]} if names[side] else {})}
             for side, text in (("left", left), ("right", right))}  # fmt: skip
    pair = "|".join([prompt, *sorted((left, right))])
    return {"id": next(NUMBERS), "kind": "choice", "annotator": annotator, "pair": pair, "prompt": prompt,
            "choice": choice, "strength": None, "comment": "", "seconds": 1.0, **sides, **more}  # fmt: skip
