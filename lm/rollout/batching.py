"""Continuous batching: which completion is in which slot, and when prompts are read, decided on the host.

A free slot gets the next completion of a prompt that is in a lane of its shard; a lane whose completions have all ended gets the
next prompt. Decisions depend on the request and on the tokens so far, which are the same in all processes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from lm.parallel.rules import platform, ways
from lm.rollout.slots import Assignment

CHUNK = 256  # most tokens of a prompt that are read at a time
READ = 512  # most tokens of all prompts that are read at a time, in each shard
LEAST_READ = 128  # least of them, if so many prompts wait
REFILL = 8  # slots are refilled when this fraction of them, 1/8, have ended
SLOTS = {"cpu": 32}  # slots of each shard
MOST_SLOTS = 256  # on other devices


@dataclass(frozen=True)
class Sizes:
    """Shapes of the engine's programs. `shards` is the number of parts of the batch, each with its share of the rest.

    `places` is the number of slots that can share a lane, `reading` the number of prompts that are read together, `prompt`
    and `new` the maximum tokens of a prompt and of a completion, `chunk` the tokens of a prompt that are read at a time,
    `refill` the number of ended completions after which others get their slots.
    """

    shards: int
    slots: int
    lanes: int
    places: int
    reading: int
    prompt: int
    new: int
    chunk: int
    refill: int


def sizes_of(prompts: int, group_size: int, width: int, new: int, slots: int = 0) -> Sizes:
    """Sizes for a request of `prompts` prompts of at most `width` tokens, on the current mesh.

    Args:
        slots: number of slots; 0: the number that suits the device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else ways("batch", mesh.shape)
    most = -(-prompts * group_size // shards)
    rows = min(most, -(-slots // shards) or SLOTS.get(platform(), MOST_SLOTS))
    places = min(group_size, rows)
    # Twice the lanes that full groups need, so that slots whose group is ending may begin another.
    lanes = rows if places == 1 else min(-(-prompts // shards), 2 * math.ceil(rows / places))
    chunks = max(1, -(-width // CHUNK))
    chunk = max(1, -(-width // chunks))
    # As many as a refill needs, and enough tokens for fast products.
    reading = min(lanes, max(1, READ // chunk), max(-(-rows // (REFILL * places)), LEAST_READ // chunk))
    return Sizes(
        shards, shards * rows, shards * lanes, places, shards * reading, chunks * chunk, new, chunk,
        max(1, shards * rows // REFILL),
    )  # fmt: skip


class Occupant(NamedTuple):
    """A completion in progress: numbers of its prompt and in its group, its lane, its place there, its limit."""

    prompt: int
    sample: int
    lane: int
    place: int
    limit: int


class Batching:
    """State of a request's completions: waiting, in a slot, or ended."""

    def __init__(self, sizes: Sizes, limits: Sequence[Sequence[int]]):
        self.sizes = sizes
        self.unread = deque(
            (prompt, deque((sample, limit) for sample, limit in enumerate(group) if limit > 0))
            for prompt, group in enumerate(limits)
            if any(limit > 0 for limit in group)
        )
        self.prompt_of = [-1] * sizes.lanes
        self.waiting: list[deque[tuple[int, int]]] = [deque() for _ in range(sizes.lanes)]
        self.slots: list[Occupant | None] = [None] * sizes.slots

    @property
    def running(self) -> bool:
        """Whether a completion is in a slot."""
        return any(self.slots)

    @property
    def waits(self) -> bool:
        """Whether a completion waits for a slot."""
        return bool(self.unread) or any(self.waiting)

    def next_prompts(self) -> list[tuple[int, int, int]]:
        """Prompts to read now for slots that nothing in a lane waits for: (row of the reader, lane, prompt)."""
        s = self.sizes
        taken = {place.lane for place in self.slots if place}
        rows, lanes = s.reading // s.shards, s.lanes // s.shards
        found = []
        for shard in range(s.shards):
            own = range(shard * lanes, (shard + 1) * lanes)
            free = [lane for lane in own if lane not in taken and not self.waiting[lane]]
            if len(self._free_slots(shard)) <= sum(len(self.waiting[lane]) for lane in own):
                continue
            for row, lane in enumerate(free[:rows]):
                if self.unread:
                    self.prompt_of[lane], self.waiting[lane] = self.unread.popleft()
                    found.append((shard * rows + row, lane, self.prompt_of[lane]))
        return found

    def assign(self) -> Assignment:
        """Give free slots the completions that wait in their shard's lanes."""
        s = self.sizes
        lanes = s.lanes // s.shards
        members = np.full((s.lanes, s.places), s.slots, np.int32)
        for slot, held in self._taken():
            members[held.lane, held.place] = self._local(slot)
        started = np.zeros(s.slots, bool)
        for shard in range(s.shards):
            free = deque(self._free_slots(shard))
            for lane in range(shard * lanes, (shard + 1) * lanes):
                for place in np.flatnonzero(members[lane] == s.slots).tolist():
                    if not (free and self.waiting[lane]):
                        break
                    # Without sharing, the lane of a slot is the one with its number.
                    slot = free.popleft() if s.places > 1 else lane
                    sample, limit = self.waiting[lane].popleft()
                    self.slots[slot] = Occupant(self.prompt_of[lane], sample, lane, place, limit)
                    members[lane, place], started[slot] = self._local(slot), True
        prompts, samples, limits, of_lane, places = np.zeros((5, s.slots), np.int32)
        for slot, p in self._taken():
            prompts[slot], samples[slot], limits[slot] = p.prompt, p.sample, p.limit
            of_lane[slot], places[slot] = p.lane % lanes, p.place
        return Assignment(started, prompts, samples, limits, of_lane, places, members)

    def end(self, done: Bool[np.ndarray, " R"]) -> Iterator[tuple[int, Occupant]]:
        """Take the completions that are done out of their slots."""
        for slot, place in self._taken():
            if done[slot]:
                self.slots[slot] = None
                yield slot, place

    def _taken(self) -> list[tuple[int, Occupant]]:
        return [(slot, place) for slot, place in enumerate(self.slots) if place]

    def _free_slots(self, shard: int) -> list[int]:
        size = self.sizes.slots // self.sizes.shards
        return [slot for slot in range(shard * size, (shard + 1) * size) if not self.slots[slot]]

    def _local(self, slot: int) -> int:
        return slot % (self.sizes.slots // self.sizes.shards)
