"""`gen:countdown`: make a target from three numbers, each used once; demonstrations guess, or search in a fixed order.

One of five demonstrations tries one calculation after another until the target is found; the others give a random one, which is
seldom right. A search that is carried out without a mistake is always right, and reinforcement learning can discover that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lm.data.curriculum.draw import Draw

STREAM = 6
LARGEST = 12
SEARCHED_PERCENT = 20
PAIRS = ((0, 1, 2), (0, 2, 1), (1, 2, 0))  # places of the first two numbers and of the third
SIGNS = ("+", "-", "*")


class Attempt(NamedTuple):
    """A calculation with two of the numbers, then the sum of its result and the third number, and their difference."""

    first: str  # 3*7
    value: int
    third: int

    @property
    def results(self) -> tuple[int, int]:
        return self.value + self.third, abs(self.value - self.third)

    def step(self, target: int) -> str:
        """The calculations up to the target, with every number that they need beside them: 3*7=21, 21+4=25, 21-4=17."""
        high, low = max(self.value, self.third), min(self.value, self.third)
        both, apart = self.results
        difference = "" if both == target else f", {high}-{low}={apart}"
        return f"{self.first}={self.value}, {self.value}+{self.third}={both}{difference}"

    def expression(self, place: int) -> str:
        """The whole calculation that gives `results[place]`."""
        if place == 0:
            return f"{self.first}+{self.third}"
        if self.value >= self.third:
            return f"{self.first}-{self.third}"
        return f"{self.third}-{self.first if '*' in self.first else f'({self.first})'}"


def countdown_row(index: int) -> dict[str, Any]:
    """Row `index`: `question`, `numbers`, `target`, `answer` (a solution), `messages` (a demonstration), `key`; a pure function of the index.

    The key is the same for the numbers in any order.
    """
    draw = Draw(STREAM, index)
    numbers = [draw.between(1, LARGEST) for _ in range(3)]
    tried = list(attempts(numbers))
    target = draw.choice(draw.choice(tried).results)
    steps, answer = searched(tried, target)
    shown = draw.choice(tried).expression(draw.below(2))
    said = f"The answer is {shown}."
    if draw.below(100) < SEARCHED_PERCENT:
        said = f"{'; '.join(steps)}. The answer is {answer}."
    question = f"Make {target} from {numbers[0]}, {numbers[1]} and {numbers[2]}."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    key = f"{target} from {sorted(numbers)}"
    return {
        "question": question, "numbers": numbers, "target": target, "answer": answer, "messages": messages, "key": key,
    }  # fmt: skip


def attempts(numbers: list[int]) -> Iterator[Attempt]:
    """All attempts, in the order of the search; differences are of the larger number and the smaller one."""
    for one, two, three in PAIRS:
        high, low = max(numbers[one], numbers[two]), min(numbers[one], numbers[two])
        values = {"+": high + low, "-": high - low, "*": high * low}
        for sign in SIGNS:
            yield Attempt(f"{high}{sign}{low}", values[sign], numbers[three])


def searched(tried: list[Attempt], target: int) -> tuple[list[str], str]:
    """The steps of a search up to the first attempt that gives the target, and its expression."""
    steps = []
    for attempt in tried:
        found = attempt.results
        steps.append(attempt.step(target))
        if target in found:
            return steps, attempt.expression(found.index(target))
    raise AssertionError("a target is the result of an attempt")
