"""Arithmetic expressions as exact numbers: parsed as Python, and evaluated by a short list of operations with limits on size."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

LONGEST = 200  # characters of an expression
LARGEST = 10**30  # absolute value, numerator and denominator of every result
MOST_EXPONENT = 100
SIGNS = str.maketrans("×÷−", "*/-")

OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


class ExpressionError(ValueError):
    """Raised for a text that is no arithmetic expression, or whose value is too large; the message says which."""


def evaluate(text: str) -> Fraction:
    """The exact value of an expression of numbers, + - * / // % **, and parentheses; × ÷ − and ^ are read as well.

    Raises:
        ExpressionError: it is none, is too long, divides by 0, or has a number above `LARGEST`.
    """
    return _value(parse(text))


def parse(text: str) -> ast.expr:
    """The syntax tree of an expression. Raises ExpressionError."""
    if len(text) > LONGEST:
        raise ExpressionError(f"it has {len(text)} characters, and at most {LONGEST} are read")
    plain = text.strip().translate(SIGNS).replace("^", "**")
    if not re.fullmatch(r"[0-9.+*/%() -]+", plain):
        raise ExpressionError("it has something other than numbers, + - * / // % ** and parentheses")
    try:
        return ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ExpressionError("it is no arithmetic expression") from None


def numbers_in(tree: ast.expr) -> list[Any]:
    """The numbers written in an expression, sorted."""
    return sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))


def plain_number(value: Fraction) -> str:
    """A number as text: whole, or with at most ten decimals."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return _checked(lambda: Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > MOST_EXPONENT:
                raise ExpressionError(f"an exponent is a whole number of at most {MOST_EXPONENT}")
            return _checked(lambda: left ** int(right))
        if type(node.op) in OPERATIONS:
            return _checked(lambda: OPERATIONS[type(node.op)](left, right))
    raise ExpressionError("it is no arithmetic expression")


def _checked(compute: Callable[[], Any]) -> Fraction:
    try:
        value = Fraction(compute())
    except ZeroDivisionError:
        raise ExpressionError("it divides by 0") from None
    except (ValueError, OverflowError):
        raise ExpressionError("it has a number that cannot be read") from None
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ExpressionError("it has a number of more than 30 digits")
    return value
