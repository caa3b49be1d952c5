"""When a run measures itself: every eval before and after each stage, some in between; prompts answered each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm.data.tokenizer import Tokenizer
from lm.evals.heldout import measure
from lm.experiment import Eval, Experiment
from lm.model.transformer import Transformer
from lm.parallel.distributed import as_first
from lm.rollout.sampler import generate_text
from lm.train.metrics import MetricsLog, read_lines
from lm.train.run_folder import RunFolder

ANSWER_TOKENS = 80  # longest answer to one of the experiment's prompts


class Evaluator:
    """Measures models for a run and writes what it finds.

    Args:
        reference: the model that preferences are compared with, None before there is one; asked for when needed.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        tokenizer: Tokenizer,
        reference: Callable[[], Transformer | None],
    ):
        self.experiment, self.folder, self.tokenizer, self.reference = experiment, folder, tokenizer, reference

    def before(self, index: int, model: Transformer, log: MetricsLog) -> None:
        """The model that enters a stage: what the stage before measured at its end, and what is new.

        What is already written is left, so that a run which was killed meanwhile completes it.
        """
        known, answered = as_first(lambda: self._known_before(index, log))
        if not answered:
            self._answer_prompts(model, log, 0, "before")
        self._measure([e for e in self.experiment.evals if e.name not in known], model, log, 0, "before")

    def _known_before(self, index: int, log: MetricsLog) -> tuple[list[str], bool]:
        """Which evals are written down already, and whether the prompts are answered; copied from the stage before."""
        evals, samples = (read_lines(log.folder / f"{kind}.jsonl") for kind in ("eval", "samples"))
        known = {line["eval"] for line in evals if line["when"] == "before"}
        answered = any(line["when"] == "before" and line["kind"] == "prompt" for line in samples)
        if index > 0 and not known:
            last = self.folder.stage_folder(self.experiment.stages[index - 1].name)
            for line in read_lines(last / "samples.jsonl"):
                if line["when"] == "after" and line["kind"] != "rollout":
                    log.sample(line | {"step": 0, "when": "before"})
                    answered = True
            for line in read_lines(last / "eval.jsonl"):
                if line["when"] == "after":
                    log.evaluation(line | {"step": 0, "when": "before"})
                    known.add(line["eval"])
        return sorted(known), answered

    def during(self, index: int, model: Transformer, log: MetricsLog, step: int) -> None:
        """The evals that the stage names, and the prompts."""
        names = self.experiment.stages[index].evals
        self._answer_prompts(model, log, step, "during")
        self._measure([e for e in self.experiment.evals if e.name in names], model, log, step, "during")

    def after(self, index: int, model: Transformer, log: MetricsLog) -> None:
        """All evals, and the prompts."""
        step = self.experiment.stages[index].steps
        self._answer_prompts(model, log, step, "after")
        self._measure(list(self.experiment.evals), model, log, step, "after")

    def _measure(self, items: list[Eval], model: Transformer, log: MetricsLog, step: int, when: str) -> None:
        for item in items:
            for line, examples in self.lines(item, model, step, when):
                log.evaluation(line)
                for example in examples:
                    log.sample(example)

    def lines(
        self, item: Eval, model: Transformer, step: int, when: str
    ) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """The line of eval.jsonl and those of samples.jsonl; none where there is nothing to compare with yet."""
        reference = self.reference() if item.metric == "pair_accuracy" else None
        if item.metric == "pair_accuracy" and reference is None:
            return []
        found = measure(item, model, self.tokenizer, reference, self.experiment.seed)
        where = {"step": step, "when": when, "eval": item.name}
        kind = "pair" if item.metric == "pair_accuracy" else "heldout"
        line = where | {"metric": item.metric, "count": found.count} | found.values
        return [(line, [{"kind": kind} | where | example for example in found.examples])]

    def _answer_prompts(self, model: Transformer, log: MetricsLog, step: int, when: str) -> None:
        prompts = list(self.experiment.prompts)
        if not prompts:
            return
        room = min(ANSWER_TOKENS, self.experiment.model.max_len // 2)
        for prompt, answer in zip(
            prompts, generate_text(model, self.tokenizer, prompts, max_new_tokens=room), strict=True
        ):
            log.sample(
                {
                    "kind": "prompt",
                    "step": step,
                    "when": when,
                    "prompt": prompt,
                    "answer": answer.text,
                    "eos": answer.eos,
                }
            )
