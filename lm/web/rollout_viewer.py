"""The page of `lm rollouts`: lists, filters and searches the sampled trajectories of a run, and shows their tokens."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lm.changes import read_experiment
from lm.data.text_tokenizer import TextTokenizer
from lm.data.vocabulary import load_tokenizer
from lm.experiment import Stage, UserError, from_dict
from lm.train.run_folder import RunFolder
from lm.train.trajectory_files import check_kept, read_columns, trajectory_files
from lm.web.local_server import CSS, HTML, SCRIPT, LocalServer, Page, Reply, error_reply, file_page, json_reply
from lm.web.rollout_index import FILTERS, SORTS, RolloutIndex, StageRollouts, search
from lm.web.rollout_tokens import describe_tokens
from lm.web.text import beginning, visible

HERE = Path(__file__).parent
GROUPS_A_PAGE = 40
HISTORY = 2000  # most points of one prompt's history
SHORT = 160  # characters of a prompt or answer in a list
SHOWN = [
    "messages",
    "rewards",
    "reward",
    "advantage",
    "trained",
    "version",
    "finish",
    "largest_gap",
    "sampled",
    "errors",
]

Query = Mapping[str, str]
Line = dict[str, Any]


class RolloutViewer:
    """Answers the page's requests for one run.

    Raises:
        UserError: the run keeps no trajectories, or those of `stage`, or all that some stage kept, are not there.
    """

    def __init__(self, run: Path, stage: str | None = None):
        self.run, self.experiment = run, from_dict(read_experiment(run))
        folders = {one.name: run / "stages" / one.name for one in self.experiment.stages}
        self.stages = {name: StageRollouts(folder) for name, folder in folders.items() if trajectory_files(folder)}
        for name in filter(lambda name: name not in self.stages, folders):
            check_kept(folders[name])  # it may have lost all of them
        if stage is not None and stage not in self.stages:
            known = f"those with some: {', '.join(self.stages)}" if self.stages else "no other stage has any"
            raise UserError(f"--stage {stage}: {run} keeps no trajectories of this stage; {known}")
        if not self.stages:
            raise UserError(
                f"{run} keeps no trajectories: stages that sample (GRPO, PPO, Collect) write them to "
                "stages/STAGE/trajectories while they train, unless trajectory_mb is 0"
            )
        self.first = stage or list(self.stages)[-1]
        self.tokenizer, self.no_tokens = self._tokenizer()
        self.found = functools.lru_cache(maxsize=4)(search)

    def _tokenizer(self) -> tuple[TextTokenizer | None, str]:
        """The run's tokenizer, or None and why there is none: dialogues are then shown as text."""
        folder = RunFolder(self.run)
        try:
            found = load_tokenizer(folder.tokenizer)
            then = folder.read_environment().get("began", {}).get("tokenizer", found.fingerprint)
            if then != found.fingerprint:
                raise UserError(f"{folder.tokenizer} is not the tokenizer that sampled them: put back a copy of it")
            return found, ""
        except UserError as error:
            return None, f"tokens are not shown, only texts: {error}"

    def pages(self) -> dict[str, Page]:
        """The page's routes."""
        return {
            "/": file_page(HERE / "viewer.html", HTML),
            "/viewer.css": file_page(HERE / "viewer.css", CSS),
            "/viewer.js": file_page(HERE / "viewer.js", SCRIPT),
            "/api/groups": _answering(self.groups),
            "/api/group": _answering(self.group),
            "/api/tokens": _answering(self.tokens),
        }

    def groups(self, query: Query) -> Line:
        """A page of the groups that pass the filters, with totals; and a prompt's mean reward by step, if one is followed."""
        name = self._stage(query)
        index = self.stages[name].index()
        passing = self._passing(index, query)
        hits = index.per_group(np.add, passing.astype(int)) if len(passing) else np.zeros(0, int)
        order = SORTS[_one_of(SORTS, query, "sort", "newest")](index)
        chosen = np.flatnonzero(hits)
        chosen = chosen[np.argsort(order[chosen], kind="stable")]
        pages = max(1, -(-len(chosen) // GROUPS_A_PAGE))
        page = min(max(_number(query, "page", 1), 1), pages)
        shown = chosen[(page - 1) * GROUPS_A_PAGE : page * GROUPS_A_PAGE]
        steps, prompts = index.columns["step"], self._prompts(index, index.starts[shown])
        told = {
            "run": self.experiment.name,
            "stage": name,
            "stages": list(self.stages),
            "steps": [int(steps.min()), int(steps.max())] if len(steps) else [],
            "filters": {one: int(which.sum()) for one, which in index.flags.items()},
            "rewards": list(index.rewards),
            "damaged": [visible(text) for text in (*index.damaged, *self._missing(name))],
            "no_tokens": visible(self.no_tokens),
            "total": {"groups": len(index.starts) - 1, "rollouts": len(steps)},
            "groups_found": len(chosen),
            "rollouts_found": int(hits.sum()),
            "page": page,
            "pages": pages,
            "groups": [
                _summary(index, group) | {"hits": int(hits[group]), "prompt": prompts[int(index.starts[group])]}
                for group in shown.tolist()
            ],
        }
        return told | ({"history": _history(index, chosen)} if query.get("task") else {})

    def _missing(self, stage: str) -> list[str]:
        """What is wrong if a stage lacks some of the files that it kept."""
        try:
            check_kept(RunFolder(self.run).stage_folder(stage))
        except UserError as error:
            return [str(error)]
        return []

    def group(self, query: Query) -> Line:
        """A group: its prompt, and every completion with its rewards, without the tokens."""
        index, rows = self._group(query)
        table = self._rows(index, rows, SHOWN)
        messages = table[0]["messages"]
        asked = [turn for turn in messages if turn["author"] == "prompt"]
        return {
            "prompt": _turns(asked),
            "task": f"{index.columns['task'][rows[0]]:016x}",
            "completions": [
                {
                    **{name: _plain(row[name]) for name in SHOWN[2:]},
                    "rewards": [[visible(name), _plain(value)] for name, value in row["rewards"] or ()],
                    "turns": _turns(row["messages"][len(asked) :]),
                }
                for row in table
            ],
        }

    def tokens(self, query: Query) -> Line:
        """The tokens of one completion, `place` in its group, with the numbers of each."""
        if self.tokenizer is None:
            raise UserError(self.no_tokens)
        index, rows = self._group(query)
        place = _number(query, "place", 0)
        if not 0 <= place < len(rows):
            raise UserError(f"place {place}: the group has {len(rows)} completions")
        names = ["tokens", "authors", "logp", "trainer_logp", "ref_logp", "token_advantages", "advantage", "version"]
        (row,) = self._rows(index, rows[place : place + 1], names)
        if max(row["tokens"], default=0) >= self.tokenizer.vocab_size:
            raise UserError(
                f"token {max(row['tokens'])} is not among the {self.tokenizer.vocab_size} of {RunFolder(self.run).tokenizer}: "
                "put back the tokenizer that sampled it; the texts are shown"
            )
        return describe_tokens(row, self._experiment_stage(self._stage(query)).objective, self.tokenizer)

    def _experiment_stage(self, name: str) -> Stage:
        return next(stage for stage in self.experiment.stages if stage.name == name)

    def _stage(self, query: Query) -> str:
        return _one_of(self.stages, query, "stage", self.first)

    def _passing(self, index: RolloutIndex, query: Query) -> Bool[np.ndarray, " N"]:
        """The trajectories that pass every condition of a query."""
        steps = index.columns["step"]
        passing = np.ones(len(steps), bool)
        if query.get("steps"):
            first, last = _range(query["steps"])
            passing &= (steps >= first) & (steps <= last)
        for name in filter(None, query.get("filter", "").split(",")):
            passing &= index.flags[_one_of(FILTERS, {"filter": name}, "filter", "")]
        if query.get("task"):
            passing &= index.columns["task"] == np.uint64(_hexadecimal(query["task"]))
        if query.get("search"):
            passing = passing & self.found(index, query["search"])
        return passing

    def _group(self, query: Query) -> tuple[RolloutIndex, Int[np.ndarray, " M"]]:
        """The trajectories of the group that `step` and `group` name."""
        index = self.stages[self._stage(query)].index()
        step, group = _number(query, "step", 0), _number(query, "group", 0)
        rows = np.flatnonzero((index.columns["step"] == step) & (index.columns["group"] == group - 1))
        if not len(rows):
            raise UserError(f"no file has prompt {group} of step {step}: the oldest are removed beyond trajectory_mb")
        return index, rows

    def _rows(self, index: RolloutIndex, rows: Int[np.ndarray, " M"], names: list[str]) -> list[Line]:
        """Read columns of trajectories of one file."""
        table = read_columns(index.files[int(index.columns["file"][rows[0]])], names)
        return table.take(index.columns["row"][rows]).to_pylist()

    def _prompts(self, index: RolloutIndex, rows: Int[np.ndarray, " M"]) -> dict[int, str]:
        """The beginnings of the prompts of trajectories; each file is read once."""
        files, found = index.columns["file"][rows], {}
        for file in np.unique(files):
            here = rows[files == file]
            for row, line in zip(here.tolist(), self._rows(index, here, ["messages"]), strict=True):
                asked = [turn["content"] or "" for turn in line["messages"] if turn["author"] == "prompt"]
                found[row] = beginning(visible(asked[-1] if asked else ""), SHORT, 2)
        return found


def _summary(index: RolloutIndex, group: int) -> Line:
    """A group's line in the list."""
    own = slice(index.starts[group], index.starts[group + 1])
    column = {name: values[own] for name, values in index.columns.items()}
    gaps = column["largest_gap"][~np.isnan(column["largest_gap"])]
    return {
        "step": int(column["step"][0]),
        "group": int(column["group"][0]) + 1,
        "rewards": [_plain(value) for value in column["reward"].tolist()],
        "mean": _plain(float(column["reward"].mean())),
        "gap": _plain(float(gaps.max())) if len(gaps) else None,
        "length": _plain(float(column["sampled"].mean())),
        "flags": {name: int(which[own].sum()) for name, which in index.flags.items()},
    }


def _history(index: RolloutIndex, groups: Int[np.ndarray, " G"]) -> list[list[float | None]]:
    """(step, mean reward) of groups, in order of steps."""
    steps = index.columns["step"][index.starts[groups]]
    means = SORTS["reward_low"](index)[groups]
    points = sorted(zip(steps.tolist(), means.tolist(), strict=True))[-HISTORY:]
    return [[step, _plain(mean)] for step, mean in points]


def _turns(messages: list[Line]) -> list[Line]:
    """Messages as text that can be shown."""
    return [{name: visible(turn[name] or "") for name in ("role", "content", "author")} for turn in messages]


def _plain(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_of(names: Mapping[str, Any], query: Query, field: str, default: str) -> str:
    found = query.get(field) or default
    if found not in names:
        raise UserError(f"{field} is {found[:60]!r}; it should be one of {', '.join(names)}")
    return found


def _number(query: Query, field: str, default: int) -> int:
    text = query.get(field) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise UserError(f"{field} is {text[:60]!r}; it should be a number")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    """FIRST-LAST or one step."""
    first, _, last = text.partition("-")
    return _number({"steps": first.strip()}, "steps", 0), _number({"steps": (last or first).strip()}, "steps", 0)


def _hexadecimal(text: str) -> int:
    try:
        return int.from_bytes(bytes.fromhex(text).rjust(8, b"\0")[:8], "big")
    except ValueError:
        raise UserError(f"task is {text[:60]!r}; it should be the 16 hexadecimal digits of a prompt") from None


def _answering(act: Callable[[Query], Line]) -> Page:
    """The page of an action: its result as JSON, or the error of a request that cannot be answered."""

    def page(query: Query) -> Reply:
        try:
            return json_reply(act(query))
        except UserError as error:
            return error_reply(HTTPStatus.CONFLICT, visible(str(error)))

    return page


def serve_rollouts(run: Path, stage: str | None, port: int) -> LocalServer:
    """The server of the page, which serves this machine only.

    Raises:
        UserError: the run has no such trajectories, or the port is in use.
    """
    viewer = RolloutViewer(run, stage)
    server = LocalServer("rollouts", viewer.pages(), port=port)
    threading.Thread(target=viewer.stages[viewer.first].index, daemon=True).start()  # ready when the page is opened
    return server
