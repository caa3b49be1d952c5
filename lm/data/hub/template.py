"""Chat templates: rendering of a conversation to text, with errors of one line."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2

from lm.data import bad_rows
from lm.data.bad_rows import BadRow
from lm.data.hub import sandbox

Turn = Mapping[str, Any]
SHOWN = 80  # characters of a template's line in an error
BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateError(BadRow):
    """Raised for a template that cannot be read, or a conversation that it cannot render."""

    def __init__(self, message: str):
        super().__init__(message, bad_rows.TEMPLATE)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template; `names` are the special tokens that it may use, `now` is the date passed to it (None: today)."""

    source: str
    names: Mapping[str, str] = field(default_factory=dict)
    now: datetime | None = None
    where: str = "chat template"

    def __post_init__(self) -> None:
        _ = self._compiled  # so that an invalid template is reported when it is loaded

    @property
    def marks_generation(self) -> bool:
        """Whether the template marks the assistant's text itself, with generation blocks."""
        return BLOCK.search(self.source) is not None

    @functools.cached_property
    def _compiled(self) -> sandbox.Compiled:
        try:
            return sandbox.TemplateSandbox(self.now).from_string(self.source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise self._error(error, "cannot be read") from error

    def render(
        self,
        messages: Sequence[Turn],
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; generation blocks are between `sandbox.GENERATION_START` and `GENERATION_END`.

        Raises:
            TemplateError: the template refuses the conversation, fails on it, or exceeds a limit of the sandbox.
        """
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generation_prompt}
        try:
            return sandbox.output(self._compiled, given | dict(self.names) | dict(variables or {}))
        except sandbox.TemplateLimit as error:
            raise self._error(error, "does not end") from error
        except jinja2.exceptions.SecurityError as error:
            raise self._error(error, "is not allowed") from error
        except jinja2.UndefinedError as error:
            raise self._error(error, "cannot render the conversation") from error
        except jinja2.TemplateError as error:
            raise self._error(error, "refuses the conversation") from error
        except (MemoryError, OverflowError) as error:
            raise self._error(error, "does not end") from error
        except Exception as error:  # expressions of a template may raise anything
            raise self._error(error, "cannot render the conversation") from error

    def _error(self, error: BaseException, what: str) -> TemplateError:
        line = sandbox.error_line(error)
        place = "" if line is None else f", line {line} ({self._line(line)})"
        said = " ".join(str(error).split()) or type(error).__name__
        return TemplateError(f"{self.where}: the template {what}: {said:.200}{place}")

    def _line(self, number: int) -> str:
        lines = self.source.split("\n")
        text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
