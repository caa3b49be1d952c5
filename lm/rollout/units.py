"""Units of numbers in answers: which spellings mean the same unit, and which units differ."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

# names -> symbols; each may have a prefix
_PREFIXES = {"": "", "kilo": "k", "mega": "M", "giga": "G", "tera": "T", "centi": "c", "deci": "d", "milli": "m", "micro": "μ", "nano": "n"}  # fmt: skip
_METRIC = {"meter": "m", "metre": "m", "gram": "g", "second": "s", "sec": "s", "liter": "L", "litre": "L", "watt": "W", "joule": "J",
           "newton": "N", "volt": "V", "ampere": "A", "amp": "A", "pascal": "Pa", "hertz": "Hz", "byte": "B", "mole": "mol",
           "calorie": "cal", "ohm": "Ω"}  # fmt: skip
_OTHER = {"inch": "in", "inche": "in", '"': "in", "″": "in", "foot": "ft", "feet": "ft", "'": "ft", "′": "ft", "yard": "yd",
          "mile": "mi", "pound": "lb", "ounce": "oz", "hour": "h", "hr": "h", "minute": "min", "day": "day", "week": "week", "wk": "week",
          "month": "month", "year": "yr", "gallon": "gal", "degree": "°", "deg": "°", "radian": "rad", "°c": "°C", "°f": "°F", "celsius": "°C", "fahrenheit": "°F",
          "kwh": "kWh", "l": "L", "us$": "$", "usd": "$", "dollar": "$", "buck": "$", "eur": "€", "euro": "€", "gbp": "£", "inr": "₹",
          "rs": "₹", "rupee": "₹", "yen": "¥", "jpy": "¥", "won": "₩", "krw": "₩", "ruble": "₽", "rub": "₽", "chf": "CHF", "franc": "CHF",
          "cny": "CNY", "yuan": "CNY", "cad": "C$", "aud": "A$", "sek": "SEK", "nok": "NOK", "dkk": "DKK", "kr": "kr", "zł": "zł", "pln": "zł", "cent": "¢",
          "kelvin": "K", "percent": "%", "unit": "unit"}  # fmt: skip
_METRIC_NAMES = {a + b: x + y for a, x in _PREFIXES.items() for b, y in _METRIC.items()}
_SYMBOLS = {symbol: symbol for symbol in (*_METRIC_NAMES.values(), *_OTHER.values())}
_UNITS = {symbol.lower(): symbol for symbol in _SYMBOLS if len(symbol) > 1} | _METRIC_NAMES | _OTHER | _SYMBOLS
SIGNS = "€£¥₹\u20a0-\u20bf"  # of currencies, besides $; as part of a class of characters
CURRENCY = rf"(?:us|a|c|hk|nz|s|r)?\$|[{SIGNS}]|(?:usd|eur|gbp|inr|jpy|krw|rub|chf|cny|cad|aud|sek|nok|dkk|kr)\b|rs\b\.?"  # before a number
_MONEY = frozenset("$€£¥₹¢₩₽")
_SPELLED_OUT = [
    (re.compile(r"\bmph\b"), "mi/h"),
    (re.compile(r"\bkm?ph\b"), "km/h"),
    (re.compile(r"\bmpg\b"), "mi/gal"),
    (re.compile(r"\bcc\b"), "cm³"),
    (re.compile(r"\bper\b"), "/"),
    (re.compile(r"\b([ap])\.m\b\.?"), r"\1m"),
    (re.compile(r"\b(\w+) squared\b"), r"\1²"),
    (re.compile(r"\b(\w+) cubed\b"), r"\1³"),
    (re.compile(r"\b(?:square|sq\.?)\s+(\w+)"), r"\1²"),
    (re.compile(r"\b(?:cubic|cu\.?)\s+(\w+)"), r"\1³"),
    (re.compile(r"(?:°|\bdegrees?\b|\bdeg\b)\s*([cf])(?:elsius|ahrenheit)?\b", re.IGNORECASE), r"°\1"),
]
_POWER = re.compile(r"(?<=[a-zA-Z])\s?\^\s?\{?\s?([234])\s?\}?(?!\w)")
_WORD = re.compile(rf"(?P<name>°?[^\W\d_²³⁴]+\$?|[°%′″'\"$¢{SIGNS}])\.?(?P<power>[²³⁴]?)")
# a phrase after a noun, or instead of a unit: "in total", "of the cake", "left"
_REST = re.compile(
    r"\b(?:in|of|for|on|at|from|with|that|who|left|remaining|altogether|total|each|every|long|tall|old)\b.*|/.*"
)
_IRREGULAR = {"children": "child", "people": "person", "men": "man", "women": "woman"}


class Unit(NamedTuple):
    """Powers of known units, as km¹ h⁻¹; or, if there are none, the words of what is counted, in the singular."""

    powers: Counter[str]
    words: frozenset[str]


def read_unit(text: str) -> Unit:
    """The unit that a text begins with; words after it (`per day`, `of fabric`) are part of no unit."""
    for pattern, shorter in _SPELLED_OUT:
        text = pattern.sub(shorter, text)
    powers: Counter[str] = Counter()
    if not re.match(r"in (?:total|all)\b", text):
        for sign, part in zip((1, -1, -1), text.split("/"), strict=False):
            for place, found in enumerate(_WORD.finditer(part)):
                symbol = _symbol(found["name"])
                if symbol is None or (place > 0 and symbol == "in"):
                    break
                powers[symbol] += sign * (" ²³⁴".index(found["power"]) + 1 if found["power"] else 1)
            if not powers:
                break
    words = re.findall(r"[^\W\d_]+", _REST.sub("", text.lower()))
    return Unit(powers, frozenset() if powers else frozenset(map(_singular, words)))


def with_raised_powers(text: str) -> str:
    """The text with the powers of its units as one character: m^2 and m^{2} as m²."""
    return _POWER.sub(lambda match: "²³⁴"[int(match[1]) - 2], text)


def is_known(unit: str) -> bool:
    """Whether a text is a unit of the tables and no more, such as `cm^2`, `square inches`, `km/h`; not a letter, which may be a variable."""
    return len(unit) > 1 and bool(read_unit(with_raised_powers(unit)).powers)


def same_unit(one: str, other: str) -> bool:
    """Whether two units are the same, or one has only more words: `red apples` and `apples`, `$` and `$ per hour`."""
    a, b = read_unit(one), read_unit(other)
    if "£" in a.powers.keys() | b.powers.keys():  # a pound is of money here
        a, b = (
            Unit(Counter({"£" if s == "lb" else s: n for s, n in unit.powers.items()}), unit.words) for unit in (a, b)
        )
    if a.powers and b.powers:
        return a.powers == b.powers or any(
            sum(x.powers.values()) == 1 == len(x.powers) and +y.powers == x.powers and _MONEY & x.powers.keys()
            for x, y in ((a, b), (b, a))
        )
    return a.words <= b.words or b.words <= a.words if bool(a.powers) == bool(b.powers) else not (a.words or b.words)


def is_cents(unit: str) -> bool:
    """Whether a unit is the hundredth part of a dollar."""
    return read_unit(unit).powers == {"¢": 1}


def _symbol(name: str) -> str | None:
    """The symbol of a unit, as written or in the singular; None for another word."""
    lower = name.lower()
    return next((_UNITS[form] for form in (name, lower, lower.removesuffix("s")) if form in _UNITS), None)


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for plural, singular in (
        ("ies", "y"),
        ("ves", "f"),
        ("shes", "sh"),
        ("ches", "ch"),
        ("xes", "x"),
        ("sses", "ss"),
        ("s", ""),
    ):
        if len(word) > 3 and word.endswith(plural) and not word.endswith("ss"):
            return word.removesuffix(plural) + singular
    return word
