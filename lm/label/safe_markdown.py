"""Markdown that nobody is trusted with, as HTML that can do nothing: no tag, link or picture of the text's own."""

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
LONGEST = 100_000  # characters of one text that are parsed; of a longer one the source is shown


@functools.lru_cache(maxsize=256)
def to_html(text: str) -> str:
    """The Markdown of CommonMark with tables as HTML. Its only tags are the parser's own."""
    return PARSER.render(visible(text)) if len(text) <= LONGEST else ""
