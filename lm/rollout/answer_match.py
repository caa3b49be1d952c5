r"""Comparison of a completion with the expected answer: extraction of the answer, and equality of two answers.

The answer is marked by `\boxed{…}`, `<answer>…</answer>`, `#### …`, `answer is …` or `Answer: …`; without a mark the whole
completion is the answer. Markdown, LaTeX delimiters, a unit, a currency and a sentence after the answer are removed.
Numbers are compared exactly (`quantities.py`).
"""

from __future__ import annotations

import re
import unicodedata

from lm.rollout.quantities import LONGEST, quantity, same_quantity

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
