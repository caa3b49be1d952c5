"""The model card (README.md) of an exported model: training stages, data, and held-out numbers before and after each stage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lm import __version__
from lm.train.run_files import Run
from lm.web import story
from lm.web.numbers import count
from lm.web.templates import templates
from lm.web.text import visible

MARKS = re.compile(r"([\\`*_\[\]|#~$])")  # special characters of Markdown


def model_card(
    run: Run, stage: str, step: int, library: str = "transformers", chats: bool = True, scores: bool = False
) -> str:
    """The model card of the model after a stage, as Markdown, without paths of this machine.

    Args:
        library: name of the library that reads the folder.
        chats: whether the model has a chat template.
        scores: whether it is a reward model.
    """
    number = [one.name for one in run.stages].index(stage)
    stages = run.stages[: number + 1]
    columns = [name for name in story.columns(run) if name not in {one.name for one in run.stages[number + 1 :]}]
    experiment = public(run.experiment)
    columns[0] = "open weights" if experiment.get("init") else columns[0]
    rows = [
        (one.name, one.kind, f"{step if one.name == stage else one.steps_done:,}", plan, data)
        for one, plan in zip(stages, experiment["stages"], strict=False)
        for data in [", ".join(source["path"] for source in plan["sources"])]
    ]
    page = templates(Path(__file__).parent)
    page.filters |= {"md": lambda value: MARKS.sub(r"\\\1", " ".join(visible(str(value)).split()))}
    card = page.get_template("model_card.md.j2").render(
        version=__version__,
        library=library,
        chats=chats,
        scores=scores,
        name=run.experiment["name"],
        stage=stage,
        begin=_begin(experiment),
        size=count(size) if (size := story.num_params(run)) else "",
        stages=rows,
        columns=columns,
        heldout=[(row.name, row.label, row.cells[: len(columns)]) for row in story.heldout_table(run)],
        facts=[("machine", story.machine(run)), *_made_with(run)],
        settings=json.dumps(experiment, indent=2),
    )
    return card.strip() + "\n"


def _made_with(run: Run) -> list[tuple[str, str]]:
    """Versions, commit, and fingerprints of the data."""
    table = [(name.removeprefix("data "), value) for name, value in story.environment_table(run)]
    return [(public(name), value) for name, value in table if name in ("versions", "git commit") or "sha256" in value]


def _begin(experiment: dict[str, Any]) -> str:
    """The initial weights of the first stage, in words."""
    init = experiment.get("init") or ""
    return f"the open weights {init.partition(':')[2]}" if init else "random weights"


def public(value: Any) -> Any:
    """The value with the last name in place of every absolute path, such as `/home/someone/data.jsonl`."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    return ":".join(Path(part).name if part.startswith(("/", "~")) else part for part in value.split(":"))
