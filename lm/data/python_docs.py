"""`gen:docs`: the documentation that comes with Python, as documents.

Language reference topics (`pydoc_data`), docstrings of the modules compiled into the interpreter, and of every
module of the standard library its docstrings and block comments, read with `ast.parse`, never imported.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

LONGEST = 8_000  # characters of one document
SHORTEST = 200  # a module with less to say is left out
REPEATABLE = 80  # a longer paragraph is taken only where it comes first, so that none is on both sides of a split
SKIPPED = frozenset(
    "test tests idle_test site-packages dist-packages ensurepip lib2to3 encodings pydoc_data __pycache__".split()
)
_BLOCK = re.compile(r"(?:^[ \t]*#[^\n]*\n){2,}", re.MULTILINE)
_LEGAL = re.compile(r"copyright|licen[cs]e|all rights reserved", re.IGNORECASE)


@functools.lru_cache(maxsize=1)
def documents() -> tuple[dict[str, str], ...]:
    """All documents, in a fixed order: {"text", "key"}; the parts of a long module share its name as key."""
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are many small objects; looking through them again and again takes most of the time
    try:
        sources = [*_topics(), *_builtin_modules(), *_library_modules()]
    finally:
        if collecting:
            gc.enable()
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for name, found in sources:
        paragraphs = [text for text in found if len(text) < REPEATABLE or text not in seen]
        seen.update(paragraphs)
        if sum(map(len, paragraphs)) >= SHORTEST:
            rows += [{"text": text, "key": f"docs:{name}"} for text in split_paragraphs(paragraphs, LONGEST)]
    return tuple(rows)


def split_paragraphs(paragraphs: list[str], limit: int) -> list[str]:
    """Paragraphs joined by blank lines into texts of at most `limit` characters; one that is longer is cut in lines."""
    texts: list[str] = []
    current = ""
    for paragraph in paragraphs:
        for piece in _cut(paragraph, limit):
            if current and len(current) + len(piece) + 2 > limit:
                texts.append(current)
                current = ""
            current = f"{current}\n\n{piece}" if current else piece
    return [*texts, current] if current else texts


def module_paragraphs(name: str, source: str) -> list[str]:
    """The module's docstring, then in file order signature and docstring of what has one, and comment blocks."""
    tree = ast.parse(source)
    found = [(0, f"Module {name}\n\n{ast.get_docstring(tree)}")] if ast.get_docstring(tree) else []
    found += _definitions(tree.body, "")
    if len(found) == 0:
        return []
    found += _comments(source)
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[int, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield node.lineno, f"{_signature(node, prefix)}\n{_indent(doc)}"
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{prefix}{node.name}.")


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {prefix}{node.name}({bases})" if bases else f"class {prefix}{node.name}"
    return f"def {prefix}{node.name}({ast.unparse(node.args)})"


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Blocks of comment lines that read as prose, with their line numbers."""
    line, at = 1, 0
    for block in _BLOCK.finditer(source):
        line, at = line + source.count("\n", at, block.start()), block.start()
        text = "\n".join(re.sub(r"^\s*#+ ?", "", part).rstrip() for part in block[0].splitlines()).strip("\n")
        words = sum(letter.isalpha() or letter.isspace() for letter in text)
        if len(text) >= 80 and words > 0.85 * len(text) and not _LEGAL.search(text):
            yield line, text


def _library_modules() -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(_python_files(root)):
        source = path.read_text(encoding="utf-8", errors="replace")
        if '"""' in source or "'''" in source:
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            yield name, module_paragraphs(name, source)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith("config-")]
        yield from (Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfig"))


def _topics() -> Iterator[tuple[str, list[str]]]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip("\n").split("\n\n")


def _builtin_modules() -> Iterator[tuple[str, list[str]]]:
    """Modules inside the interpreter: no file says what their functions do."""
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        paragraphs = [f"Module {name}\n\n{inspect.cleandoc(module.__doc__)}"] if module.__doc__ else []
        for label, now in sorted(vars(module).items()):
            # A debugger, a notebook or a test runner may have put its own in a hook's place; the first is kept so.
            value = vars(module).get(f"__{label}__", now)
            if isinstance(value, types.BuiltinFunctionType):
                paragraphs += _described(label, value)
            elif isinstance(value, type) and value.__module__ == name and value is not type:
                paragraphs += _described(f"class {label}", value)
                for method, inner in sorted(vars(value).items()):
                    if not method.startswith("__") and callable(inner):
                        paragraphs += _described(f"{label}.{method}", inner)
        yield name, paragraphs


def _described(label: str, value: object) -> list[str]:
    doc, signature = getattr(value, "__doc__", None), getattr(value, "__text_signature__", None) or ""
    if not (isinstance(doc, str) and doc):
        return []
    signature = re.sub(r"\$module(, /)?(, )?", "", signature).replace("$", "")
    return [f"{label}{signature}\n{_indent(inspect.cleandoc(doc))}"]


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))


def _cut(paragraph: str, limit: int) -> Iterator[str]:
    while len(paragraph) > limit:
        at = paragraph.rfind("\n", 1, limit) + 1 or limit
        yield paragraph[:at].rstrip("\n")
        paragraph = paragraph[at:]
    yield paragraph


def made_of() -> dict[str, str]:
    """What determines the documents: the Python that is read, and how."""
    how = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"python": sys.version, "stdlib": sysconfig.get_path("stdlib"), "how": how}


def fingerprint(rows: Iterable[Mapping[str, str]]) -> str:
    """sha256 over all documents."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row['key']}\0{row['text']}\0".encode(errors="replace"))
    return digest.hexdigest()
