r"""Comparison of a completion with the expected answer: extraction of the answer, and equality of two answers.

The answer is marked by `\boxed{…}`, `<answer>…</answer>`, `#### …`, `answer is …` or `Answer: …`; without a mark the whole
completion is the answer. Markdown, LaTeX delimiters, a unit, a currency and a sentence after the answer are removed.
Numbers are compared exactly (`quantities.py`).
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from lm.rollout import mathematics
from lm.rollout.environments.expression import ExpressionError, evaluate
from lm.rollout.intervals import interval_union, same_union
from lm.rollout.mathematics import FUNCTION, LATEX_SIGNS, LATEX_SYMBOL
from lm.rollout.quantities import LONGEST, NO_UNIT, Quantity, quantity, same_quantity
from lm.rollout.units import is_known, same_unit, with_raised_powers

# ---- normalisation before any comparison ---------------------------------------------------------------------------

_MINUS = dict.fromkeys(map(ord, "−‐‑‒–﹣－"), "-")
_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u200a\u202f\u3000"), " ")
_INVISIBLE = dict.fromkeys(
    [*map(ord, "\u2060\ufeff"), *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)
_OTHER = {
    ord("٫"): ".",
    ord("٬"): ",",
    ord("。"): ".",
    ord("’"): "'",
    ord("\u00b5"): "μ",
    ord("\u2126"): "\u03a9",
    ord("∗"): "*",
} | {code: sign for sign, others in {"/": "∕⁄", "·": "⋅∙", "×": "✕✖⨯"}.items() for code in map(ord, others)}
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
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
    r"\\(?:underline|text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|mbox)\s*\{([^{}]*)\}"
)
_BOX = r"\\(?:boxed|framebox|fbox|box)\s*\{"
_LATEX_BOX = re.compile(_BOX + r"([^{}]*)\}")
_LATEX_SPACE = re.compile(r"(?<!\\)\\(?:[,;: ]|quad\b|qquad\b)|~")
_LATEX_LAYOUT = re.compile(
    r"\\(?:!|(?:left|right|displaystyle|small|large|Large|huge|bf|rm)\b|(?:text)?color\s*\{[^{}]*\})"
)
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]|\$\$")
_OVER = re.compile(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}")
_INLINE = re.compile(r"(?<![\w$\\])\$((?:\\\$|[^$\n])+)\$(?!\w)")


def plain(text: str) -> str:
    """The text without Markdown emphasis, and with digits of other scripts, Unicode minus signs and wide characters as ASCII."""
    text = "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text.translate(_PLAIN)
    )
    for pattern in _EMPHASIS:
        text = pattern.sub(lambda match: match[2], text)
    text = _RAISED.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text).translate(_MINUS)
    text = _LOWERED.sub(lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    for ascii_sign, sign in (("<=", "≤"), (">=", "≥"), ("!=", "≠")):
        text = text.replace(ascii_sign, sign)
    return _BARE_BOX.sub(r"\\boxed{\1}", text)


def without_latex(text: str) -> str:
    """The text without LaTeX delimiters, spacing and text commands."""
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\colon", ":")
    text = _LATEX_LAYOUT.sub("", _LATEX_SPACE.sub(" ", _DELIMITERS.sub("", text)))
    text = _INLINE.sub(lambda match: match[1], text).replace(r"\$", "$")
    for pattern in (_LATEX_TEXT, _LATEX_BOX):
        while (shorter := pattern.sub(lambda match: match[1], text)) != text:
            text = shorter
    text = _OVER.sub(r"\\frac{\1}{\2}", re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text))
    text = LATEX_SYMBOL.sub(lambda match: LATEX_SIGNS[match[1]], text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "°", text)
    return re.sub(r"\s+", " ", text).strip()


_QUOTES = "\"'“”‘"


def trimmed(text: str) -> str:
    """The text without outer spaces, final punctuation and pictures, quotation marks, outer brackets, and a list marker.

    The sign of a factorial stays: `5!`.
    """
    before = None
    while text != before:
        before = text
        text = _MEMBER.sub("", _FINAL.sub("", text.strip()))
        text = text.strip(_QUOTES if text[:1] in _QUOTES else "").strip()
        text = re.sub(rf"(?<!\d)[{_QUOTES}]+$", "", text)  # but 5' and 5" have units
        if re.fullmatch(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}", text) and "," not in text:
            text = text[1:-1]
    return text


_FINAL = re.compile(
    r"(?:(?:[.,;:?…\s]|(?<![\d)!])(?<!\b[A-Za-z])!)+"  # 5! and n! are factorials
    r"|(?<=.)\s*[✅✓✔☑\ufe0f\U0001f300-\U0001faff]+|</s>|<\|\w+\|>)$",
    re.DOTALL,
)

# ---- extraction of the answer ----------------------------------------------------------------------------------------

_MARKS = re.compile(
    rf"(?P<box>{_BOX})|(?P<tag><answer>)|(?P<rule>####)"
    r"|(?P<words>\banswer(?:\s+to\s+[^.:=\n]{1,80}?)?(?:\s+(?:is|was|equals|(?:would|should|must|will)\s+be)\b|\s*[:=])\s*[:=]?)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?:(?<=[.!])\s+(?!\W{0,9}$)|;\s(?![-+$\\(\[]*\d))(?!(?:remainder|no|wait|actually|sorry|hm+|oops|scratch|correction|hold on|on second|my mistake)\b)(?!=)|"
    r"\s\((?=[^()]*=)|\s-\s+(?=[A-Za-z])|,\s+(?:not|I (?:think|believe|guess|hope))\b"
    r"|,?\s+\(?(?:because|since|as|so|which|where|hence|thus)\s",
    re.IGNORECASE,
)
_LEADS = re.compile(
    r"^(?:(?:exactly|simply|just|only|equal to|equals|approximately|about|roughly|around|therefore|thus|so|then|now|"
    r"clearly|indeed|obviously|definitely|actually)\b|[:=≈~])\s*",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"^\(?([A-Z])[).:](?:\s+(?!(?:and|or)\b|[&/,])|$)")  # B) Paris
# within a formula; elsewhere the mark is an exclamation
_FACTORIAL = re.compile(r"(?:[\d)]|\b[A-Za-z])![^$]*?(?:\\[\])]|\$)")
_EXCLAMATION = re.compile(r"(?:(?<=[\d)])|(?<=\b[A-Za-z]))!+(?=\s*$|\s+[A-Za-z])")
# of an equation with a name or computation on its left, and maybe further ones between: x = 2·3 = 6
_LEFT_SIDE = re.compile(
    r"^[^=<>≤≥≠]*[^\d\s.,$=<>≤≥≠][^=<>≤≥≠]*=(?:(?:[^=<>≤≥≠,;A-Za-z\\]|\\[a-z]+)+=)*(?P<right>[^=<>≤≥≠]+)$"
)
_MEMBER = re.compile(r"^[A-Za-z]\s*(?:∈|\\in(?![a-z]))\s*(?=\S)")  # x ∈ [0, 1]
_MIXED = re.compile(r"(?<=\d)\s*(?:and|&)\s*(?=\d+\s?/\s?\d|\\frac)")  # 2 and 1/2
# an aside after an answer, in brackets: 72 (48 + 24), 3/4 (= 0.75) of it
_ASIDE = re.compile(
    r"^(?P<answer>[^()]*\d[^()]*)\s\((?:=|≈|i\.e\.,?|or\b)?\s*(?P<aside>[^()]*\d[^()]*)\)(?P<rest>[^()\d]*)$"
)


_ITEM = re.compile(r"\s*(?:[-*+•—>]|#{1,6}|\d{1,2}[.)])\s+(?=\S)")  # the marker of a list item, quotation or heading
_OPENED = re.compile(r"^\s*(?:\\\[|\$\$)\s*\n")  # a formula that begins on the next line
_BETWEEN_BOXES = re.compile(r"\}\s*\$*\s*(?:[,;]|,?\s*(?:\\text\s*\{\s*)?(?:and|or)\s*\}?)\s*\$*\s*")
_BETWEEN = 40  # maximum characters between two boxes that are one answer
_MOST_MARKS = 100  # of which the last are read
_MINUS_BEFORE = re.compile(r"(?:^|[\s$(:])-$|=\s*-\s*$")
# words before the only number of an answer that is a sentence, and words that would change the number
_LEAD_WORDS = re.compile(r"(?:(?:[A-Za-z][a-z'-]+|[aAI])[:,]?\s+){1,12}(?=[+-]?[$€£¥₹]?\d)")
_NO_LEAD = (NO_UNIT | set("no of least most nearly almost above below under over from but without and twice double minus negative "
                          "by neither close up cannot times".split())) - set("is was are were be been would to".split())  # fmt: skip


def marked_answers(text: str) -> list[str]:
    """The last marked answers of a text, the last first; answers in boxes that a comma or `and` joins are one."""
    found: list[str] = []
    box_end = 0  # of the mark before
    for mark in deque(_MARKS.finditer(text), _MOST_MARKS):
        if mark.start() < box_end < len(text):  # a mark in a box that is closed
            continue
        answer = _marked(text, mark)
        if mark["box"] and found and _BETWEEN_BOXES.fullmatch(text[box_end : mark.start()][:_BETWEEN]):
            found[-1] += f" and {answer}" if answer != found[-1] else ""
        else:
            found.append(answer)
        box_end = mark.end() + len(_inside_braces(text[mark.end() :])) if mark["box"] else len(text)
    return found[::-1]


def _marked(text: str, mark: re.Match[str]) -> str:
    rest = re.split(r"</answer>", text[mark.end() :], maxsplit=1, flags=re.IGNORECASE)[0]
    if mark["box"]:
        inside = rf"\({_inside_braces(rest)}\)"  # a formula
        negated = _MINUS_BEFORE.search(text[max(0, mark.start() - _BETWEEN) : mark.start()])
        return inside if not negated else f"-({inside})" if re.search(r"[+-]", inside) else f"-{inside}"
    items = [
        _ITEM.sub("", line, count=1).strip() for line in itertools.takewhile(_ITEM.match, rest.strip().splitlines())
    ]
    between = mark[0][len(mark[0].rstrip()) :] + rest[: len(rest) - len(rest.lstrip())]
    if items and "\n" in between:
        return " and ".join(items)
    return rest.strip() if mark["tag"] else _OPENED.sub("", rest).strip().partition("\n")[0]


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
    found, exclaimed = [], []
    for text in (answer, _SENTENCE.split(answer.strip(), maxsplit=1)[0]):
        formula = _FACTORIAL.search(text)
        text = trimmed(without_latex(text))
        while (shorter := _LEADS.sub("", text)) != text:
            text = trimmed(shorter)
        if not formula and _EXCLAMATION.search(text):
            exclaimed.append(text)
            text = trimmed(_EXCLAMATION.sub("", text))
        found.append(text)
    equation = _LEFT_SIDE.match(found[-1]) if marked else None
    if equation:
        found.append(trimmed(equation["right"]))
    sentence = _LEAD_WORDS.match(found[-1]) if marked else None
    if sentence and not _NO_LEAD & set(
        re.findall(r"[a-z']+", re.sub(r"\b(total|number|amount) of\b", r"\1", sentence[0].lower()))
    ):
        found.append(found[-1][sentence.end() :])
    found.append(_without_aside(_MIXED.sub(" ", found[-1])))
    if choice := _CHOICE.match(found[-1]):
        found.append(choice[1])
    return list(dict.fromkeys(reading for reading in found + exclaimed if reading))


def _without_aside(text: str) -> str:
    """An answer without an aside of the same value: `72` of `72 (48 + 24)`; another text unchanged."""
    found = _ASIDE.match(text[:LONGEST])
    given, aside = (quantity(trimmed(found["answer"])), _computed(found["aside"])) if found else (None, None)
    return (
        trimmed(found["answer"] + found["rest"]) if found and given and aside and same_quantity(given, aside) else text
    )


def _computed(text: str) -> Quantity | None:
    """The number in a text, or that of an arithmetic expression."""
    try:
        return quantity(trimmed(text)) or Quantity(evaluate(text.replace("·", "*")))
    except ExpressionError:
        return None


# ---- equality of answers ---------------------------------------------------------------------------------------------

_MATHEMATICS = re.compile(
    rf"\\[a-zA-Z{{]|[\^√∛∞∅∪∩≤≥<>±·×÷Ͱ-Ͽ]|^\{{.*\}}$|\*\*|[\w)]\s*[+*/=-]\s*[\w(\\-]|\d!|(?<![a-zA-Z])(?:sqrt|pi|infinity|{FUNCTION})\b|\d[a-z]\b|\d\("
)
_WORD = re.compile(rf"(?<![\\a-zA-Z])(?!sqrt|{FUNCTION}|pi\b|infinity\b)[a-zA-Z]{{3,}}")
_DATE = re.compile(r"\d+([-/])\d+(?:\1\d+)+")  # or another number in groups
_MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}")
_SEPARATOR = re.compile(r"[(\[{]|[)\]}]|,(?!\d{3}(?!\d))(?:\s*(?:and|or)\b)?|;|\b(?:and|or)\b")
_RANGE = re.compile(r"(?P<low>\S*\d)\s*(?:-|\bto\b)\s*(?P<high>[$€£¥₹]?\d.*)")
_NAME = r"\s*\\?[A-Za-z]\w*(?:_\{\w+\}|\([\w, ]*\))?\s*=(?P<right>[^=]+)"


def matches(expected: str, completion: str, bare: str | None = None) -> bool | None:
    """Whether a completion gives the expected answer; None if the comparison of two formulas took too long.

    Args:
        bare: the completion without the opener and closer around an unmarked answer; None: the completion itself.
    """
    wanted = expected_reading(expected)
    marked = marked_answers(plain(completion))
    unmarked = plain(completion if bare is None else bare)
    number = quantity(wanted)
    for answer in (marked or [unmarked]) if wanted else []:
        found = readings(answer, bool(marked))
        if any(reading == wanted if number is not None else same_text(reading, wanted) for reading in found):
            return True
        if number is not None:
            given = next((one for reading in found if (one := quantity(reading)) is not None), None)
            if given is not None:
                return same_quantity(given, number)
        elif any(is_formula(_unit_of(one)[0]) or quantity(one) is not None or parts(one) for one in found):
            return _any([same_answer(reading, wanted) for reading in found])
        if number is None or any(re.search(r"\d|^not\b", reading) for reading in found):
            return False
    return False


def expected_reading(expected: str) -> str:
    """The expected answer, normalised: the text after the last `####`, or in the last `\boxed`, else all of it."""
    text = plain(expected)
    text = text.rpartition("####")[2] if "####" in text else text
    boxed = list(re.finditer(_BOX, text))
    text = without_latex(_inside_braces(text[boxed[-1].end() :]) if boxed else text)
    return trimmed(text)


_TIME = re.compile(r"(?<=\d)\s*([ap])\.?m\b\.?", re.IGNORECASE)  # 4:30 p.m.


def same_text(given: str, expected: str) -> bool:
    """Whether two answers are the same text, ignoring spaces beside punctuation."""
    return _squeezed(given) == _squeezed(expected)


def _squeezed(text: str) -> str:
    text = re.sub(r"(?<=\d) to (?=\d)", ":", text)  # a ratio
    text = re.sub(r"_\{(\w+)\}", r"_\1", re.sub(r"\s*([^\w\s])\s*", r"\1", text))
    return _TIME.sub(lambda match: f"{match[1].lower()}m", text)


def same_answer(given: str, expected: str) -> bool | None:
    """Whether two readings are the same number, the same list, or equal formulas; None if formulas took too long to compare."""
    one, other = quantity(given), quantity(expected)
    if one is not None and other is not None:
        return same_quantity(one, other)
    if one is None and other is None and same_text(given, expected):
        return True
    intervals, wanted_intervals = interval_union(given), interval_union(expected)
    if intervals and wanted_intervals and any(one.name for one in (*intervals, *wanted_intervals)):
        return same_union(intervals, wanted_intervals, same_answer)
    found, wanted = parts(given), parts(expected)
    if found and wanted:
        return _same_parts(found, wanted)
    (given, unit), (expected, wanted_unit) = _unit_of(given), _unit_of(expected)
    if unit and wanted_unit and not same_unit(unit, wanted_unit):
        return False
    named = re.fullmatch(_NAME, expected)
    if named and "=" not in given:
        return same_answer(given, trimmed(named["right"]))
    if found and found.kind == "{}" and re.search("[<>≤≥=]", expected):  # math-verify takes {1, 2} for 1 < x < 2
        return False
    if other is not None or (one is not None and wanted) or not (wanted or is_formula(expected)):
        return False
    if one is not None and one.unit == "" and one.value.denominator == 1:
        given = str(one.value)  # math-verify reads neither 1e6 nor 1,000
    return mathematics.equal(expected, given) if one is not None or is_formula(given) else False


_FORMULA_UNIT = re.compile(
    r"(.*[^\sA-Za-z\\])\s+((?:(?:square|cubic|sq\.?|cu\.?)\s+)?[A-Za-z]{2,}(?:\s?\^\s?\{?[234]\}?)?(?:\s?/\s?[A-Za-z]+)?)"
)


def _unit_of(text: str) -> tuple[str, str]:
    """A formula and the unit after it, as in `9π cm^2`; another text and ""."""
    found = _FORMULA_UNIT.fullmatch(text) if len(text) <= LONGEST and quantity(text) is None else None
    return (
        (found[1], with_raised_powers(found[2]))
        if found and is_formula(found[1]) and is_known(found[2])
        else (text, "")
    )


class Parts(NamedTuple):
    """The items of a tuple, interval, set, matrix, range or list."""

    kind: str  # the brackets; "matrix 2", with the number of rows; "range"; "" for a list without brackets
    items: tuple[str, ...]
    ordered: bool


def parts(text: str) -> Parts | None:
    """The items of an answer that consists of several; None for another."""
    if len(text) > LONGEST or quantity(text) is not None:
        return None
    if matrix := _MATRIX.fullmatch(text):
        rows = re.split(r"\\\\(?:\[\w+\])?", re.sub(r"\\\\\s*$", "", matrix[1]))
        return Parts(f"matrix {len(rows)}", tuple(cell.strip() for row in rows for cell in row.split("&")), True)
    limits = _RANGE.fullmatch(text)
    if limits and quantity(limits["low"]) and quantity(limits["high"]):
        return Parts("range", (limits["low"], limits["high"]), True)
    inner = text.removeprefix("\\").replace("\\}", "}")
    if len(inner) > 1 and inner[0] in "([{" and len(_split(inner)) == 1 and _closed_at(inner) == len(inner) - 1:
        items = _split(inner[1:-1]) if inner[1:-1].strip() else ()
        return Parts(inner[0] + inner[-1], items, inner[0] != "{") if len(items) > 1 or inner[0] == "{" else None
    items = (text.replace("±", "+"), text.replace("±", "-")) if text.count("±") == 1 else _split(text)
    names = [match[1] for item in items if (match := re.match(r"([A-Za-z])\s*=", item))]
    if len(set(names)) == 1:
        items = tuple(re.sub(r"^[A-Za-z]\s*=\s*", "", item) for item in items)
    if len(items) < 2 or not all(quantity(item) or is_formula(item) or parts(item) or len(item) < 3 for item in items):
        return None
    return Parts("", items, "±" not in text and len(names) < 2 and not re.search(r"\b(?:and|or)\b", text))


def _closed_at(text: str) -> int:
    """The place of the bracket that closes the first one, of any kind, since `[0, 1)` is an interval."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return place
    return -1


def _split(text: str) -> tuple[str, ...]:
    """The text at its commas, semicolons, `and` and `or` outside of brackets."""
    depth, start, found = 0, 0, []
    for match in _SEPARATOR.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if depth == 0 and match[0] not in ")]}":
            found.append(text[start : match.start()].strip())
            start = match.end()
    return (*found, text[start:].strip())


def _same_parts(found: Parts, wanted: Parts) -> bool | None:
    free = not (found.ordered and wanted.ordered)  # in any order
    list_and_set = {found.kind, wanted.kind} == {"", "{}"} and not (found.ordered or wanted.ordered)
    if found.kind != wanted.kind and not list_and_set:
        return False
    if found.kind != "{}" and len(found.items) != len(wanted.items):
        return False
    if not free:
        return _all([_same_item(*pair) for pair in zip(found.items, wanted.items, strict=True)])
    table = [[_same_item(one, other) for other in wanted.items] for one in found.items]
    return _all([_any(row) for row in (*table, *zip(*table, strict=True))])


def _same_item(given: str, expected: str) -> bool | None:
    return ("=" in given) == ("=" in expected) and same_answer(trimmed(given), trimmed(expected))


def _any(found: Sequence[bool | None]) -> bool | None:
    return True if True in found else None if None in found else False


def _all(found: Sequence[bool | None]) -> bool | None:
    return False if False in found else None if None in found else True


def is_formula(text: str) -> bool:
    """Whether a text is mathematics, not words: a formula, a set, an interval."""
    words = len(text) > LONGEST or _WORD.search(text) or _DATE.fullmatch(text)
    return not words and bool(_MATHEMATICS.search(text))
