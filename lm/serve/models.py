"""The models that a server offers, by name, each with its engine: stages of a run, adapters, or published models."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lm.data.bad_rows import BadRow
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import nearest
from lm.model.lora import sharing_base
from lm.model.transformer import Transformer
from lm.rollout.sampler import encode_prompt
from lm.rollout.slots import sampling_model
from lm.serve.completions import Delta, LiveCompletion
from lm.serve.memory import LENGTH, sizes_for
from lm.serve.protocol import Asked, Refused, Settings
from lm.serve.schema import Tokens
from lm.serve.slot_engine import SlotEngine, part_widths
from lm.serve.text_stream import TextStream
from lm.train.loaded_run import load_adapters, load_run

DEFAULT = "default"  # also a name of the first model


@dataclass(frozen=True)
class Served:
    """A model by its name: tokenizer, bytes of tokens and engine."""

    name: str
    tokenizer: TextTokenizer
    tokens: Tokens
    engine: SlotEngine
    created: int

    def prepare(self, asked: Asked, deadline: float, sink: Any) -> list[LiveCompletion]:
        """The completions of a request; `sink` gets their deltas.

        Raises:
            Refused: a prompt does not fit, or cannot be rendered.
        """
        settings = asked.settings
        grammar = None if settings.schema is None else self.tokens.grammar(settings.schema)
        found: list[LiveCompletion] = []
        for prompt in asked.prompts:
            ids = self._encoded(asked, prompt)
            limit = self._limit(asked, len(ids))
            before = () if asked.chat else ids[-1:]
            for sample in range(asked.n):
                text = TextStream(self.tokenizer, settings.stop, before, settings.alternatives is not None)
                matcher = None if grammar is None else self.tokens.matcher(grammar)
                found.append(LiveCompletion(len(found), sample, ids, settings, limit, deadline, sink, text, matcher))
        return found

    def _encoded(self, asked: Asked, prompt: Any) -> list[int]:
        if asked.chat:
            return self._rendered(asked, prompt)
        if isinstance(prompt, str):
            return encode_prompt(self.tokenizer, prompt, raw=True)
        if max(prompt) >= self.tokenizer.vocab_size or min(prompt) < 0:
            raise Refused(f"prompt has a token that is not from 0 to {self.tokenizer.vocab_size - 1}", "prompt")
        return prompt

    def _rendered(self, asked: Asked, messages: list[dict[str, Any]]) -> list[int]:
        if not self.tokenizer.chats:
            raise Refused(
                f"the model {self.name} has no chat template: ask /v1/completions with a prompt", "messages",
                code="no_chat_template",
            )  # fmt: skip
        if len(messages) > self.engine.sizes.length:  # a message has at least a token
            raise self._too_long(f"{len(messages)} messages")
        try:
            return self.tokenizer.render(messages, generation_prompt=True, variables=asked.variables).tokens
        except BadRow as error:
            raise Refused(f"messages: {error}", "messages") from error

    def _limit(self, asked: Asked, prompt: int) -> int:
        """Maximum number of tokens of a completion."""
        sizes, most = self.engine.sizes, asked.settings.max_tokens
        room = sizes.length - prompt
        if room < 1:
            raise self._too_long(f"{prompt} tokens", asked.chat)
        if most is None:
            return min(room, sizes.new)
        if most > sizes.new:
            raise Refused(
                f"max_tokens is {most}; this server samples at most {sizes.new} (lm serve --max-new-tokens)",
                "max_tokens",
            )
        if most > room:
            raise self._too_long(f"{prompt} tokens, and max_tokens is {most}", asked.chat)
        return most

    def _too_long(self, what: str, chat: bool = True) -> Refused:
        return Refused(
            f"the {'messages have' if chat else 'prompt has'} {what}; the context of {self.name} is "
            f"{self.engine.sizes.length} tokens", "messages" if chat else "prompt", code="context_length_exceeded",
        )  # fmt: skip


def find(models: Mapping[str, Served], name: str) -> Served:
    """The model of this name.

    Raises:
        Refused: there is none.
    """
    if name == DEFAULT:
        return next(iter(models.values()))
    if name not in models:
        hint = nearest(name, models) if len(name) < 100 else ""
        raise Refused(
            f"there is no model {name[:100]!r}; there are {', '.join([*models, DEFAULT])}{hint}", "model", 404,
            "model_not_found",
        )  # fmt: skip
    return models[name]


def load_models(
    folder: Path, stages: Sequence[str | None], adapters: Sequence[str], slots: int, length: int, new: int
) -> dict[str, Served]:
    """Load the models of a run's stages, or of one with each of several adapters, onto this machine's device.

    Args:
        length, new: see `sizes_for`.

    Raises:
        UserError: there is no such model, or a size is larger than its context.
    """
    served: dict[str, Served] = {}
    for stage in stages:
        base = load_run(folder, stage, length or LENGTH)
        name = base.stage or folder.stem
        prefix = f"{name}+" if len(stages) > 1 else ""
        runs = {prefix + one if one else name: run for one, run in load_adapters(base, folder, adapters).items()}
        runs.setdefault(name, base)
        sizes = sizes_for(base.model, slots, length, new, len(stages) * len(runs))
        first: Transformer | None = None
        for title, run in runs.items():
            model = sampling_model(run.model)
            # Adapters add their factors to the same weights.
            model = first = model if first is None else sharing_base(model, first)
            served[title] = Served(
                title, run.tokenizer, Tokens(run.tokenizer), SlotEngine(model, run.tokenizer, sizes), int(time.time())
            )
        del base, runs, run  # the weights as they were loaded
    return served


def warm_up(served: Served) -> None:
    """Compile the programs of an engine, by prompts of all widths."""
    engine = served.engine
    settings = Settings(temperature=1.0, top_p=1.0, top_k=0, seed=0, max_tokens=1, stop=(), alternatives=None)
    for size in {min(engine.sizes.length - 1, fewest) for _, fewest in part_widths()}:
        asked = Asked(served.name, [[0] * size], False, 1, False, False, settings, {})
        engine.waiting += served.prepare(asked, math.inf, _nothing)
        while engine.busy:
            engine.turn(_no_more)
    jax.block_until_ready(engine.model)


def _nothing(delta: Delta) -> None:
    """A sink of completions that nobody reads."""


def _no_more() -> None:
    """Nothing arrives while an engine warms up."""
