r"""Comparison of a completion with the expected answer: extraction of the answer, and equality of two answers.

The answer is marked by `\boxed{…}`, `<answer>…</answer>`, `#### …`, `answer is …` or `Answer: …`; without a mark the whole
completion is the answer. Markdown, LaTeX delimiters, a unit, a currency and a sentence after the answer are removed.
Numbers are compared exactly, as fractions. `1,200` is a number with a thousands separator; `0,1` and `1,2` are text, not
numbers, since they may be decimals or pairs. A sum is not a number either: a completion that repeats `94 - 7` has not solved it.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 2000  # maximum characters of an answer compared as a number or formula; longer ones are compared as text only
LARGEST_EXPONENT = 400  # of scientific notation

# ---- normalisation before any comparison ---------------------------------------------------------------------------

_MINUS = dict.fromkeys(map(ord, "−‐‑‒–﹣－"), "-")
_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u200a\u202f\u3000"), " ")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"), None)
_OTHER = {ord("٫"): ".", ord("٬"): ",", ord("。"): ".", ord("∕"): "/", ord("⁄"): "/", ord("×"): "×", ord("’"): "'"}
_PLAIN = _FULL_WIDTH | _MINUS | _SPACES | _INVISIBLE | _OTHER

_EMPHASIS = [
    re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]*?[^\s*])\1(?![\w*])"),
    re.compile(r"(?<!\w)(_{1,3})(?=[^\s_])([^_\n]*?[^\s_])\1(?!\w)"),
    re.compile(r"(```)\w*\n([^`]+?)\n?```"),
    re.compile(r"(`{1,3})([^`\n]+)\1"),
    re.compile(r"<(b|i|u|em|strong)>([^<>]*)</\1>"),
]
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{$][^\s$]*)")  # of one token, without braces
_LATEX_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|mbox)\s*\{([^{}]*)\}"
)
_LATEX_BOX = re.compile(r"\\(?:boxed|fbox|box)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\(?:[,;: ]|quad\b|qquad\b)|~")
_LATEX_LAYOUT = re.compile(r"\\(?:!|left\b|right\b|displaystyle\b)")
_DELIMITERS = re.compile(r"\\[()\[\]]|\$\$")
_INLINE = re.compile(r"(?<![\w$])\$([^$\n]+)\$(?!\w)")


def plain(text: str) -> str:
    """The text without Markdown emphasis, and with digits of other scripts, Unicode minus signs and wide characters as ASCII."""
    text = "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text.translate(_PLAIN)
    )
    for pattern in _EMPHASIS:
        text = pattern.sub(lambda match: match[2], text)
    return _BARE_BOX.sub(r"\\boxed{\1}", text)


def without_latex(text: str) -> str:
    """The text without LaTeX delimiters, spacing and text commands."""
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\$", "$")
    text = _LATEX_LAYOUT.sub("", _LATEX_SPACE.sub(" ", _DELIMITERS.sub("", text)))
    text = _INLINE.sub(lambda match: match[1], text)
    for pattern in (_LATEX_TEXT, _LATEX_BOX):
        while (shorter := pattern.sub(lambda match: match[1], text)) != text:
            text = shorter
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "°", text)
    return re.sub(r"\s+", " ", text).strip()


def trimmed(text: str, final: str = "") -> str:
    """The text without outer spaces, final punctuation and pictures, quotation marks, outer brackets, and a list marker.

    Args:
        final: punctuation that stays at the end.
    """
    before = None
    while text != before:
        before = text
        text = text.strip().strip("\"'“”‘").strip()
        text = _FINAL.sub("", text) if not final or not text.endswith(final) else text
        if re.fullmatch(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}", text) and "," not in text:
            text = text[1:-1]
    return text


_FINAL = re.compile(r"(?:[.,;:!?…]+|(?<=.)\s*[✅✓✔☑\ufe0f\U0001f300-\U0001faff]+)$", re.DOTALL)

# ---- extraction of the answer ----------------------------------------------------------------------------------------

_MARKS = re.compile(
    r"(?P<box>\\(?:boxed|fbox|box)\s*\{)|(?P<tag><answer>)|(?P<rule>####)"
    r"|(?P<words>\banswer(?:\s+to\s+[^.:=\n]{1,80}?)?(?:\s+(?:is|was|equals|(?:would|should|must|will)\s+be)\b|\s*[:=])\s*[:=]?)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?:(?<=[.!?])\s+|;\s)(?!remainder\b)|\s-\s+(?=[A-Za-z])|,\s+not\s"
    r"|,?\s+\(?(?:because|since|as|so|which|where|hence|thus)\s",
    re.IGNORECASE,
)
_LEADS = re.compile(
    r"^(?:(?:exactly|simply|just|only|equal to|equals|approximately|about|roughly|around|therefore|thus|so|then|now|"
    r"clearly|indeed|obviously|definitely|actually)\b|[:=≈~])\s*",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"^\(?([A-Z])[).:](?:\s|$)")  # B) Paris
_FACTORIAL = re.compile(r"[\d)]!$")  # or an exclamation
_LEFT_SIDE = re.compile(r"^[^=<>≤≥≠]*[^\d\s.,$=<>≤≥≠][^=<>≤≥≠]*=(?P<right>[^=<>≤≥≠]+)$")


def marked_answers(text: str) -> list[str]:
    """The marked answers of a text, the last first."""
    return [_marked(text, mark) for mark in reversed(list(_MARKS.finditer(text)))]


def _marked(text: str, mark: re.Match[str]) -> str:
    rest = re.split(r"</answer>", text[mark.end() :], maxsplit=1, flags=re.IGNORECASE)[0]
    if mark["box"]:
        return _inside_braces(rest)
    return rest.strip() if mark["tag"] else rest.strip().partition("\n")[0]


def _inside_braces(text: str) -> str:
    """The text up to the brace that closes a brace opened before it; all of it if there is none."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:place]
    return text


def readings(answer: str, marked: bool = True) -> list[str]:
    """Readings of an answer: unchanged, its first sentence, and, for a marked answer, the right side of its equation."""
    found = []
    for text in (answer, _SENTENCE.split(answer.strip(), maxsplit=1)[0]):
        text = without_latex(text)
        if _FACTORIAL.search(text):
            found.append(trimmed(text, "!"))
        text = trimmed(text)
        while (shorter := _LEADS.sub("", text)) != text:
            text = trimmed(shorter)
        found.append(text)
    equation = _LEFT_SIDE.match(found[-1]) if marked else None
    if equation:
        found.append(trimmed(equation["right"]))
    if choice := _CHOICE.match(found[-1]):
        found.append(choice[1])
    return list(dict.fromkeys(reading for reading in found if reading))


# ---- numbers ---------------------------------------------------------------------------------------------------------


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


# ---- equality of answers ---------------------------------------------------------------------------------------------

_MATHEMATICS = re.compile(
    r"\\[a-zA-Z{]|[\^√π∞∅∪∩≤≥<>±]|^\{.*\}$|\*\*|[\w)]\s*[+*/=-]\s*[\w(\\-]|\d!|\b(?:sqrt|pi|infinity)\b|\d[a-z]\b|\d\("
)
_WORD = re.compile(r"(?<![\\a-zA-Z])(?!sqrt|sin|cos|tan|log|exp|pi\b|ln\b|infinity\b)[a-zA-Z]{3,}")


def matches(expected: str, completion: str, bare: str | None = None) -> tuple[bool | None, list[str]]:
    """Whether a completion gives the expected answer; None if only a symbolic comparison can decide, with the readings to try.

    Args:
        bare: the completion without the opener and closer around an unmarked answer; None: the completion itself.
    """
    wanted = expected_reading(expected)
    marked = marked_answers(plain(completion))
    tried = [readings(answer) for answer in marked] or [readings(plain(completion if bare is None else bare), False)]
    number = quantity(wanted)
    for found in tried if wanted else []:
        if any(same_text(reading, wanted) for reading in found):
            return True, []
        if number is not None:
            given = next((one for reading in found if (one := quantity(reading)) is not None), None)
            if given is not None:
                return same_quantity(given, number), []
        formulas = [reading for reading in found if _is_formula(reading) or quantity(reading) is not None]
        if formulas and number is None and _is_formula(wanted):
            return None, formulas
        if number is None or any(re.search(r"\d|^not\b", reading) for reading in found):
            return False, []
    return False, []


def expected_reading(expected: str) -> str:
    """The expected answer, normalised: the text after the last `####`, or in the last `\boxed`, else all of it."""
    text = plain(expected)
    text = text.rpartition("####")[2] if "####" in text else text
    boxed = list(re.finditer(r"\\(?:boxed|fbox|box)\s*\{", text))
    text = without_latex(_inside_braces(text[boxed[-1].end() :]) if boxed else text)
    return trimmed(text, "!" if _FACTORIAL.search(text) else "")


def same_text(given: str, expected: str) -> bool:
    """Whether two answers are the same text, ignoring spaces beside punctuation."""
    one, other = (re.sub(r"\s*([^\w\s])\s*", r"\1", text) for text in (given, expected))
    return one == other


def _is_formula(text: str) -> bool:
    """Whether a text is mathematics, not words: a formula, a set, an interval."""
    return len(text) <= LONGEST and not _WORD.search(text) and bool(_MATHEMATICS.search(text))
