"""`gen:drills`: plain text of lists repeated, reversed, sorted and counted, and of small sums and products.

All later stages need the model to copy words, and a small model learns this from far fewer tokens of drills than of prose. The
lists are longer than those of `gen:instruct`, and the second number of a sum, difference or product has one digit, so that no
drill is a list question of `gen:instruct` or a problem of `gen:arithmetic`, held out or not. The sums of two digits of
`gen:instruct` appear here too; their held-out items are held out by wording, like those of all small sets.
"""

from __future__ import annotations

from lm.data.curriculum.draw import Draw
from lm.data.curriculum.words import NOUNS

STREAM = 4
ROWS = 8_000
SHORTEST, LONGEST = 6, 9  # items of a list; `gen:instruct` has at most five
ORDINALS = ("First", "Second", "Third", "Fourth")
WORDS = 8  # in a list of words
FACTS = 12  # arithmetic facts in a row


def drill_row(index: int) -> dict[str, str]:
    """Row `index`: `text`, a pure function of the index."""
    draw = Draw(STREAM, index)
    return {"text": draw.choice(KINDS)(draw)}


def words(draw: Draw) -> str:
    """A list of words, repeated, then facts: reversed, the last, the number, the item at each place.

    Its length is fixed, so that attending a fixed distance back suffices early in training.
    """
    items = draw.sample(NOUNS, WORDS)
    listed = ", ".join(items)
    facts = [f"Backwards: {', '.join(reversed(items))}.", f"Last: {items[-1]}.", f"There are {WORDS} items."]
    facts += [f"{name}: {item}." for name, item in zip(ORDINALS, items, strict=False)]
    return " ".join([f"{listed}. Again: {listed}. Again: {listed}.", *draw.sample(facts, len(facts))])


def numbers(draw: Draw) -> str:
    """A list of numbers, with facts: sorted, extremes, even ones, count."""
    items = draw.sample(range(100), draw.between(SHORTEST, LONGEST))
    shown = ", ".join(map(str, items))
    even = [str(item) for item in items if item % 2 == 0]
    facts = [
        f"Sorted: {', '.join(map(str, sorted(items)))}.",
        f"Largest: {max(items)}.",
        f"Smallest: {min(items)}.",
        f"Again: {shown}.",
        f"Even: {', '.join(even) or 'none'}.",
        f"Count: {len(items)}.",
    ]
    return " ".join([f"{shown}.", *draw.sample(facts, len(facts))])


def python(draw: Draw) -> str:
    """A session at the Python prompt."""
    items = draw.sample(range(10), draw.between(SHORTEST, LONGEST)) if draw.below(2) else draw.sample(NOUNS, SHORTEST)
    place = draw.below(len(items))
    facts = [
        f">>> items\n{items}",
        f">>> len(items)\n{len(items)}",
        f">>> items[{place}]\n{items[place]!r}",
        ">>> items[0]\n" + repr(items[0]),
        ">>> items[-1]\n" + repr(items[-1]),
        f">>> max(items)\n{max(items)!r}",
        f">>> min(items)\n{min(items)!r}",
        f">>> items[::-1]\n{items[::-1]}",
    ]
    return "\n".join([f">>> items = {items}", *draw.sample(facts, len(facts))])


def facts(draw: Draw) -> str:
    """Arithmetic facts: one- and two-digit numbers plus or minus one digit, and products of digits."""
    return ", ".join(fact(draw) for _ in range(FACTS)) + "."


def fact(draw: Draw) -> str:
    a, b = draw.between(0, draw.choice((9, 20, 99))), draw.below(10)
    sign = draw.choice("+-*")
    if sign == "*":
        a %= 10
    if sign == "-":
        a = max(a, b)
    return f"{a} {sign} {b} = {({'+': a + b, '-': a - b, '*': a * b})[sign]}"


KINDS = (words, words, numbers, python, facts, facts)
