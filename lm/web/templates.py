"""Jinja environment for the page templates."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2


@functools.cache  # so that a template is compiled once
def templates(folder: Path) -> jinja2.Environment:
    """The templates of a folder, with autoescaping; an undefined value is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
