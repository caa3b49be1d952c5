"""`gen:arithmetic`: sums, differences, products and small Python expressions, answered directly or step by step.

Two fifths of the demonstrations solve the problem in easy steps, and the others give the answer
directly, independent of the problem. Solving in steps is right more often, and
reinforcement learning can discover that. No step of a demonstration is itself a problem, so that
no step reveals a held-out problem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lm.data.curriculum.draw import Draw

STREAM = 3
WORKED_MARKER = "Let me work it out:"
WORKED_PERCENT = 40


class Problem(NamedTuple):
    expression: str
    value: int
    steps: list[str]
    key: str
    spoken: str | None = None  # a whole question in other words than the expression


def arithmetic_row(index: int) -> dict[str, Any]:
    """Row `index`: `question`, `answer` (the number), `messages` (a demonstration), `key`; a pure function of the index.

    The key is the same for every wording, and for terms, factors and list items in any order.
    """
    draw = Draw(STREAM, index)
    problem = draw.choice(KINDS)(draw)
    question = _wording(draw, problem)
    answer = str(problem.value)
    shown = worked(problem) if draw.below(100) < WORKED_PERCENT else f"The answer is {answer}."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": shown}]
    return {"question": question, "answer": answer, "messages": messages, "key": problem.key}


def worked(problem: Problem) -> str:
    """The step-by-step demonstration, which ends `The answer is N.`"""
    return f"{WORKED_MARKER} {', '.join(problem.steps)}. The answer is {problem.value}."


def two_digit_sum(draw: Draw) -> Problem:
    a, b = draw.between(10, 99), draw.between(10, 99)
    spoken = draw.choice((None, f"Add {a} and {b}.", f"What is {a} plus {b}?"))
    return Problem(f"{a} + {b}", a + b, add_steps(a, b), _sum_key(a, b), spoken)


def two_digit_difference(draw: Draw) -> Problem:
    b, a = sorted((draw.between(10, 99), draw.between(10, 99)))
    spoken = draw.choice((None, f"Subtract {b} from {a}.", f"What is {a} minus {b}?"))
    return Problem(f"{a} - {b}", a - b, subtract_steps(a, b), f"{a}-{b}", spoken)


def product(draw: Draw) -> Problem:
    a, b = draw.between(10, 99), draw.between(2, 9)
    first, second = (a, b) if draw.below(2) else (b, a)
    spoken = draw.choice((None, f"Multiply {first} by {second}.", f"What is {first} times {second}?"))
    return Problem(f"{first} * {second}", a * b, multiply_steps(a, b), f"{a}*{b}", spoken)


def three_terms(draw: Draw) -> Problem:
    a, b, c = draw.between(20, 99), draw.between(2, 9), draw.between(2, 9)
    kind = draw.below(3)
    if kind == 0:
        return Problem(f"{a} + {b} + {c}", a + b + c, chain(a, ("+", b), ("+", c)), _sum_key(a, b, c))
    if kind == 1:
        return Problem(f"{a} + {b} - {c}", a + b - c, chain(a, ("+", b), ("-", c)), f"{a}+{b}-{c}")
    return Problem(f"{a} - {b} - {c}", a - b - c, chain(a, ("-", b), ("-", c)), f"{a}-{min(b, c)}-{max(b, c)}")


def expression(draw: Draw) -> Problem:
    a, b, c = draw.between(2, 9), draw.between(2, 9), draw.between(2, 9)
    kind = draw.below(4)
    if kind == 0:
        b, c = draw.between(1, 6), draw.between(1, 3)
        text = draw.choice((f"{a} * ({b} + {c})", f"({b} + {c}) * {a}"))
        steps = [f"{b} + {c} = {b + c}", *chain(b + c, ("*", a))]
        return Problem(text, a * (b + c), steps, f"{a}*({min(b, c)}+{max(b, c)})")
    low, high = min(a, b), max(a, b)
    if kind == 1:
        text = draw.choice((f"{a} * {b} + {c}", f"{c} + {a} * {b}"))
        return Problem(text, a * b + c, chain(a, ("*", b), ("+", c)), f"{low}*{high}+{c}")
    if kind == 2:
        c = min(c, a * b)
        return Problem(f"{a} * {b} - {c}", a * b - c, chain(a, ("*", b), ("-", c)), f"{low}*{high}-{c}")
    high, low = max(b, c), min(b, c)
    steps = [f"{high} - {low} = {high - low}", *chain(high - low, ("*", a))]
    return Problem(f"{a} * ({high} - {low})", a * (high - low), steps, f"{a}*({high}-{low})")


def list_sum(draw: Draw) -> Problem:
    numbers = [draw.between(1, 9) for _ in range(draw.between(3, 4))]
    steps = chain(numbers[0], *(("+", number) for number in numbers[1:]))
    return Problem(f"sum({numbers})", sum(numbers), steps, _sum_key(*numbers))


def list_spread(draw: Draw) -> Problem:
    small, first, second = draw.between(1, 9), draw.between(1, 20), draw.between(1, 20)
    numbers = draw.sample((small, first, second), 3)
    high, low = max(numbers), min(numbers)
    steps = [f"max is {high}", f"min is {low}", f"{high} - {low} = {high - low}"]
    key = f"spread:{sorted(numbers)}"
    return Problem(f"max({numbers}) - min({numbers})", high - low, steps, key)


KINDS: tuple[Callable[[Draw], Problem], ...] = (
    two_digit_sum,
    two_digit_sum,
    two_digit_sum,
    two_digit_difference,
    two_digit_difference,
    product,
    three_terms,
    three_terms,
    expression,
    list_sum,
    list_spread,
)


def add_steps(a: int, b: int) -> list[str]:
    """Steps of adding two-digit numbers: units, then tens with the carry."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10
    first = f"{a % 10} + {b % 10} = {units}"
    if units < 10:
        return [first, f"{a // 10} + {b // 10} = {tens}"]
    return [first, "carry 1", f"{a // 10} + {b // 10} + 1 = {tens + 1}"]


def subtract_steps(a: int, b: int) -> list[str]:
    """Steps of subtracting two-digit numbers, a >= b: units, then tens with the borrow."""
    tens = a // 10 - b // 10
    if a % 10 >= b % 10:
        return [f"{a % 10} - {b % 10} = {a % 10 - b % 10}", f"{a // 10} - {b // 10} = {tens}"]
    first = f"{a % 10 + 10} - {b % 10} = {a % 10 + 10 - b % 10}"
    return [first, "borrow 1", f"{a // 10} - {b // 10} - 1 = {tens - 1}"]


def multiply_steps(a: int, b: int) -> list[str]:
    """Steps of multiplying a two-digit by a one-digit number: units, tens, carry."""
    units, tens = a % 10 * b, a // 10 * b
    steps = [f"{a % 10} * {b} = {units}", f"{a // 10} * {b} = {tens}"]
    if units < 10:
        return steps
    return [steps[0], f"carry {units // 10}", steps[1], f"{tens} + {units // 10} = {tens + units // 10}"]


def chain(start: int, *operations: tuple[str, int]) -> list[str]:
    """Steps of a chain of operations, each with its result."""
    steps, value = [], start
    for sign, number in operations:
        result = {"+": value + number, "-": value - number, "*": value * number}[sign]
        steps.append(f"{value} {sign} {number} = {result}")
        value = result
    return steps


def _sum_key(*terms: int) -> str:
    return "+".join(map(str, sorted(terms)))


def _wording(draw: Draw, problem: Problem) -> str:
    if problem.spoken:
        return problem.spoken
    text = problem.expression
    forms = (f"What is {text}?", f"Calculate {text}", f"What does {text} evaluate to?", f"How much is {text}?")
    return draw.choice(forms[:3] if "(" in text else forms)
