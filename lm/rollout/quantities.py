"""Numbers in answers: exact values as fractions, with their units.

`1,200` is a number with a thousands separator; `0,1` and `1,2` are text, not numbers, since they may be decimals or pairs. A sum is
not a number either: a completion that repeats `94 - 7` has not solved it.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 2000  # maximum characters of an answer compared as a number or formula; longer ones are compared as text only
LARGEST_EXPONENT = 400  # of scientific notation


@dataclass(frozen=True)
class Quantity:
    """A number with its unit in lower case; "" means no unit, "%" percent."""

    value: Fraction
    unit: str = ""


_DIGITS = (
    r"(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"  # 1,200.50
    r"|[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?"  # 12,34,567
    r"|[1-9]\d{0,2}(?:[ '_]\d{3})+(?:\.\d+)?"  # 1 200 or 1'200
    r"|[1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?:,\d+)?|(?:\.\d{3})+,\d+)"  # 1.200.000,50
    r"|\d+\.?\d*|\.\d+)"
)
_POWER = r"(?:[eE][+-]?\d{1,4}|\s?(?:×|\*|\\times|\\cdot|x)\s?10\s?(?:\^|\*\*)\s?\{?(?P<power>[+-]?\d{1,4})\}?)?"
_NUMBER = re.compile(rf"(?P<digits>{_DIGITS})(?P<scale>{_POWER})")
_FRACTION = re.compile(
    r"(?:(?P<whole>\d{1,15}) ?)?\\frac\s*"
    r"(?:\{\s*(?P<a>[+-]?\d{1,15})\s*\}\s*\{\s*(?P<b>[+-]?\d{1,15})\s*\}|(?P<c>\d)\s*(?P<d>\d))"
)
_REPEATING = re.compile(r"(?P<fixed>\d{0,15}\.\d{0,15})\\overline\s*\{\s*(?P<digits>\d{1,15})\s*\}")
_SLASH = re.compile(r"(?:(?P<whole>\d{1,15}) )?(?P<a>\d{1,15})\s?/\s?(?P<b>\d{1,15})(?P<c>)(?P<d>)")
_VULGAR = re.compile(r"(?P<whole>\d{0,15})\s?(?P<part>[¼-¾⅐-⅞])")
_HEAD = re.compile(
    r"^(?P<sign>[+-]?)\s?(?P<currency>(?:us|a|c)?[$€£¥₹]|usd|eur|gbp)?\s?(?P<sign2>[+-]?)", re.IGNORECASE
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
           "mn": 10**6, "bn": 10**9, "lakh": 10**5, "crore": 10**7}  # fmt: skip
_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_UNIT = re.compile(r"[^\W\d_][^\d=<>+*\\{}$,;:?!&|]{0,60}|[°%′″'\"€£¥₹¢][^\d=<>+*\\{}$,;:?!&|]{0,40}")
# Words after a number that change its value, or show that it is not the answer.
_NO_UNIT = frozenset(
    "or and not but nor no plus minus times over by squared cubed factorial half halves third thirds quarter quarters "
    "fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths "
    "thousandth thousandths millionth millionths mil pi alpha beta gamma delta theta lambda phi omega sqrt log ln exp sin cos tan "
    "remainder more less fewer than to either if except is was are were isn't be been would could should may might "
    "wrong incorrect maybe perhaps through between until versus vs mod modulo divided multiplied root power zero one two "
    "three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety x y z n".split()
)
_MOST_UNIT_WORDS = 6
_LETTER = re.compile(r"[a-zͰ-Ͽ](?![\w.])")  # a variable, π or i, but for these units
_LETTER_UNITS = frozenset("mgshldcfvwj")
_PRODUCT = re.compile(r"[a-z]{2}(?![a-z])")  # of two variables where it follows a number at once, but for these units
_PAIR_UNITS = frozenset(
    "am pm cm mm km nm um kg mg ug ml cl dl kl ft in yd mi lb oz hr ms ns pt qt st nd rd th gb mb kb tb kw mw hz pa kj ev "
    "cc yr wk rs".split()
)
_POWER_OF_UNIT = re.compile(r"(?<=[a-z])\s?\^\s?\{?\s?([234])\s?\}?(?!\w)")
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
        (_FRACTION, _mixed), (_SLASH, _mixed), (_VULGAR, _vulgar), (_REPEATING, _repeating), (_NUMBER, _decimal)
    ):  # fmt: skip
        match = pattern.match(rest)
        if match and (value := value_of(match)) is not None:
            found = _with_unit(value, rest[match.end() :], head["currency"])
            if found is not None:
                return Quantity(-found.value, found.unit) if "-" in (head["sign"], head["sign2"]) else found
    return None


def _mixed(match: re.Match[str]) -> Fraction | None:
    groups = match.groupdict()
    above, below = (int(groups[long] or groups[short]) for long, short in (("a", "c"), ("b", "d")))
    return int(groups["whole"] or 0) + Fraction(above, below) if below else None


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
    rest = _ORDINAL.sub(r"\1", rest.strip(".").lower())
    rest = _POWER_OF_UNIT.sub(lambda match: "²³⁴"[int(match[1]) - 2], rest)
    if _PRODUCT.match(rest) and rest[:2] not in _PAIR_UNITS and rest[:2] not in _SCALES:
        return None
    words = rest.strip().strip(".").replace("(", " ").replace(")", " ").split()
    if words and (scale := _SCALES.get(words[0].removesuffix("s"))):
        value, words = value * scale, words[1:]
    if words and _LETTER.match(words[0]) and words[0][0] not in _LETTER_UNITS:
        return None
    if not words:
        return Quantity(value, (currency or "").lower())
    unit = " ".join(words)
    tokens = re.findall(r"[^\W\d_]+(?:'[a-z]+)?", unit)
    if len(words) > _MOST_UNIT_WORDS or not _UNIT.fullmatch(unit) or any(t in _NO_UNIT or t in _SCALES for t in tokens):
        return None
    if words[0] in ("%", "percent", "pct"):
        return Quantity(value, "%")
    return Quantity(value, unit if currency is None else currency.lower())


def same_quantity(given: Quantity, expected: Quantity) -> bool:
    """Whether two numbers are equal; a unit that only one of them has is ignored, and 50 % equals 0.5."""
    percent = (given.unit == "%") - (expected.unit == "%")
    if percent:
        scaled = (given.value / 100, expected.value) if percent > 0 else (given.value, expected.value / 100)
        other = expected.unit if percent > 0 else given.unit
        return other == "" and (given.value == expected.value or scaled[0] == scaled[1])
    units = zip(*(re.split(r"\s*/\s*|\s+per\s+", unit) for unit in (given.unit, expected.unit)), strict=False)
    if given.unit and expected.unit and any(_unit_key(one) != _unit_key(other) for one, other in units):
        return False
    return given.value == expected.value


_UNIT_NAMES = {"¢": "cent", "$": "dollar", "us$": "dollar", "usd": "dollar", "€": "euro", "eur": "euro", "£": "pound", "gbp": "pound",
               "°": "degree", "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m", "centimeter": "cm",
               "centimetre": "cm", "kilogram": "kg", "gram": "g", "hour": "h", "hr": "h", "minute": "min", "second": "s",
               "sec": "s"}  # fmt: skip


def _unit_key(unit: str) -> str:
    """The short name of a unit's first word in the singular; words after it (`per day`, `of fabric`) are ignored."""
    word = unit.split(" ", 1)[0].strip(".")
    if len(word) > 3 and word.endswith("s"):
        word = word[:-2] if word.endswith(("shes", "ches", "xes")) else word[:-1]
    return _UNIT_NAMES.get(word, word)
