"""The task families of the instruction curriculum: each draws (prompt, core answer, key).

Items with the same key are held out together. In families with few problems the key includes the phrasing, so that
training still has the fact in other words; in families with many problems it does not, so that a held-out item is new
in any words. Items with the key ALWAYS_TRAINED are never held out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lm.data.curriculum import knowledge, words
from lm.data.curriculum.draw import Draw
from lm.data.split import ALWAYS_TRAINED


class Exercise(NamedTuple):
    prompt: str
    core: str
    key: str


def explain(draw: Draw) -> Exercise:
    term, sentence = draw.choice(tuple(knowledge.EXPLANATIONS.items()))
    phrasing = draw.below(len(knowledge.EXPLAIN_PHRASINGS))
    prompt = knowledge.EXPLAIN_PHRASINGS[phrasing].format(term)
    return Exercise(prompt, sentence, f"explain:{term}:{phrasing}" if phrasing else ALWAYS_TRAINED)


def code(draw: Draw) -> Exercise:
    purpose, source = draw.choice(tuple(knowledge.FUNCTIONS.items()))
    phrasing = draw.below(len(knowledge.CODE_PHRASINGS))
    prompt = knowledge.CODE_PHRASINGS[phrasing].format(purpose)
    return Exercise(prompt, source, f"code:{purpose}:{phrasing}")


def greeting(draw: Draw) -> Exercise:
    prompt, reply = draw.choice(tuple(knowledge.GREETINGS.items()))
    return Exercise(prompt, reply, ALWAYS_TRAINED)


def capital(draw: Draw) -> Exercise:
    country, city = draw.choice(words.CAPITALS)
    phrasing = draw.below(6)
    prompt = (
        f"What is the capital of {country}?",
        f"Name the capital of {country}.",
        f"Which city is the capital of {country}?",
        f"{city} is the capital of which country?",
        f"Which country has {city} as its capital?",
        f"Name the country whose capital is {city}.",
    )[phrasing]
    return Exercise(prompt, city if phrasing < 3 else country, f"capital:{country}:{phrasing}")


def opposite(draw: Draw) -> Exercise:
    pair = draw.choice(words.OPPOSITES)
    side, phrasing = draw.below(2), draw.below(4)
    word, other = pair[side], pair[1 - side]
    prompt = (
        f'What is the opposite of "{word}"?',
        f'Give the opposite of "{word}".',
        f'Which word means the opposite of "{word}"?',
        f'Tell me the opposite of "{word}".',
    )[phrasing]
    return Exercise(prompt, other, f"opposite:{word}:{phrasing}")


def plural(draw: Draw) -> Exercise:
    word, phrasing = draw.choice(words.COUNTABLE), draw.below(3)
    prompt = (f'What is the plural of "{word}"?', f'Give the plural of "{word}".', f"One {word}, two what?")[phrasing]
    return Exercise(prompt, word + "s", f"plural:{word}:{phrasing}")


def repeat(draw: Draw) -> Exercise:
    noun = draw.choice(words.NOUNS)
    adjectives = draw.sample(words.ADJECTIVES, draw.below(3))
    phrase = " ".join([*adjectives, noun])
    thing = "phrase" if adjectives else "word"
    prompt = draw.choice(
        (
            f"Repeat the {thing}: {phrase}",
            f"Say this {thing}: {phrase}",
            f'Repeat "{phrase}".',
            f'Please say "{phrase}".',
            f"Copy this {thing}: {phrase}",
        )
    )
    return Exercise(prompt, phrase, f"repeat:{phrase}")


def pick(draw: Draw) -> Exercise:
    items = draw.sample(words.NOUNS, draw.between(3, 4))
    place = draw.choice((0, 0, 1, 2, len(items) - 1, len(items) - 1))
    name = draw.choice(("last", words.ORDINALS[place])) if place == len(items) - 1 else words.ORDINALS[place]
    listed = ", ".join(items)
    prompt = draw.choice(
        (
            f"What is the {name} word of this list: {listed}?",
            f"Which word is {name} in this list: {listed}?",
            f"Give the {name} word: {listed}",
            f"Name the {name} item: {listed}",
        )
    )
    return Exercise(prompt, items[place], f"pick:{place}:{listed}")


def compare(draw: Draw) -> Exercise:
    low, high = sorted(draw.sample(range(100), 2))
    first, second = (low, high) if draw.below(2) else (high, low)
    larger, phrasing = draw.below(2), draw.below(3)
    word = (("smaller", "larger"), ("less", "more"), ("smaller", "bigger"))[phrasing][larger]
    prompt = (
        f"Which number is {word}, {first} or {second}?",
        f"Which is {word}, {first} or {second}?",
        f"Name the {word} number: {first} or {second}",
    )[phrasing]
    return Exercise(prompt, str(high if larger else low), f"compare:{larger}:{low}:{high}")


def follow(draw: Draw) -> Exercise:
    kind = draw.below(4)
    after, phrasing = draw.below(2), draw.below(3)
    relation = ("before", "after")[after]
    if kind == 0:
        here = draw.between(1, 98)
        name, other, what = str(here), str(here + (1 if after else -1)), "number"
    else:
        row, what = ((words.DAYS, "day"), (words.MONTHS, "month"), (tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "letter"))[
            kind - 1
        ]
        ends = 0 if kind < 3 else 1  # days and months go round, the alphabet does not
        place = draw.between(ends * (1 - after), len(row) - 1 - ends * after)
        name, other = row[place], row[(place + (1 if after else -1)) % len(row)]
    prompt = (
        f"Which {what} comes {relation} {name}?",
        f"What {what} comes right {relation} {name}?",
        f"Name the {what} {relation} {name}.",
    )[phrasing]
    return Exercise(prompt, other, f"follow:{relation}:{name}:{phrasing}")


def small_sum(draw: Draw) -> Exercise:
    a, b = draw.below(10), draw.below(10)
    phrasing = draw.below(4)
    if draw.below(2):
        prompt = (f"What is {a} + {b}?", f"Add {a} and {b}.", f"How much is {a} plus {b}?", f"{a} + {b} = ?")[phrasing]
        return Exercise(prompt, str(a + b), f"small_sum:{min(a, b)}+{max(a, b)}:{phrasing}")
    a, b = max(a, b), min(a, b)
    prompt = (f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"How much is {a} minus {b}?", f"{a} - {b} = ?")[
        phrasing
    ]
    return Exercise(prompt, str(a - b), f"small_sum:{a}-{b}:{phrasing}")


def parity(draw: Draw) -> Exercise:
    number, phrasing = draw.below(100), draw.below(4)
    prompt = (
        f"Is {number} even or odd?",
        f"Is the number {number} odd or even?",
        f"Tell me whether {number} is even or odd.",
        f"Even or odd: {number}?",
    )[phrasing]
    return Exercise(prompt, "odd" if number % 2 else "even", f"parity:{number}:{phrasing}")


def count(draw: Draw) -> Exercise:
    items = draw.sample(words.NOUNS, draw.between(2, 5))
    listed = ", ".join(items)
    prompt = draw.choice(
        (
            f"How many words are in this list: {listed}?",
            f"How many items are there: {listed}?",
            f"Count the words: {listed}",
        )
    )
    return Exercise(prompt, str(len(items)), f"count:{listed}")


def reverse(draw: Draw) -> Exercise:
    items = draw.sample(words.NOUNS, draw.between(2, 3))
    listed = ", ".join(items)
    prompt = draw.choice(
        (
            f"Reverse this list: {listed}",
            f"Put this list in reverse order: {listed}",
            f"Say these words backwards: {listed}",
        )
    )
    return Exercise(prompt, ", ".join(reversed(items)), f"reverse:{listed}")


def python(draw: Draw) -> Exercise:
    kind = draw.below(4)
    numbers = draw.sample(range(10), draw.between(2, 4))
    if kind == 0:
        expression, core, key = f"len({numbers})", str(len(numbers)), f"len({numbers})"
    elif kind == 1:
        function = draw.choice((max, min))
        a, b = numbers[:2]
        expression, core = f"{function.__name__}({a}, {b})", str(function(a, b))
        key = f"{function.__name__}({min(a, b)}, {max(a, b)})"
    elif kind == 2:
        place = draw.below(len(numbers))
        expression, core = f"{numbers}[{place}]", str(numbers[place])
        key = expression
    else:
        left, right = draw.sample(words.NOUNS, 2)
        expression, core = f'"{left}" + "{right}"', left + right
        key = expression
    prompt = draw.choice(
        (f"What does {expression} give in Python?", f"What is {expression} in Python?", f"Evaluate {expression}")
    )
    return Exercise(prompt, core, f"python:{key}")


# family → how often it is drawn, in parts of the sum
WEIGHTS: dict[Callable[[Draw], Exercise], int] = {
    explain: 20,
    code: 5,
    greeting: 3,
    capital: 8,
    opposite: 6,
    plural: 4,
    repeat: 8,
    pick: 8,
    compare: 6,
    follow: 7,
    small_sum: 7,
    parity: 4,
    count: 4,
    reverse: 4,
    python: 8,
}
FAMILIES = tuple(family for family, weight in WEIGHTS.items() for _ in range(weight))


def draw_task(draw: Draw) -> tuple[str, Exercise]:
    """A family by weight, and one of its tasks; gives the family's name too."""
    family = draw.choice(FAMILIES)
    return family.__name__, family(draw)
