"""`lm.load`: the model of a run as an object that answers prompts and gives log-probabilities, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data.chat import as_messages, check_conversation, render
from lm.experiment import UserError
from lm.objectives.logprobs import token_logprobs
from lm.rollout.engine import generate_text
from lm.train.compilations import keep_compilations
from lm.train.loaded_run import LoadedRun, load_adapters, load_run
from lm.types import TokenBatch

Prompt = str | Sequence[dict[str, str]]
"""One user turn, or a conversation of {"role", "content"} turns that ends with the user's."""


class TokenLogprob(NamedTuple):
    """A token as text, with its log-probability in nats given the preceding text."""

    text: str
    logprob: float


@dataclass(frozen=True)
class TrainedModel:
    """The model of a run after one of its stages, or a published model."""

    folder: Path
    loaded: LoadedRun

    def __repr__(self) -> str:
        stage = f", after stage {self.loaded.stage!r}" if self.loaded.stage else ""
        return f"TrainedModel({str(self.folder)!r}{stage})"

    def sample(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        raw: bool = False,
    ) -> list[str]:
        """An answer to each prompt.

        Args:
            max_new_tokens: maximum length of an answer; None: 128, or half of the context if that is less.
            temperature: sampling temperature; 0: greedy.
            top_k: sample from the k most likely tokens; 0: all.
            top_p: sample from the most likely tokens of this total probability.
            raw: continue the prompts as text instead of answering them, as a model without a chat template always does.

        Raises:
            UserError: a prompt does not fit in the context with its answer, or an option is out of its range.
        """
        longest = self.loaded.experiment.model.max_len
        new = min(128, longest // 2) if max_new_tokens is None else max_new_tokens
        ranges = {
            "max_new_tokens": (new, 1, longest),
            "temperature": (temperature, 0, 100),
            "top_k": (top_k, 0, 2**31 - 1),
            "top_p": (top_p, 0, 1),
            "seed": (seed, 0, 2**31 - 1),
        }
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise UserError(f"{name} is {value}; it should be from {low} to {high}")
        given = _listed(prompts)
        if not given:
            return []
        asked = given if raw or not self.loaded.tokenizer.chats else [_asked(prompt) for prompt in given]
        answers = generate_text(
            self.loaded.model, self.loaded.tokenizer, asked,  # type: ignore[arg-type]
            max_new_tokens=new, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, raw=raw,
        )  # fmt: skip
        return [answer.text for answer in answers]

    def logprobs(
        self, prompts: str | Sequence[Prompt], answers: str | Sequence[str], *, raw: bool = False
    ) -> list[list[TokenLogprob]]:
        """The tokens of each prompt's answer, including the end token, each with its log-probability.

        Args:
            raw: the answers continue the prompts as text, without an end token.

        Raises:
            UserError: the numbers of prompts and answers differ, or a prompt and its answer do not fit in the context.
        """
        given, said = _listed(prompts), [answers] if isinstance(answers, str) else list(answers)
        if len(given) != len(said):
            raise UserError(f"there are {len(given)} prompts and {len(said)} answers; each prompt needs its answer")
        rendered = self._continued if raw else self._answered
        return [self._logprobs(*rendered(prompt, answer)) for prompt, answer in zip(given, said, strict=True)]

    def _answered(self, prompt: Prompt, answer: str) -> tuple[list[int], int, int]:
        """The tokens of a conversation, and the indices at which its last answer begins and ends."""
        turns = _asked(prompt)
        tokens, mask, last = render([*turns, {"role": "assistant", "content": answer}], self.loaded.tokenizer)[:3]
        return tokens, mask.index(1, last), len(mask) - mask[::-1].index(1)  # after the end token

    def _continued(self, prompt: Prompt, answer: str) -> tuple[list[int], int, int]:
        """The tokens of a document, the index of the first one without any of the prompt's text, and the end."""
        tokenizer, text = self.loaded.tokenizer, str(prompt)
        ids, starts = tokenizer.encode_offsets(text + answer)
        first = sum(start < len(text) for start in starts)
        return [tokenizer.document_ids[0], *ids], 1 + first, 1 + len(ids)

    def _logprobs(self, tokens: list[int], start: int, end: int) -> list[TokenLogprob]:
        tokenizer, longest = self.loaded.tokenizer, self.loaded.experiment.model.max_len
        if end > longest:
            raise UserError(f"a prompt and its answer have {end} tokens; model.max_len is {longest}")
        width = min(longest, max(16, 1 << (end - 1).bit_length()))  # few widths, few compilations
        row = np.full((1, width), tokenizer.pad_id, np.int32)
        row[0, :end] = tokens[:end]
        real = (np.arange(width) < end)[None].astype(np.int32)
        batch = TokenBatch(row, real.astype(np.float32), real, np.arange(width, dtype=np.int32)[None])
        found = np.asarray(token_logprobs(self.loaded.model, batch).logp)[0, start:end]
        pieces = [tokenizer.decode([token], specials=True) for token in tokens[start:end]]
        return [TokenLogprob(piece, float(value)) for piece, value in zip(pieces, found, strict=True)]


def load(run: str | Path, stage: str | None = None, adapter: str | Path | None = None) -> TrainedModel:
    """Load a model: a run's, by folder or name in runs/, after `stage` (None: the last), or a published one, by folder or GGUF file.

    Args:
        adapter: folder of a PEFT adapter to add to it.

    Raises:
        UserError: there is no such run or stage, or nothing is trained yet.
    """
    tried = Path(str(run).removeprefix("hf:").removeprefix("gguf:")).expanduser(), Path("runs") / run
    folder = next((path for path in tried if path.exists()), None)
    if folder is None:
        raise UserError(f"there is no folder {run}, and no run of that name in {Path('runs').resolve()}")
    keep_compilations()
    adapters = load_adapters(load_run(folder, stage), folder, [] if adapter is None else [str(adapter)])
    return TrainedModel(folder, *adapters.values())


def _listed(prompts: str | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list; a string or a single conversation counts as one prompt."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)


def _asked(prompt: Prompt) -> list[dict[str, str]]:
    turns = as_messages(prompt)
    check_conversation(turns, "a prompt", needs_answer=False)
    return turns
