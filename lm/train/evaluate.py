"""Evaluation within a run: all evals before and after each stage, the stage's `evals` in between, and sample answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.data.selection import EmptySplit
from lm.data.text_tokenizer import TextTokenizer
from lm.evals.examples import Examples, read_examples, talks_of
from lm.evals.heldout import measure
from lm.evals.rows import Subject
from lm.experiment import Eval, Experiment, UserError, start_of
from lm.model.heads import Scorer
from lm.model.transformer import Transformer
from lm.parallel.distributed import broadcast_from_main, is_main_process
from lm.rollout.engine import generate_text
from lm.rollout.sampler import encode_prompt
from lm.train.collected import is_collected
from lm.train.metrics import MetricsLog, read_lines
from lm.train.run_folder import RunFolder

Line = dict[str, Any]

ANSWER_TOKENS = 80  # token limit of an answer to one of the experiment's prompts


class Evaluator:
    """Runs the evals of an experiment and logs their results.

    Args:
        reference: returns the reference model of preference evals, None before the first preference stage; called lazily.
        scorers: returns the reward models that score sampled answers, () if there is none yet; called lazily.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        tokenizer: TextTokenizer,
        reference: Callable[[], Transformer | None],
        scorers: Callable[[], tuple[Scorer, ...]] = lambda: (),
    ):
        self.experiment, self.folder, self.tokenizer = experiment, folder, tokenizer
        self.reference, self.scorers = reference, scorers
        self.told: set[str] = set()
        self.passed_over: dict[str, Line] = {}  # by eval: counts of rows that were left out or truncated
        self.tell: Callable[[str], None] = lambda text: None  # shows the current measurement

    def before(self, index: int, model: Transformer, log: MetricsLog) -> None:
        """Evaluate the model that enters a stage: copies the previous stage's last results and runs the missing evals.

        Results that exist already are kept, so that a resumed run completes them. Skipped for a reward model's stage.
        """
        if self.experiment.stages[index].objective.produces == "scorer":
            return
        gained = [item.name for item in self.experiment.evals if self._has_reference(item)]  # loads models
        known, answered = broadcast_from_main(lambda: self._known_before(index, log, gained))
        if not answered:
            self._answer_prompts(model, log, 0, "before")
        self._measure([e for e in self.experiment.evals if e.name not in known], model, log, 0, "before")

    def _known_before(self, index: int, log: MetricsLog, gained: list[str]) -> tuple[list[str], bool]:
        """Copy the previous stage's results; returns the names of the evals with results and whether prompts are answered.

        Args:
            gained: names of evals that now measure more than in the previous stage; they are copied only if they have `kl`.
        """
        evals, samples = (read_lines(log.folder / f"{kind}.jsonl") for kind in ("eval", "samples"))
        known = {line["eval"] for line in evals if line["when"] == "before"}
        prompts = {line.get("prompt") for line in samples if line["when"] == "before" and line["kind"] == "prompt"}
        answered = set(self.experiment.prompts) <= prompts
        start = start_of(self.experiment, index)
        if start is not None and not known:
            last = self.folder.stage_folder(self.experiment.stages[start].name)
            after = [line for line in read_lines(last / "eval.jsonl") if line["when"] == "after"]
            after = [line for line in after if line["eval"] not in gained or "kl" in line]
            known = {line["eval"] for line in after}
            copied = [
                line | {"step": 0, "when": "before"}
                for line in read_lines(last / "samples.jsonl")
                if line["when"] == "after" and (not answered if line["kind"] == "prompt" else line.get("eval") in known)
            ]
            log.samples(copied)
            prompts |= {line.get("prompt") for line in copied if line["kind"] == "prompt"}
            answered = set(self.experiment.prompts) <= prompts
            for line in after:
                log.evaluation(line | {"step": 0, "when": "before"})
        return sorted(known), answered

    def _has_reference(self, item: Eval) -> bool:
        """Whether an eval has a reference now, which it may not have had in the stage before."""
        return item.metric == "reward" and item.temperature == 1 and self.reference() is not None

    def during(self, index: int, model: Transformer | Scorer, log: MetricsLog, step: int) -> None:
        """Run the evals named in the stage's `evals`, and answer the experiment's prompts."""
        names = self.experiment.stages[index].evals
        self._answer_prompts(model, log, step, "during")
        self._measure([e for e in self.experiment.evals if e.name in names], model, log, step, "during")

    def after(self, index: int, model: Transformer | Scorer, log: MetricsLog, entering: Transformer) -> None:
        """Run all evals and answer the experiment's prompts, after the last step.

        Args:
            entering: the model that entered the stage; best-of-n of a reward model's stage samples from it.
        """
        step = self.experiment.stages[index].steps
        self._answer_prompts(model, log, step, "after")
        self._measure(list(self.experiment.evals), model, log, step, "after")
        if isinstance(model, Scorer):
            chosen = [item for item in self.experiment.evals if item.metric == "best_of_n"]
            self._write(chosen, self._subject(entering, None, (model,)), log, step, "after")

    def _measure(self, items: list[Eval], model: Transformer | Scorer, log: MetricsLog, step: int, when: str) -> None:
        for number, item in enumerate(items, start=1):
            self.tell(f"evaluating {number}/{len(items)}: {item.name}")
            for line, examples in self.lines(item, model, step, when):
                self._log(log, line, examples)

    def _write(self, items: list[Eval], subject: Subject, log: MetricsLog, step: int, when: str) -> None:
        for item in items:
            self._log(log, *self._lines(item, subject, step, when))

    def _log(self, log: MetricsLog, line: Line, examples: list[Line]) -> None:
        """Write the examples, then the line of eval.jsonl, which marks the measurement as complete."""
        log.samples(examples)
        log.evaluation(line)

    def lines(self, item: Eval, model: Transformer | Scorer, step: int, when: str) -> list[tuple[Line, list[Line]]]:
        """Run one eval; returns its line of eval.jsonl and its samples, or [] if it cannot be measured yet.

        A reward model runs pair evals only. Best-of-n is measured after the stage of the reward model that chooses.
        """
        if item.metric == "best_of_n" or broadcast_from_main(lambda: uncollected(item)) or self._has_no_examples(item):
            return []
        if isinstance(model, Scorer):
            if item.metric != "pair_accuracy":
                return []
            return [self._lines(item, self._subject(model), step, when)]
        sampled = item.metric == "reward" and item.temperature == 1
        reference = self.reference() if sampled or item.metric == "pair_accuracy" else None
        if item.metric == "pair_accuracy" and reference is None:
            return []
        scorers = self.scorers() if sampled else ()
        return [self._lines(item, self._subject(model, reference, scorers), step, when)]

    def _lines(self, item: Eval, subject: Subject, step: int, when: str) -> tuple[Line, list[Line]]:
        found = measure(item, subject)
        if item.name not in self.passed_over:
            examples = self._examples(item)
            counts = {"passed_over": dict(examples.left_out), "cut": examples.cut}
            self.passed_over[item.name] = {name: count for name, count in counts.items() if count}
        where = {"step": step, "when": when, "eval": item.name}
        kind = "pair" if item.metric == "pair_accuracy" else "heldout"
        asked = {"asked": item.count} if found.count < item.count else {}
        counted = {"metric": item.metric, "count": found.count} | asked | self.passed_over[item.name]
        return where | counted | found.values, [{"kind": kind} | where | example for example in found.examples]

    def _examples(self, item: Eval) -> Examples:
        return read_examples(item, self.tokenizer, self.experiment.model.max_len, talks_of(self.experiment))

    def _has_no_examples(self, item: Eval) -> bool:
        """Whether an eval on collected rows has no example to measure; prints the reason once."""
        if not is_collected(item.source):
            return False
        try:
            self._examples(item)
        except UserError as error:
            if item.name not in self.told and is_main_process():
                print(f"evals.{item.name} is not measured: {error}", flush=True)
            self.told.add(item.name)
            return True
        return False

    def _subject(
        self, model: Transformer | Scorer, reference: Transformer | None = None, scorers: tuple[Scorer, ...] = ()
    ) -> Subject:
        experiment = self.experiment
        layout = experiment.rollout_mesh
        return Subject(model, self.tokenizer, reference, scorers, experiment.seed, talks_of(experiment), layout)

    def _answer_prompts(self, model: Transformer | Scorer, log: MetricsLog, step: int, when: str) -> None:
        prompts = list(self.experiment.prompts)
        if not prompts or isinstance(model, Scorer):
            return
        self.tell("evaluating: answers to the prompts")
        room = _answer_tokens(self.experiment.model.max_len)
        answers = generate_text(model, self.tokenizer, prompts, max_new_tokens=room)
        log.samples(
            [
                {
                    "kind": "prompt",
                    "step": step,
                    "when": when,
                    "prompt": prompt,
                    "answer": answer.text,
                    "eos": answer.eos,
                }
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        )


def uncollected(item: Eval) -> bool:
    """Whether an eval's file has yet to be written by a Collect stage."""
    return is_collected(item.source) and not Path(item.source.path).exists()


def check_evals(experiment: Experiment, tokenizer: TextTokenizer) -> list[str]:
    """A line for every eval whose data exists: how many examples it measures and skips.

    Raises:
        UserError: an eval has no examples or an invalid row, or one of the experiment's prompts is too long.
    """
    max_len, talks = experiment.model.max_len, talks_of(experiment)
    room = max_len - _answer_tokens(max_len)
    for number, prompt in enumerate(experiment.prompts):
        size = len(encode_prompt(tokenizer, prompt))
        if size > room:
            raise UserError(
                f"prompts.{number} has {size} tokens; model.max_len {max_len} less {max_len - room} for the answer leaves "
                f"{room}: shorten the prompt, or raise model.max_len"
            )
    lines = []
    if experiment.prompts and not tokenizer.chats:
        lines.append("prompts: the model has no chat template and continues them as text")
    for item in experiment.evals:
        if not uncollected(item):
            try:
                lines.append(read_examples(item, tokenizer, max_len, talks).describe(item))
            except EmptySplit as error:
                raise UserError(f"evals.{item.name}: {error}: --{_field(experiment, item)}.holdout") from error
    return lines


def _field(experiment: Experiment, item: Eval) -> str:
    """Dotted name of an eval's source: that of a stage if it has the same source, else the eval's own."""
    of_stages = {
        source: f"{stage.name}.sources.{i}" for stage in experiment.stages for i, source in enumerate(stage.sources)
    }
    return of_stages.get(item.source, f"evals.{item.name}.source")


def _answer_tokens(max_len: int) -> int:
    """Token limit of answers to the experiment's prompts."""
    return min(ANSWER_TOKENS, max_len // 2)
