"""A model's slots as the server uses them: completions enter and leave at any step, and prompts are read between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lm.data.text_tokenizer import TextTokenizer
from lm.model.transformer import Transformer
from lm.rollout.slots import Assignment, empty_reader, empty_slots, fill_lanes, read_chunk
from lm.rollout.stepping import BURST, SlotSettings, Stepped, step
from lm.serve.completions import LiveCompletion
from lm.serve.text_stream import ScoredToken

SHORT = 64  # tokens of a prompt that are read at a time where the prompt has no more
LONG = 256  # and of a longer one, of which a step reads one such part
READ = 256  # tokens of short prompts that are read between two steps, at least one prompt


@dataclass(frozen=True)
class EngineSizes:
    """Number of slots, and the maximum tokens of a prompt with its completion (`length`) and of a completion (`new`)."""

    slots: int
    length: int
    new: int

    @property
    def prompt(self) -> int:
        """Columns of the cache of a prompt: whole parts that are read at a time."""
        part = LONG if self.length > SHORT else SHORT
        return -(-self.length // part) * part


@dataclass
class LongPrompt:
    """A long prompt that is being read, with the completions that begin after it, each in its slot."""

    prompt: Sequence[int]
    waiting: list[tuple[int, LiveCompletion]]
    start: int = 0


class SlotEngine:
    """The slots of one model, and the completions in them. All methods are called by one thread.

    A completion's tokens depend on its prompt and its settings, not on its slot nor on the other completions.
    """

    def __init__(self, model: Transformer, tokenizer: TextTokenizer, sizes: EngineSizes):
        self.model, self.tokenizer, self.sizes = model, tokenizer, sizes
        self.waiting: deque[LiveCompletion] = deque()
        self.taken: list[LiveCompletion | None] = [None] * sizes.slots
        self.reserved: set[int] = set()  # slots of the prompt that is being read
        self._reading: LongPrompt | None = None
        self._slots = empty_slots(model, sizes.slots, sizes.slots, sizes.prompt, sizes.new)
        self._short, self._long = (empty_reader(model, 1, sizes.prompt) for _ in range(2))
        count = sizes.slots
        self._started, self._lengths = np.zeros(count, bool), np.zeros(count, np.int32)
        self._samples, self._limits = (np.zeros(count, np.int32) for _ in range(2))
        self._seeds, self._temperature = np.zeros(count, np.uint32), np.zeros(count, np.float32)
        self._top_k, self._top_p = np.zeros(count, np.int32), np.ones(count, np.float32)
        self._every = np.full((count, -(-tokenizer.vocab_size // 32)), -1, np.int32)
        self._pending: tuple[Stepped, list[LiveCompletion | None]] | None = None

    @property
    def running(self) -> int:
        """Number of completions in slots."""
        return sum(one is not None for one in self.taken)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._reading or self.running or self._pending)

    def completions(self) -> list[LiveCompletion]:
        """All completions that wait, are about to begin, or are in a slot."""
        reading = [one for _, one in self._reading.waiting] if self._reading else []
        return [*self.waiting, *reading, *(one for one in self.taken if one is not None)]

    def turn(self) -> int:
        """Take the tokens of the step before, begin the next step, then pass the tokens on; returns how many there were.

        The next step is computed while the texts of the tokens are made.
        """
        found = self._collect()
        self._drop()
        # A completion's first token is not held back by a second one.
        burst = 1 if self._admit() else BURST
        if self.running:
            self._begin_step(burst)
        for progress, tokens, done in found:
            progress.add(tokens, done, self.tokenizer.end_ids)
        return sum(len(tokens) for _, tokens, _ in found)

    def _collect(self) -> list[tuple[LiveCompletion, list[ScoredToken], bool]]:
        """The tokens of the step that was begun last, by completion; ended completions leave their slots."""
        if self._pending is None:
            return []
        stepped, taken = self._pending
        self._pending = None
        stepped = jax.device_get(stepped)
        sampled, logps, found = stepped.tokens.tolist(), stepped.logp.tolist(), []
        for slot, progress in enumerate(taken):
            if progress is None or progress.finished or progress.cancelled:
                continue
            others = _others(stepped, slot, progress.settings.alternatives or 0)
            scored = map(ScoredToken, sampled[slot], logps[slot], others)
            tokens = [one for one in scored if one.token >= 0]
            done = bool(stepped.done[slot])
            if progress.matcher is not None:
                progress.matcher.consume_tokens([one.token for one in tokens])
                done = done or progress.matcher.is_stopped()
            found.append((progress, tokens, done))
            if done:
                self._free(slot)
        return found

    def _drop(self) -> None:
        """Free the slots of completions that have ended or whose client has gone."""
        for slot, progress in enumerate(self.taken):
            if progress is not None and (progress.finished or progress.cancelled):
                self._free(slot)
        if self._reading:
            self._reading.waiting = [one for one in self._reading.waiting if not (one[1].cancelled or one[1].finished)]
            self.reserved = {slot for slot, _ in self._reading.waiting}
            self._reading = self._reading if self._reading.waiting else None
        if any(one.cancelled or one.finished for one in self.waiting):
            self.waiting = deque(one for one in self.waiting if not (one.cancelled or one.finished))

    def _free(self, slot: int) -> None:
        self.taken[slot], self._limits[slot] = None, 0

    def _admit(self) -> bool:
        """Read prompts into free slots; returns whether a completion has begun."""
        begun, left = self._read_long(), READ
        free = deque(slot for slot, one in enumerate(self.taken) if one is None and slot not in self.reserved)
        while free and self.waiting and left > 0:
            prompt = self.waiting[0].prompt
            if len(prompt) > SHORT and self._reading:
                short = next((one for one in self.waiting if len(one.prompt) <= SHORT), None)
                if short is None:
                    break
                self.waiting.remove(short)
                group = [(free.popleft(), short)]
            else:
                group = [(free.popleft(), self.waiting.popleft())]
                while free and self.waiting and self.waiting[0].prompt is prompt:
                    group.append((free.popleft(), self.waiting.popleft()))
            if len(group[0][1].prompt) > SHORT:
                self._reading = LongPrompt(prompt, group)
                self.reserved = {slot for slot, _ in group}
                begun |= self._read_long()
            else:
                self._short = self._read(self._short, group[0][1].prompt, 0, SHORT)
                self._place(self._short, group)
                begun, left = True, left - SHORT
        return begun

    def _read_long(self) -> bool:
        """Read the next part of the long prompt; returns whether that was the last one."""
        if self._reading is None:
            return False
        one = self._reading
        self._long = self._read(self._long, one.prompt, one.start, LONG)
        one.start += LONG
        if one.start < len(one.prompt):
            return False
        self._place(self._long, one.waiting)
        self._reading, self.reserved = None, set()
        return True

    def _read(self, reader: tuple[Any, Any], prompt: Sequence[int], start: int, width: int) -> tuple[Any, Any]:
        tokens = np.zeros((1, width), np.int32)
        part = prompt[start : start + width]
        tokens[0, : len(part)] = part
        return read_chunk(self.model, *reader, np.int32(start), tokens, np.array([len(prompt)], np.int32))

    def _place(self, reader: tuple[Any, Any], group: Sequence[tuple[int, LiveCompletion]]) -> None:
        """Begin the completions of a prompt that has been read, each in its slot."""
        for slot, progress in group:
            length = np.array([len(progress.prompt)], np.int32)
            self._slots = fill_lanes(self._slots, *reader, length, np.array([slot], np.int32))
            settings = progress.settings
            self.taken[slot], self._started[slot] = progress, True
            self._samples[slot], self._limits[slot] = progress.sample, progress.limit
            self._seeds[slot], self._temperature[slot] = settings.seed, settings.temperature
            self._top_k[slot], self._top_p[slot] = settings.top_k, settings.top_p

    def _begin_step(self, burst: int) -> None:
        count, running = self.sizes.slots, [one.settings for one in self.taken if one is not None]
        allowed, constrained = self._every, False
        for slot, progress in enumerate(self.taken):
            if progress is not None and progress.matcher is not None:
                allowed = allowed if constrained else allowed.copy()
                constrained, burst = True, 1
                progress.matcher.fill(allowed[slot])
        places = np.arange(count, dtype=np.int32)
        assigned = Assignment(
            self._started.copy(), np.zeros(count, np.int32), self._samples.copy(), self._limits.copy(), places,
            np.zeros(count, np.int32), places[:, None],
        )  # fmt: skip
        choices = SlotSettings(
            self._seeds.copy(), self._temperature.copy(), self._top_k.copy(), self._top_p.copy(), allowed,
            np.bool_(constrained), np.bool_(any(one.top_k or one.top_p < 1 for one in running)),
            np.bool_(any(one.alternatives for one in running)),
        )  # fmt: skip
        self._slots, stepped = step(
            self.model, self._slots, assigned, choices, np.int32(burst),
            end_ids=tuple(self.tokenizer.end_ids), vocab_size=self.tokenizer.vocab_size,
        )  # fmt: skip
        self._started[:] = False
        self._pending = stepped, list(self.taken)


def _others(stepped: Stepped, slot: int, most: int) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens in the place of each token of a slot, with their log-probabilities."""
    if not most:
        return [()] * BURST
    tokens, logps = (x[slot, :, :most].tolist() for x in (stepped.others, stepped.others_logp))
    return [tuple(zip(*both, strict=True)) for both in zip(tokens, logps, strict=True)]
