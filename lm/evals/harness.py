"""Tasks of lm-evaluation-harness on a model of this package: `lm_eval` asks, `score_continuations` and the engine answer.

Imports the package `lm_eval` (the extra `bench`), so import this module only where tasks are measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

# Before the harness is imported: it and the library of its data sets draw progress bars, and it forks, which jax does not survive.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lm.data.chat import render
from lm.data.hub.tokenizer import HubTokenizer, with_options
from lm.data.text_tokenizer import TextTokenizer
from lm.evals.continuations import Continuation, Likelihood, row_width, score_continuations
from lm.experiment import UserError, nearest
from lm.json_lines import JsonLines, read_json_lines
from lm.model.transformer import Transformer
from lm.rollout.engine import LocalEngine, Request, completion_text
from lm.shapes import is_flag, is_number, is_text, misfit

evaluator.get_git_commit_hash = lambda: (
    ""
)  # it runs git in the current folder, which prints an error where that is no clone

ANSWER = (is_text, is_number, [(is_number, is_flag)])
AT_ONCE = 64  # prompts that are completed between two writes of what is done


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task: its mean and standard error (None where the harness gives none) over `count` items.

    `fewshot` counts the examples before each item; None: of a score over several tasks. `contamination` has what the training
    data has of the items (`lm.train.benchmarks`), where it was asked for.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    count: int
    fewshot: int | None
    version: str
    contamination: dict[str, Any] | None = None


@dataclass
class Answers:
    """Answers to the harness by a hash of the request, kept in a JSON-lines file, so that an ended measurement goes on.

    `tell` is called with (done, all, what) of the requests of one kind.
    """

    path: Path
    tell: Callable[[int, int, str], None] = lambda done, total, what: None
    known: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, (_, line) in enumerate(read_json_lines(self.path, {"request": str}), start=1):
            if fault := misfit(line.get("answer"), ANSWER, "answer"):
                raise UserError(
                    f"{self.path}:{number} is no answer that was kept here: its {fault} cannot be read; remove that line"
                )
            self.known[line["request"]] = line["answer"]
        self._file = JsonLines(self.path)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep further answers."""
        self.known |= answers
        self._file.append([json.dumps({"request": key, "answer": one}).encode() for key, one in answers.items()])


class HarnessModel(TemplateLM):
    """A language model as the harness asks it: log-likelihoods of continuations and texts, and greedy or sampled completions."""

    def __init__(self, model: Transformer, tokenizer: TextTokenizer, answers: Answers):
        super().__init__()
        self.model, self.own, self.answers = model, tokenizer, answers
        self._published = _published(tokenizer)
        self._rendered: dict[str, list[int]] = {}  # text of a rendered conversation -> its tokens

    @property
    def eot_token_id(self) -> int:
        return self.own.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: as with transformers the declared first one, else the end token."""
        return self.own.eos_id if self.own.bos_id is None else self.own.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_len

    @property
    def tokenizer_name(self) -> str:
        return self.own.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The harness keeps it beside the results; the tokenizer renders conversations itself."""
        return f"of the tokenizer {self.own.fingerprint}" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, whose tokens are kept: what a user typed in it does not become control tokens."""
        tokens = render(chat_history, self.own, generation_prompt=add_generation_prompt).tokens
        text = self.own.decode(tokens, specials=True)
        self._rendered[text] = tokens
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text as the published or exported tokenizer gives them, so that results equal those of transformers.

        The files of a published model may put special tokens around a text; those that `lm export` writes do not. Control
        tokens in the text of a task are control tokens; in a message of a conversation they stay text.
        """
        if self._published:
            return self._published.encode(string, special_tokens=add_special_tokens is not False)
        return self.own.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and its continuation; white space at the end of the context belongs to the continuation."""
        start = self._conversation_in(context)
        if start is None:
            return super()._encode_pair(context, continuation)
        tokens = self._rendered[start]
        rest = self.own.encode(context[len(start) :] + continuation)
        size = len(tokens)
        if context == start:
            while size > 1 and not self.own.decode(tokens[size - 1 : size], specials=True).strip():
                size -= 1
        else:
            size += len(self.own.encode(context[len(start) :].rstrip()))
        whole = [*tokens, *rest]
        return whole[:size], whole[size:]

    def _conversation_in(self, text: str) -> str | None:
        """The rendered conversation that a text begins with, the longest one."""
        found = [start for start in self._rendered if text.startswith(start)] if text not in self._rendered else [text]
        return max(found, key=len, default=None)

    def _prompt(self, text: str) -> list[int]:
        """Tokens of a context that is completed."""
        start = self._conversation_in(text)
        if start is None:
            return self.tok_encode(text)
        return [*self._rendered[start], *self.own.encode(text[len(start) :])]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [Continuation(context, tokens) for _, context, tokens in requests]
        keys = [_key("likelihood", list(one.context), list(one.tokens)) for one in asked]
        missing = {key: one for key, one in zip(keys, asked, strict=True) if key not in self.answers.known}
        names, done = list(missing), len(set(keys)) - len(missing)

        def keep(found: dict[int, Likelihood]) -> None:
            nonlocal done
            self.answers.add({names[index]: [one.logp, one.greedy] for index, one in found.items()})
            done += len(found)
            self.answers.tell(done, len(set(keys)), "continuations")

        score_continuations(self.model, list(missing.values()), keep)
        return [(float(self.answers.known[key][0]), bool(self.answers.known[key][1])) for key in keys]

    def likelihoods(self, asked: Sequence[Continuation]) -> list[Likelihood]:
        """The likelihood of each continuation, with those that are kept from before."""
        return [
            Likelihood(*found)
            for found in self._loglikelihood_tokens([(None, [*c.context], [*c.tokens]) for c in asked])
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's context."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, said in map(make_disjoint_window, pairs):
                windows.append((None, context, said))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logp
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each completion, up to the first of its stop strings or the end token."""
        asked = [(request.args[0], json.dumps(request.args[1], sort_keys=True)) for request in requests]
        keys = [_key("completion", *one) for one in asked]
        missing = {key: one for key, one in zip(keys, asked, strict=True) if key not in self.answers.known}
        groups: dict[str, list[tuple[list[int], str]]] = {}
        for key, (context, settings) in missing.items():
            groups.setdefault(settings, []).append((self._prompt(context), key))
        done = len(set(keys)) - len(missing)
        for settings, group in groups.items():
            group.sort(key=lambda one: -len(one[0]))
            width = len(group[0][0])  # of all parts, so that they compile once: unused columns cost nothing
            for start in range(0, len(group), AT_ONCE):
                part = group[start : start + AT_ONCE]
                texts = self._complete([tokens for tokens, _ in part], width, json.loads(settings))
                self.answers.add({key: text for (_, key), text in zip(part, texts, strict=True)})
                done += len(part)
                self.answers.tell(done, len(set(keys)), "completions")
        return [self.answers.known[key] for key in keys]

    def _complete(self, prompts: Sequence[list[int]], width: int, settings: dict[str, Any]) -> list[str]:
        given = normalize_gen_kwargs(settings, 256)
        new = given["max_gen_toks"]
        room = self.max_length - new
        if room < 1:
            raise UserError(
                f"a task asks for {new} new tokens; they should be fewer than model.max_len {self.max_length}"
            )
        stop = [text for text in handle_stop_sequences(given.get("until"), None) if text]
        request = Request(
            [tokens[-room:] for tokens in prompts], jax.random.key(0), new, float(given.get("temperature") or 0.0),
            width=row_width(min(room, width), room), top_k=int(given.get("top_k") or 0),
            top_p=float(given.get("top_p") or 1.0), stop=stop,
        )  # fmt: skip
        return [completion_text(self.own, one) for one in LocalEngine(self.model, self.own).complete(request)]


def _published(tokenizer: TextTokenizer) -> HubTokenizer | None:
    """A published tokenizer as its own library reads a text: a control token that is spelt out is that token."""
    if not isinstance(tokenizer, HubTokenizer):
        return None
    return HubTokenizer(with_options(tokenizer.files, "token", None))


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_tasks(names: Sequence[str]) -> tuple[list[str], TaskManager]:
    """The tasks named: of the harness, or a file or folder of YAML tasks of one's own, which are all its tasks.

    Raises:
        UserError: no such task (the nearest names), or no such file.
    """
    paths = [Path(name).expanduser() for name in names if name.endswith((".yaml", ".yml", "/")) or Path(name).is_dir()]
    for path in paths:
        if not path.exists():
            raise UserError(f"--tasks {path}: there is no such file or folder")
    folders = sorted({str(path if path.is_dir() else path.parent) for path in paths})
    # To index the harness's own 14,000 files takes seconds; tasks of one's own do not need them.
    manager = TaskManager(include_path=folders or None, include_defaults=len(paths) < len(names))
    known = manager.all_tasks
    found: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        if path in paths:
            files = sorted(path.rglob("*.y*ml")) if path.is_dir() else [path]
            own = [task for file in files for task in _tasks_in(file)]
            if not own:
                raise UserError(f"--tasks {name}: no file there has a `task:`")
            found += own
        elif name in known:
            found.append(name)
        else:
            raise UserError(
                f"--tasks {name}: lm-evaluation-harness has no such task{nearest(name, known)}; a task of your own is a YAML file"
            )
    return list(dict.fromkeys(found)), manager


def _tasks_in(file: Path) -> Iterable[str]:
    """The name of the task that a YAML file defines, if it does."""
    try:
        lines = [line.partition(":") for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks: {file} cannot be read: {error}") from error
    return [value.strip().strip("\"'") for key, _, value in lines if key == "task" and value.strip()]


def measure_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None,
    fewshot: int | None,
    chat: bool,
) -> tuple[list[TaskResult], list[dict[str, Any]]]:
    """The metrics of tasks, and what was asked and answered for each item; examples are drawn by the harness's own seed.

    Raises:
        UserError: a task cannot be loaded, for instance because its data is not on this machine.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # a task is code and templates of others, and its data may be anything
        text = " ".join(str(error).split())
        raise UserError(f"--tasks {','.join(tasks)} cannot be loaded: {type(error).__name__}: {text:.300}") from error
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise UserError(
            f"--tasks {','.join(unsafe)} would run the model's code outside a jail; an eval with verifier python_tests runs it in one"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints notes
            found = evaluator.simple_evaluate(
                model, tasks=_outermost(loaded), num_fewshot=fewshot, limit=limit, task_manager=manager,
                apply_chat_template=chat, fewshot_as_multiturn=chat, bootstrap_iters=1000,
            )  # fmt: skip
    except Exception as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, UserError | OSError) or frames.count(__file__) > 1:  # raised below the model that it asks
            raise
        text = " ".join(str(error).split())
        raise UserError(f"--tasks {','.join(tasks)} cannot be measured: {type(error).__name__}: {text:.300}") from error
    assert found is not None
    results = [one for task in found["results"] for one in _metrics(task, found)]
    samples = [
        {
            "task": task, "doc": one["doc"], "target": one["target"], "answers": one["filtered_resps"],
            "values": {_shown(name, one["filter"]): one[name] for name in one["metrics"]},
        }
        for task, items in found.get("samples", {}).items()
        for one in items
    ]  # fmt: skip
    return results, samples


def _outermost(loaded: Mapping[str, Any]) -> list[Any]:
    """The groups that are in no other one, and the tasks that are in no group."""
    groups = loaded["groups"].values()
    inside = {
        id(one) for group in groups for one in (*group.get_all_groups(), *group.get_all_tasks()) if one is not group
    }
    return [one for one in (*groups, *loaded["tasks"].values()) if id(one) not in inside]


def _metrics(task: str, found: Mapping[str, Any]) -> list[TaskResult]:
    """The metrics of a task, with the harness's name of the filter where it is not `none`."""
    results, count = found["results"][task], found["n-samples"].get(task, {}).get("effective", 0)
    listed = []
    for name, value in results.items():
        metric, _, used = name.partition(",")
        if not used or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{used}")
        stderr = float(error) if isinstance(error, int | float) else None
        shots, version = found["n-shot"].get(task, 0), str(found["versions"].get(task, ""))
        listed.append(TaskResult(task, _shown(metric, used), float(value), stderr, count, shots, version))
    return listed


def _shown(metric: str, used: str) -> str:
    return metric if used == "none" else f"{metric} ({used})"
