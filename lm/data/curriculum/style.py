"""Style of answers: polite openers and hedging closers, how to add and to remove them.

One list of each serves the demonstrations, the preference pairs and the verifier of style.
"""

from __future__ import annotations

OPENERS = ("Sure!", "Of course.", "Certainly!", "Happy to help!", "Gladly.")
CLOSERS = (
    "I hope that helps, but I may be wrong.",
    "Please ask again if this is not what you wanted to know.",
    "I am not sure about this, though.",
    "Sorry if that is not right.",
)


def dress(core: str, opener: str = "", closer: str = "") -> str:
    """Join opener, core and closer to an answer; a core of several lines (code) keeps lines of its own.

    A core without a full stop gets one before a closer.
    """
    between = "\n" if "\n" in core else " "
    if closer and between == " " and core[-1] not in ".!?":
        core += "."
    return between.join(part for part in (opener, core, closer) if part)


def undress(text: str) -> tuple[bool, str, bool]:
    """(whether an opener was there, the text without openers and closers, whether a closer was there)."""
    bare = text.strip()
    opened = closed = False
    while opener := next((o for o in OPENERS if bare.startswith(o)), None):
        opened, bare = True, bare[len(opener) :].lstrip()
    while closer := next((c for c in CLOSERS if bare.endswith(c)), None):
        closed, bare = True, bare[: -len(closer)].rstrip()
    return opened, bare, closed
