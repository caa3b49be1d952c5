"""Equality of two formulas by the library math-verify, in a process that is killed if it takes too long."""

from __future__ import annotations

import atexit
import functools
import logging
import re
import unicodedata

from lm.rollout import timed
from lm.rollout.timed import CallOutcome, TimedWorker

SECONDS = 5.0  # for one comparison
MEMORY = 4 << 30  # address space of the process in bytes: a tower of powers would use all of the machine's memory


def equal(expected: str, given: str) -> bool | None:
    """Whether a given formula, in LaTeX or plain, equals the expected one; None if that takes longer than SECONDS.

    Raises:
        ImportError: math-verify is not installed; without it every formula would count as wrong.
    """
    if timed.in_worker:
        return bool(_verify(expected, given))
    outcome = _compare(expected, given)
    if outcome.error.startswith(("ImportError", "ModuleNotFoundError")):
        raise ImportError(f"math-verify cannot be imported: {outcome.error}")
    return None if outcome.timed_out else bool(outcome.value)


@functools.lru_cache(maxsize=4096)  # a rollout often has the same answer many times
def _compare(expected: str, given: str) -> CallOutcome:
    return _worker().call(_verify, expected, given, seconds=SECONDS)


@functools.cache
def _worker() -> TimedWorker:
    worker = TimedWorker(MEMORY, f"{__name__}:first_use")
    atexit.register(worker.close)
    return worker


def first_use() -> None:
    """Compare a formula, since math-verify imports much of sympy only then: on a busy machine longer than SECONDS."""
    _verify(r"\frac{x}{2}", r"x \cdot 0.5")


_NAMES = {"∞": "infty", "∅": "emptyset", "∪": "cup", "∩": "cap", "≤": "le", "≥": "ge", "≠": "ne", "≈": "approx", "±": "pm", "·": "cdot", "×": "times",
          "÷": "div"} | {chr(code): unicodedata.name(chr(code)).rsplit(" ", 1)[1].lower() for code in range(0x3B1, 0x3CA)
                         if code not in (0x3BB, 0x3BF, 0x3C2)}  # fmt: skip
_SYMBOLS = {ord(sign): rf"\{name} " for sign, name in _NAMES.items()} | {ord("°"): r"^{\circ}"}
# the same signs in LaTeX, with other names of them
LATEX_SIGNS = {name: sign for sign, name in _NAMES.items()} | {"leq": "≤", "geq": "≥", "leqslant": "≤", "geqslant": "≥", "neq": "≠",
                                                               "varnothing": "∅"}  # fmt: skip
LATEX_SYMBOL = re.compile(rf"\\({'|'.join(LATEX_SIGNS)})(?![a-zA-Z])")


# Names of functions in plain formulas; a pattern.
FUNCTION = "ln|log|exp|arc(?:sin|cos|tan)|(?:sin|cos|tan)h?"


def as_latex(text: str) -> str:
    """A plain formula in LaTeX, as far as math-verify does not read it: √2, ∞, 3*pi, ln 2, x**2, {1, 2}."""
    text = re.sub(r"(?:√|(?<![\\a-zA-Z])sqrt)\s*(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", text.replace("**", "^"))
    text = re.sub(r"∛\s*(\d+|\w|\([^()]*\))", r"\\sqrt[3]{\1}", text).translate(_SYMBOLS)
    text = re.sub(r"\^\s*(?:(-?\d*\.\d+)|\(([^()]*)\))", lambda power: f"^{{{power[1] or power[2]}}}", text)
    text = re.sub(rf"(?<![\\a-zA-Z])(?=(?:{FUNCTION})\b)", r"\\", re.sub(r"(?<=\d)\s+(?=i\b)", "", text))
    text = re.sub(
        r"(?<![\\a-zA-Z])(?:pi\b|inf(?:inity|ty)?\b)", lambda match: rf"\{'pi' if match[0] == 'pi' else 'infty'} ", text
    )
    return rf"\{text[:-1]}\}}" if text.startswith("{") and text.endswith("}") else text


def _verify(expected: str, given: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    config = [LatexExtractionConfig()]
    parsed = [
        parse(f"${as_latex(text)}$", extraction_config=config, parsing_timeout=None, raise_on_error=False)
        for text in (expected, given)
    ]
    return all(parsed) and bool(verify(*parsed, timeout_seconds=None, raise_on_error=False))
