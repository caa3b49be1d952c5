"""What the files of a run hold: shapes of their lines and objects (`lm/shapes.py`), as far as pages and comparisons read them."""

from __future__ import annotations

import typing
from typing import Any

from lm.experiment import Eval
from lm.shapes import Shape, anything, is_count, is_flag, is_list, is_none, is_number, is_text, misfit, one_of

NUMBER = (is_number, is_none)  # null: it was not finite
PLACE = {"step": is_count, "when": one_of("before", "during", "after")}
MEASURED = {**PLACE, "eval": is_text, "count": is_count, "passed_over?": {"*": is_count}}
SAMPLE = {**PLACE, "prompt": is_text, "eval?": is_text, "chosen?": is_text, "rejected?": is_text}
METRICS = typing.get_args(typing.get_type_hints(Eval)["metric"])
COMPLETION = {"text": is_text, "reward": NUMBER, "advantage": NUMBER}

CONTAMINATION = {
    "contaminated": is_count,
    "clean": {"count": is_count, "value?": NUMBER, "stderr?": NUMBER},
    "text": is_text,
}

LINES: dict[str, tuple[str, dict[str, Shape]]] = {
    "metrics": ("", {"": {"step": is_count, "*": NUMBER}}),
    "eval": (
        "metric",
        {name: {**MEASURED, name: NUMBER, "metric": is_text, "*": NUMBER} for name in METRICS}
        | {"best_of_n": {**MEASURED, "best_of?": [is_count], "metric": is_text, "*": (NUMBER, [NUMBER])}},
    ),
    "samples": (
        "kind",
        {
            "prompt": {**SAMPLE, "answer": is_text},
            "pair": {**SAMPLE, "chosen": is_text, "rejected": is_text, "margin": NUMBER},
            "heldout": {
                **SAMPLE, "eval": is_text, "answer": is_text, "expected?": is_text, "reward?": NUMBER, "score?": NUMBER,
            },
            "rollout": {**SAMPLE, "completions": [COMPLETION]},
        },
    ),
    "warnings": ("", {"": {"step": is_count, "text": is_text}}),
    "benchmarks": (
        "",
        {
            "": {
                "step": is_count, "task": is_text, "metric": is_text, "count": is_count, "fewshot": NUMBER, "chat?": is_flag,
                "limit?": NUMBER, "value?": NUMBER, "stderr?": NUMBER, "contamination?": (CONTAMINATION, is_none),
            }
        },
    ),
}  # fmt: skip
"""The lines of a stage's JSON-lines files, by the name of the file: the field that tells of which kind a line is, and the shape of each."""

SOURCE = {
    "dropped?": ({"*": is_count}, is_none),
    "first?": ({"*": anything}, is_none),
    "unread?": (is_list, is_none),
}
VERSIONS = {"*": (is_text, is_none)}
INPUTS = {"data?": {"*": is_text}, "tokenizer?": is_text, "versions?": VERSIONS, "python?": is_text}
SECONDS = ("step", "sample", "data", "compile", "eval", "save", "start", "lost", "first_step")
SUMMARY: Shape = {
    "steps?": is_count,
    "final_step?": is_count,
    "num_params?": is_count,
    "tokens?": is_number,
    "peak_memory_mb?": NUMBER,
    "seconds?": is_number,
    **{f"{name}_seconds?": is_number for name in SECONDS},
    "sources?": ([SOURCE], is_none),
    "files?": {"*": is_text},
}
"""The end of a stage, summary.json."""

SESSION: Shape = {
    "command": [is_text],
    "started": is_text,
    "python": is_text,
    "platform": is_text,
    "versions": VERSIONS,
    "devices": {"platform": is_text, "kind": anything, "count": anything},
    "git": ({"commit": (is_text, is_none), "dirty": anything}, is_none),
    "data_fingerprint": {"*": anything},
    "cpu": anything,
    "cores": anything,
}
"""One of `runs` of environment.json."""
ENVIRONMENT: Shape = {
    "runs": [{**{f"{name}?": shape for name, shape in SESSION.items()}, "functions?": {"*": is_text}}],
    "began?": INPUTS,
    "accepted?": is_list,
    "finished?": [is_text],
}
"""environment.json. An older lm wrote only a part of a session."""

CHECKPOINT: Shape = {
    **{name: INPUTS[name] for name in ("tokenizer?", "versions?")},
    "data?": is_text,
    "base?": is_text,
    "tokens?": is_number,
    "costs?": {"*": is_number},
    "ahead?": lambda names: misfit(names, {"*": is_text}) == "" and all(map(str.isdecimal, names)),
}
"""What a checkpoint says beside its arrays, the `meta` of its manifest."""


def line_fault(kind: str, line: dict[str, Any]) -> str:
    """The field that makes a line of a stage's file KIND.jsonl unreadable; "" for a line as it was written."""
    if kind not in LINES:
        return ""
    field, shapes = LINES[kind]
    name = line.get(field, "")
    return misfit(line, shapes[name]) if isinstance(name, str) and name in shapes else field
