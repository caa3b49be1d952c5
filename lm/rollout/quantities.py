"""Numbers in answers: exact values as fractions, with their units.

`1,200` is a number with a thousands separator; `0,1` and `1,2` are text, not numbers, since they may be decimals or pairs. A sum is
not a number either: a completion that repeats `94 - 7` has not solved it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from lm.rollout.units import CURRENCY, SIGNS, is_cents, same_unit, with_raised_powers

LONGEST = 2000  # maximum characters of an answer compared as a number or formula; longer ones are compared as text only
LARGEST_EXPONENT = 400  # of scientific notation


@dataclass(frozen=True)
class Quantity:
    """A number with its unit as written; "" means no unit, "%" percent."""

    value: Fraction
    unit: str = ""


_DIGITS = (
    r"(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"  # 1,200.50
    r"|[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?"  # 12,34,567
    r"|[1-9]\d{0,2}(?:[ '_]\d{3})+(?:\.\d+)?"  # 1 200 or 1'200
    r"|[1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?:,\d+)?|(?:\.\d{3})+,\d+)"  # 1.200.000,50
    r"|\d+\.?\d*|\.\d+)"
)
_POWER = r"(?:[eE][+-]?\d{1,4}|\s?(?:[×·*x]|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{?\s?(?P<power>[+-]?\d{1,4})\s?\}?)?"
_NUMBER = re.compile(rf"(?P<digits>{_DIGITS})(?P<scale>{_POWER})")
_FRACTION = re.compile(
    r"(?:(?P<whole>\d{1,15}) ?)?\\frac\s*"
    r"(?:\{\s*(?P<a>[+-]?\d{1,15})\s*\}|(?P<c>\d))\s*(?:\{\s*(?P<b>[+-]?\d{1,15})\s*\}|(?P<d>\d))"
)
_REPEATING = re.compile(
    r"(?P<fixed>\d{0,15}\.\d{0,15})(?:\\(?:overline|bar)\s*\{\s*|\\dot\s*\{\s*(?=\d\s*\})|\\(?:overline|bar|dot)\s*(?=\d(?!\d))|\()"
    r"(?P<digits>\d{1,15})\s*[})]?"
)
_FACTORIAL = re.compile(r"(?P<digits>\d{1,3})!(?![!\w])")
_SLASH = re.compile(r"(?:(?P<whole>\d{1,15}) )?(?P<a>\d{1,15})\s?/\s?(?P<b>[+-]?\d{1,15})(?P<c>)(?P<d>)")
_VULGAR = re.compile(r"(?P<whole>\d{0,15})\s?(?P<part>[¼-¾⅐-⅞])")
_HEAD = re.compile(
    rf"^(?P<sign>[+-]|minus\b|negative\b)?\s?(?P<currency>{CURRENCY})?\s?(?P<sign2>[+-])?",
    re.IGNORECASE,
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
           "mn": 10**6, "bn": 10**9, "lakh": 10**5, "crore": 10**7}  # fmt: skip
_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_UNIT = re.compile(rf"(?:[^\W\d_]|[°%′″'\"¢/{SIGNS}]|\$$)[^\d=<>+*\\{{}}$,;:?!&|]{{0,100}}")
# Words after a number that change its value, or show that it is not the answer: at once after it, or anywhere.
NO_UNIT_FIRST = frozenset("and over by to from through until squared cubed".split())
NO_UNIT = frozenset(
    "or not but nor no plus minus times factorial half halves third thirds quarter quarters "
    "fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths "
    "thousandth thousandths millionth millionths mil pi alpha beta gamma delta theta lambda phi omega sqrt log ln exp sin cos tan "
    "remainder more less fewer than either if except is was are were isn't be been would could should may might "
    "wrong incorrect maybe perhaps between versus vs mod modulo divided multiplied root power zero one two "
    "three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety x y z".split()
)
_MOST_UNIT_WORDS = 12
_LETTER = re.compile(r"[a-zA-ZͰ-Ͽ](?![\w.])")  # a variable, π or i, but for these units
_LETTER_UNITS = frozenset("mgshldcfvwjMGSHLDCFVWJNAK\u03a9")
_PERCENT = re.compile(r"^\s*(?:percent|per cent|pct)\b", re.IGNORECASE)
_PRODUCT = re.compile(
    r"[a-z]{2}(?![a-z])", re.IGNORECASE
)  # of two variables where it follows a number at once, but for these units
_PAIR_UNITS = frozenset(
    "am pm cm mm km nm um kg mg ug ml cl dl kl ft in yd mi lb oz hr ms ns pt qt st nd rd th gb mb kb tb kw mw hz pa kj ev "
    "cc yr wk rs".split()
)
_ORDINAL = re.compile(r"^\^\s?\{?\s?(st|nd|rd|th)\s?\}?(?!\w)")


def quantity(text: str) -> Quantity | None:
    """The number in a text, with its unit; None if the text has no number, or several."""
    if len(text) > LONGEST:
        return None
    head = _HEAD.match(text)
    assert head is not None  # the pattern also matches the empty string
    if head["sign"] and head["sign2"]:
        return None
    rest = text[head.end() :]
    for pattern, value_of in (
        (_FRACTION, _mixed), (_SLASH, _mixed), (_VULGAR, _vulgar), (_REPEATING, _repeating), (_FACTORIAL, _factorial),
        (_NUMBER, _decimal),
    ):  # fmt: skip
        match = pattern.match(rest)
        if match and (value := value_of(match)) is not None:
            found = _with_unit(value, rest[match.end() :], head["currency"])
            if found is not None:
                negative = (head["sign"] or head["sign2"] or "+").lower() in ("-", "minus", "negative")
                return Quantity(-found.value, found.unit) if negative else found
    return None


def _mixed(match: re.Match[str]) -> Fraction | None:
    groups = match.groupdict()
    above, below = (int(groups[long] or groups[short]) for long, short in (("a", "c"), ("b", "d")))
    whole = int(groups["whole"] or 0)
    return whole + Fraction(above, below) if below and (not whole or 0 < above < below) else None


def _factorial(match: re.Match[str]) -> Fraction:
    return Fraction(math.factorial(int(match["digits"])))


def _vulgar(match: re.Match[str]) -> Fraction:
    part = Fraction(unicodedata.numeric(match["part"])).limit_denominator(100)
    return int(match["whole"] or 0) + part


def _repeating(match: re.Match[str]) -> Fraction:
    """0.1\\overline{6} = 0.1 + 0.0666…"""
    fixed, digits = match["fixed"], match["digits"]
    period = Fraction(int(digits), 10 ** len(digits) - 1)
    return Fraction(f"0{fixed}0") + period / 10 ** len(fixed.partition(".")[2])


def _decimal(match: re.Match[str]) -> Fraction | None:
    digits, scale = match["digits"], match["scale"]
    european = digits.count(".") > 1 or ("." in digits and digits.find(",") > digits.find("."))
    if european:
        digits = digits.replace(".", "").replace(",", ".")
    power = int(match["power"] or (scale[1:] if scale[:1] in ("e", "E") else 0))
    if abs(power) > LARGEST_EXPONENT or len(digits) > LONGEST:
        return None
    return Fraction(re.sub(r"[, '_]", "", digits).rstrip(".")) * Fraction(10) ** power


def _with_unit(value: Fraction, rest: str, currency: str | None) -> Quantity | None:
    """The number with the unit after it; None if the text after it is more than a unit."""
    if re.match(r"[kKMB](?!\w)", rest):
        value, rest = value * _SUFFIXES[rest[0]], rest[1:]
    rest = with_raised_powers(_ORDINAL.sub(r"\1", rest.strip(".")))
    start = rest[:2].lower()
    if _PRODUCT.match(rest) and start not in _PAIR_UNITS and start not in _SCALES:
        return None
    words = _PERCENT.sub("%", rest).strip().strip(".").replace("(", " ").replace(")", " ").split()
    if words and (scale := _SCALES.get(words[0].lower().removesuffix("s"))):
        value, words = value * scale, words[1:]
    if words and _LETTER.match(words[0]) and words[0][0] not in _LETTER_UNITS:
        return None
    unit = " ".join(words)
    tokens = re.findall(r"[^\W\d_]+(?:'[a-z]+)?", re.sub(r"\bMay\b", "month", unit).lower())
    if len(words) > _MOST_UNIT_WORDS or (unit and not _UNIT.fullmatch(unit)):
        return None
    if any(t in NO_UNIT or t in _SCALES for t in tokens) or (tokens and tokens[0] in NO_UNIT_FIRST):
        return None
    if words[:1] == ["%"]:
        return Quantity(value, "%")
    return Quantity(value, unit if currency is None else f"{currency} {unit}".strip())


def same_quantity(given: Quantity, expected: Quantity) -> bool:
    """Whether two numbers are equal; a unit that only one of them has is ignored, 50 % equals 0.5, and 50 ¢ $0.50."""
    if (given.unit == "%") != (expected.unit == "%"):
        percent, other = (given, expected) if given.unit == "%" else (expected, given)
        return other.unit == "" and other.value in (percent.value, percent.value / 100)
    if given.unit and expected.unit:
        one, other = in_dollars(given), in_dollars(expected)
        return same_unit(one.unit, other.unit) and one.value == other.value
    return given.value == expected.value


def in_dollars(amount: Quantity) -> Quantity:
    """Cents as dollars; another quantity unchanged."""
    return Quantity(amount.value / 100, "$") if is_cents(amount.unit) else amount
