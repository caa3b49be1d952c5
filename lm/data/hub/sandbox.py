"""The sandbox that chat templates run in: jinja2 as transformers sets it up, with limits on steps, sizes and time."""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import TracebackType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_STEPS = 1_000_000  # maximum iterations of loops and calls of macros
MOST_SECONDS = 20.0
MOST_LETTERS = 10_000_000  # maximum size of the output, and of any value in between
MEMBER = 10  # letters that a member of a list or dictionary counts as, beside its own
WIDE = re.compile(r"\d{6}")  # a width in a format string that is too large
BLOCK_MARKS = GENERATION_START, GENERATION_END = "\U0010fffa", "\U0010fffb"
Compiled = jinja2.Template
FILE = "<template>"  # jinja2's name for a template without a file


class TemplateLimit(Exception):
    """Raised if a template takes too long or its output is too large."""


class Meter:
    """Counts the steps of one rendering, and raises TemplateLimit if there are too many."""

    def __init__(self) -> None:
        self.steps, self.began = 0, time.monotonic()

    def step(self) -> str:
        """Count an iteration of a loop; returns the empty text."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise TemplateLimit(f"more than {MOST_STEPS:,} passes of its loops")
        if self.steps % 64 == 0 and time.monotonic() - self.began > MOST_SECONDS:
            raise TemplateLimit(f"more than {MOST_SECONDS:g} seconds")
        return ""


METER: ContextVar[Meter] = ContextVar("METER")


@contextmanager
def metered() -> Iterator[None]:
    """Context of one rendering."""
    token = METER.set(Meter())
    try:
        yield
    finally:
        METER.reset(token)


def _step() -> str:
    return METER.get().step()


class GenerationBlocks(Extension):
    """`{% generation %}` … `{% endgeneration %}`: puts the assistant's text between two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call that puts the marks around its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits on loop iterations and on the size of values."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, now: datetime | None):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlocks])
        self.filters |= {"tojson": to_json}
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}
        del self.globals["lipsum"]  # random text of any length
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: (now or datetime.now()).strftime(form),
            "namespace": Namespace,
            "_step": _step,
            "_joined": _joined,
            "_literal": _literal,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        node: Any
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            step = nodes.Call(nodes.Name("_step", "load"), [], [], None, None)
            node.body.insert(0, nodes.Output([step]).set_lineno(node.lineno, override=True))
        _Rewrite().visit(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result could be huge, within the limits."""
        sizes = [len(value) for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "*" and sizes and numbers:
            _check_size(sizes[0] * numbers[0])
        elif operator in ("*", "**") and len(numbers) == 2:
            _check_size(numbers[0].bit_length() * (abs(numbers[1]) if operator == "**" else 1))
        elif operator == "%" and isinstance(left, str):
            _check_arguments("format", (left, *(right if isinstance(right, tuple) else (right,))))
        elif operator == "+" and sizes:
            _check_size(sum(sizes))
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Make a template's call, with limits on its arguments and its result."""
        function_itself = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format
        owner = getattr(function_itself, "__self__", None)
        if isinstance(owner, str):
            _check_arguments(function.__name__, (owner, *args, *kwargs.values()))
        return _checked(super().call(context, function, *args, **kwargs))


class Namespace(jinja2.utils.Namespace):
    """jinja2's namespace, without its values in its text: namespaces in namespaces could have a text of any length."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Rewrite(jinja2.visitor.NodeTransformer):
    """Turns `a ~ b`, and literals of lists, tuples and dictionaries, into calls, whose results are limited."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name("_joined", "load"), node.nodes, [], None, None).set_lineno(node.lineno)

    def _visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # names that are assigned to
            return node
        return nodes.Call(nodes.Name("_literal", "load"), [node], [], None, None).set_lineno(node.lineno)

    visit_List = visit_Tuple = visit_Dict = _visit_literal


def _joined(*values: Any) -> str:
    return _checked("".join(map(str, values)))


def _literal(value: Any) -> Any:
    return value


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` of chat templates: JSON without HTML escapes."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return encoder.encode(value) if indent is None else _gathered(encoder.iterencode(value))


def _gathered(pieces: Iterable[str]) -> str:
    """The text of the pieces. Raises TemplateLimit as soon as they are too long, as with a wide indent before each member."""
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        _check_size(size)
        found.append(piece)
    return "".join(found)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps jinja2's attributes of the function
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(function.__name__, (*args, *kwargs.values()))
        return _checked(function(*args, **kwargs))

    return bounded


def _check_arguments(name: str, args: tuple[Any, ...]) -> None:
    """Raise TemplateLimit for arguments that could turn a small text into a huge one: widths, formats, replacements."""
    for value in args:
        if isinstance(value, int):
            _check_size(value)
    texts = [value for value in args if isinstance(value, str)]
    if "format" in name and texts:
        _check_format(texts[0])
    if "replace" in name and len(texts) == 3:
        _check_size(texts[0].count(texts[1]) * len(texts[2]))
    if "join" in name and len(args) > 1 and texts:
        _check_size(max(len(text) for text in texts) * max(len(value) for value in args if hasattr(value, "__len__")))


def _check_format(text: str) -> None:
    if WIDE.search(text):
        raise TemplateLimit(f"a format of more than {MOST_LETTERS:,} letters")


def _check_size(size: int) -> None:
    if size > MOST_LETTERS:
        raise TemplateLimit(f"a value of more than {MOST_LETTERS:,} letters")


def _checked(value: Any) -> Any:
    """The value. Raises TemplateLimit if its text could be too large."""
    _size(value, {})
    return value


def _size(value: Any, known: dict[int, int]) -> int:
    """About the number of letters of a value's text; `known` has those of its parts, as one may have many places in it."""
    if isinstance(value, str | bytes):
        _check_size(len(value))
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 0
    if id(value) not in known:
        size = MEMBER * len(value)
        _check_size(size)
        for member in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            size += _size(member, known)
        _check_size(size)
        known[id(value)] = size
    return known[id(value)]


def output(template: Compiled, variables: dict[str, Any]) -> str:
    """The output of a template. Raises TemplateLimit if it is too long or takes too long."""
    with metered():
        return _gathered(template.generate(variables))


def error_line(error: BaseException) -> int | None:
    """The line of the template that raised the error."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    found, trace = None, error.__traceback__
    while isinstance(trace, TracebackType):
        if trace.tb_frame.f_code.co_filename == FILE:
            found = trace.tb_lineno
        trace = trace.tb_next
    return found
