"""Untrusted Markdown rendered as inert HTML: no tags, links or pictures from the text."""

from __future__ import annotations

import functools

from markdown_it import MarkdownIt

from lm.web.text import visible

# Raw HTML stays text. Links and pictures are shown as Markdown source, so that an answer can neither load a URL, nor
# navigate away, nor hide a link's target. Link definitions are disabled because they would not be shown at all.
PARSER = (
    MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": False})
    .enable(["table", "strikethrough"])
    .disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
)
LONGEST = 100_000  # maximum characters of a text that is parsed; a longer text is shown as source


@functools.lru_cache(maxsize=256)
def to_html(text: str) -> str:
    """Render CommonMark with tables to HTML; all tags come from the parser."""
    return PARSER.render(visible(text)) if len(text) <= LONGEST else ""
