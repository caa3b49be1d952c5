"""A model's slots as the server uses them: completions enter and leave at any step, and prompts are read between steps."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from lm.data.text_tokenizer import TextTokenizer
from lm.model.transformer import Transformer
from lm.parallel.rules import platform
from lm.rollout.slots import Assignment, empty_reader, empty_slots, fill_lanes, read_chunk
from lm.rollout.stepping import BURST, SlotSettings, Stepped, step
from lm.serve.completions import LiveCompletion
from lm.serve.text_stream import ScoredToken

WIDE = 256  # most tokens of a prompt that are read at a time
# Widths in which a prompt is read, each with the fewest tokens that are left where it is taken. Few widths mean few compilations.
# A CPU's time is that of a part's tokens, padding included; an accelerator's is that of reading the weights, so it takes fewer parts.
WIDTHS = {"cpu": ((WIDE, WIDE), (32, 25), (8, 1))}
WIDTHS_OF_ACCELERATORS = ((WIDE, WIDE), (64, 17), (16, 1))
READ = 256  # tokens that are read between two steps: a part of a long prompt, or short prompts
FEW = 2  # tokens of a step while slots are free, so that a completion that comes begins soon
PASS_SECONDS = 0.05  # between two pieces of a completion's text, at least; and of a step with more than FEW tokens
PASSED = 500  # pieces of text of all completions in a second, at most: each costs about 0.2 ms


@dataclass(frozen=True)
class EngineSizes:
    """Number of slots, and the maximum tokens of a prompt with its completion (`length`) and of a completion (`new`)."""

    slots: int
    length: int
    new: int

    @property
    def prompt(self) -> int:
        """Columns of the cache of a prompt: whole parts that are read at a time."""
        return max(sum(part) for part in parts(self.length))


def part_widths() -> tuple[tuple[int, int], ...]:
    """(width, fewest tokens left) for this kind of device, the widest first."""
    return WIDTHS.get(platform(), WIDTHS_OF_ACCELERATORS)


def parts(length: int) -> list[tuple[int, int]]:
    """Start and width of the parts in which a prompt is read, which depend on its length alone."""
    found, start = [], 0
    while (left := length - start) > 0:
        width = next(width for width, fewest in part_widths() if left >= fewest)
        found.append((start, width))
        start += width
    return found


@dataclass
class LongPrompt:
    """A long prompt that is being read, with the completions that begin after it, each in its slot."""

    prompt: Sequence[int]
    waiting: list[tuple[int, LiveCompletion]]
    left: list[tuple[int, int]]  # parts


class SlotEngine:
    """The slots of one model, and the completions in them. All methods are called by one thread.

    A completion's tokens depend on its prompt and its settings, not on its slot nor on the other completions.
    """

    def __init__(self, model: Transformer, tokenizer: TextTokenizer, sizes: EngineSizes):
        self.model, self.tokenizer, self.sizes = model, tokenizer, sizes
        self._weights, shape = jax.tree.flatten(model)
        self._read_part, self._step = _programs(shape, tuple(tokenizer.end_ids), tokenizer.vocab_size)
        self.steps = 0  # tokens of each slot that have been sampled
        self.waiting: deque[LiveCompletion] = deque()
        self.taken: list[LiveCompletion | None] = [None] * sizes.slots
        self.reserved: set[int] = set()  # slots of the prompt that is being read
        self._reading: LongPrompt | None = None
        self._held: Sequence[int] = ()  # the long prompt, or the part of it, whose keys and values `_long` has
        self._slots = empty_slots(model, sizes.slots, sizes.slots, sizes.prompt, sizes.new)
        self._short, self._long = (empty_reader(model, 1, sizes.prompt) for _ in range(2))
        count = sizes.slots
        self._started, self._lengths = np.zeros(count, bool), np.zeros(count, np.int32)
        self._samples, self._limits = (np.zeros(count, np.int32) for _ in range(2))
        self._seeds, self._temperature = np.zeros(count, np.uint32), np.zeros(count, np.float32)
        self._top_k, self._top_p = np.zeros(count, np.int32), np.ones(count, np.float32)
        self._every = np.full((count, -(-tokenizer.vocab_size // 32)), -1, np.int32)
        self._pending: tuple[Stepped, list[LiveCompletion | None], float] | None = None
        self._token_seconds = PASS_SECONDS  # time of a token of all slots, by the last step

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

    def turn(self, arrive: Callable[[], None]) -> int:
        """Take the tokens of the step before, begin the next step, then pass the tokens on; returns how many there were.

        The next step is computed while the texts of the tokens are made. `arrive` puts what has come during the step before
        into `waiting`, so that it begins with the next one.
        """
        found = self._collect()
        arrive()
        self._drop()
        # A completion's first token is not held back by a second one.
        most = 1 if self._admit() else self._step_tokens()
        if self.running:
            self._begin_step(most)
        now, pause = time.monotonic(), max(PASS_SECONDS, self.running / PASSED)
        for progress, tokens, done in found:
            progress.add(tokens, done, self.tokenizer.end_ids, now, pause)
        return sum(len(tokens) for _, tokens, _ in found)

    def _collect(self) -> list[tuple[LiveCompletion, list[ScoredToken], bool]]:
        """The tokens of the step that was begun last, by completion; ended completions leave their slots."""
        if self._pending is None:
            return []
        stepped, taken, began = self._pending
        self._pending = None
        sampled, done, count = (x.tolist() for x in jax.device_get((stepped.tokens, stepped.done, stepped.count)))
        self.steps += count
        self._token_seconds = (time.monotonic() - began) / count
        reported = any(one is not None and one.settings.alternatives is not None for one in taken)
        scores = jax.device_get((stepped.logp, stepped.others, stepped.others_logp)) if reported else None
        found = []
        for slot, progress in enumerate(taken):
            if progress is None or progress.finished or progress.cancelled:
                continue
            if progress.first is None:
                progress.first = self.steps - progress.arrived
            ids = [token for token in sampled[slot][:count] if token >= 0]
            tokens = _scored(ids, slot, scores, progress.settings.alternatives)
            if progress.matcher is not None:
                progress.matcher.consume_tokens(ids)
                done[slot] = done[slot] or progress.matcher.is_stopped()
            found.append((progress, tokens, done[slot]))
            if done[slot]:
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
            first = self._next_waiting()
            if first is None:
                break
            group = [(free.popleft(), first)]
            while free and self.waiting and self.waiting[0].prompt is first.prompt:
                group.append((free.popleft(), self.waiting.popleft()))
            if len(first.prompt) > READ:
                self._reading = LongPrompt(first.prompt, group, self._unread(first.prompt))
                self.reserved = {slot for slot, _ in group}
                begun |= self._read_long()
            else:
                for part in parts(len(first.prompt)):
                    self._short = self._read(self._short, first.prompt, *part)
                self._place(self._short, group)
                begun, left = True, left - len(first.prompt)
        return begun

    def _next_waiting(self) -> LiveCompletion | None:
        """Take the next completion out of the queue, while a long prompt is being read the next one with a short prompt."""
        fits = (one for one in self.waiting if not self._reading or len(one.prompt) <= READ)
        found = next(fits, None)
        if found is not None:
            self.waiting.remove(found)
        return found

    def _read_long(self) -> bool:
        """Read the next part of the long prompt; returns whether that was the last one."""
        if self._reading is None:
            return False
        one = self._reading
        start, width = one.left.pop(0)
        self._long = self._read(self._long, one.prompt, start, width)
        self._held = one.prompt[: start + width]
        if one.left:
            return False
        self._place(self._long, one.waiting)
        self._reading, self.reserved = None, set()
        return True

    def _unread(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        """The parts of a long prompt that remain to be read after those that the last long prompt began with, as in a conversation.

        A part's keys and values depend on the tokens up to its end and on its width, so that what is kept is what would be read.
        """
        every = parts(len(prompt))
        ends = (start + width for start, width in every[:-1] if width == WIDE)  # the last part gives the hidden state
        known = sum(end <= len(self._held) and prompt[:end] == self._held[:end] for end in ends)
        return every[known:]

    def _read(self, reader: tuple[Any, Any], prompt: Sequence[int], start: int, width: int) -> tuple[Any, Any]:
        part = prompt[start : start + width]
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(part)] = part
        return self._read_part(self._weights, *reader, np.int32(start), tokens, np.array([len(prompt)], np.int32))

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

    def _step_tokens(self) -> int:
        """Tokens of the next step: the more the quicker they are, while all slots are taken and no other completion can begin."""
        if self.running < self.sizes.slots:
            return FEW
        return max(FEW, min(BURST, int(PASS_SECONDS / self._token_seconds)))

    def _begin_step(self, most: int) -> None:
        count, running = self.sizes.slots, [one.settings for one in self.taken if one is not None]
        allowed, constrained = self._every, False
        for slot, progress in enumerate(self.taken):
            if progress is not None and progress.matcher is not None:
                allowed = allowed if constrained else allowed.copy()
                constrained, most = True, 1
                progress.matcher.fill(allowed[slot])
        places = np.arange(count, dtype=np.int32)
        assigned = Assignment(
            self._started.copy(), np.zeros(count, np.int32), self._samples.copy(), self._limits.copy(), places,
            np.zeros(count, np.int32), places[:, None],
        )  # fmt: skip
        choices = SlotSettings(
            self._seeds.copy(), self._temperature.copy(), self._top_k.copy(), self._top_p.copy(), allowed,
            np.bool_(constrained), np.bool_(any(one.top_k or one.top_p < 1 for one in running)),
            np.bool_(any(one.alternatives is not None for one in running)),
        )  # fmt: skip
        self._slots, stepped = self._step(self._weights, self._slots, assigned, choices, np.int32(most))
        self._started[:] = False
        self._pending = stepped, list(self.taken), time.monotonic()


@functools.cache
def _programs(shape: Any, end_ids: tuple[int, ...], vocab_size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`read_chunk` and `step` of models of one shape, from the model's arrays: a call need not take the model apart."""

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def read_part(weights: list[Array], *rest: Any) -> Any:
        return read_chunk(jax.tree.unflatten(shape, weights), *rest)

    @functools.partial(jax.jit, donate_argnums=1)
    def take_step(weights: list[Array], *rest: Any) -> Any:
        return step(jax.tree.unflatten(shape, weights), *rest, end_ids=end_ids, vocab_size=vocab_size)

    return read_part, take_step


def _scored(ids: list[int], slot: int, scores: Any, most: int | None) -> list[ScoredToken]:
    """The tokens of a slot with their log-probabilities and the `most` likeliest alternatives; None: without."""
    if most is None:
        return [ScoredToken(token, 0.0) for token in ids]
    logps, others, others_logp = (x[slot].tolist() for x in scores)
    return [
        ScoredToken(token, logp, tuple(zip(names[:most], values[:most], strict=True)))
        for token, logp, names, values in zip(ids, logps, others, others_logp, strict=False)
    ]
