"""Untrusted Markdown rendered as inert HTML: no tags, links or pictures from the text."""

from __future__ import annotations

import functools

from markdown_it import MarkdownIt

from lm.web.text import visible

# Raw HTML stays text. So do links and pictures, whose markup is shown as it was written: an answer can then neither
# fetch something, nor lead away, nor hide where it would lead. A definition of a link would be hidden, too.
PARSER = (
    MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": False})
    .enable(["table", "strikethrough"])
    .disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
)
LONGEST = 100_000  # characters of one text that are parsed; a longer one is shown as source


@functools.lru_cache(maxsize=256)
def to_html(text: str) -> str:
    """Render CommonMark with tables to HTML; all tags come from the parser."""
    return PARSER.render(visible(text)) if len(text) <= LONGEST else ""
