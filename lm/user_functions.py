"""Verifiers, losses, environments and callbacks from the user's own files, named FILE:FUNCTION.

FILE is the path of a .py file, or a module: a file of that name beside the experiment or in the current folder, else
an installed module.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lm.config.field import FUNCTION, is_function_name
from lm.config.objective import VERIFIER_ARGUMENTS
from lm.experiment import Experiment, UserError, nearest
from lm.shapes import is_text
from lm.stored import read_record

SEARCH_PATH = "LM_FUNCTIONS"
"""Environment variable with the folders that are searched first, joined like PATH; child processes inherit it."""


def search_first(folder: Path) -> None:
    """Search this folder first for FILE, here and in child processes."""
    known = os.environ.get(SEARCH_PATH, "").split(os.pathsep)
    folders = [str(folder.resolve()), *(other for other in known if other)]
    os.environ[SEARCH_PATH] = os.pathsep.join(dict.fromkeys(folders))


def load_function(name: str, where: str, arguments: str = "") -> Callable[..., Any]:
    """Load the function that FILE:FUNCTION names; the file runs once per process.

    Args:
        where: the field or flag that names it, for errors.
        arguments: what the function is called with, comma-separated: `row, completion`; empty: not checked.

    Raises:
        UserError: no such file or function, a file that raises, something that cannot be called with `arguments`.
    """
    file, _, attribute = name.rpartition(":")
    if not file or not attribute.isidentifier():
        raise UserError(f"{where} is {name!r}; it should be {FUNCTION}, for instance my_file:score")
    what = f"{where} is {name!r}"
    path = _find(file)
    try:
        module = _run(path) if path else _import(file)
    except UserError as error:
        raise UserError(f"{what}; {error}") from error.__cause__
    place = path or file
    if not hasattr(module, attribute):
        public = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise UserError(f"{what}; {place} defines no {attribute!r}{nearest(attribute, public)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise UserError(f"{what}; {attribute} in {place} is {type(function).__name__}, and no function")
    _check_arguments(function, arguments, what)
    return function


def _check_arguments(function: Callable[..., Any], arguments: str, what: str) -> None:
    if not arguments:
        return
    try:
        inspect.signature(function).bind(*arguments.split(","))
    except TypeError as error:
        raise UserError(f"{what}; it is called as {function.__name__}({arguments}): {error}") from None
    except ValueError:  # a builtin that has no signature
        pass


def function_names(experiment: Experiment) -> list[tuple[str, str, str]]:
    """(field, FILE:FUNCTION, what it is called with) of every field that names a function of the user's own."""
    fields = [
        (f"{stage.name}.objective.{field}", getattr(stage.objective, field), arguments)
        for stage in experiment.stages
        for field, arguments in stage.objective.functions.items()
    ]
    fields += [(f"evals.{item.name}.verifier", item.verifier, VERIFIER_ARGUMENTS) for item in experiment.evals]
    fields += [(f"evals.{item.name}.environment", item.environment, "") for item in experiment.evals]
    return [
        (where, name, arguments)
        for where, value, arguments in fields
        for name in (value if isinstance(value, tuple) else (value,))
        if is_function_name(name)
    ]


def search_recorded(run_dir: Path) -> None:
    """Look for FILE first where the last session of a run found it, as its environment.json says."""
    file = run_dir / "environment.json"
    sessions = read_record(file, {"runs": [{"functions?": {"*": is_text}}]})["runs"] if file.is_file() else []
    for name, found in (sessions[-1] if sessions else {}).get("functions", {}).items():
        path = _as_path(name.rpartition(":")[0] or name)
        folders = Path(found.replace("\0", "")).parents[0 if ".." in path.parts else len(path.parts) - 1 :]
        if folders and not path.is_absolute():
            search_first(folders[0])


def check_functions(experiment: Experiment) -> dict[str, dict[str, str]]:
    """Load all user functions that an experiment names; returns FILE:FUNCTION → its file and the file's SHA-256.

    Raises:
        UserError: one cannot be loaded, or is called with other arguments.
    """
    sources: dict[str, dict[str, str]] = {}
    for where, name, arguments in function_names(experiment):
        function = load_function(name, where, arguments)
        file = inspect.getsourcefile(inspect.unwrap(function)) or ""
        read = Path(file).read_bytes() if file and Path(file).is_file() else b""
        sources[name] = {"file": file, "sha256": hashlib.sha256(read).hexdigest()}
    return sources


def _as_path(file: str) -> Path:
    return Path(file) if file.endswith(".py") else Path(*file.split(".")).with_suffix(".py")


def _find(file: str) -> Path | None:
    """The .py file that FILE names, by its path or as a module in the folders that are searched; None where there is none."""
    path = _as_path(file)
    folders = [folder for folder in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if folder]
    # A path that goes up was written for one folder; from another, where a run has recorded it, its name finds it.
    names = [path, Path(path.name)] if ".." in path.parts else [path]
    places = (Path(folder, name) for name in names for folder in [*folders, "."])
    found = next((place for place in places if place.is_file()), None)
    return found.resolve() if found else None


@functools.cache
def _run(path: Path) -> ModuleType:
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with beside(path.parent):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what the file does is the user's: a SystemExit too
        del sys.modules[name]
        raise UserError(described(error, path)) from error
    return module


def _import(file: str) -> ModuleType:
    searched = ", ".join([*filter(None, os.environ.get(SEARCH_PATH, "").split(os.pathsep)), str(Path.cwd())])
    if file.endswith(".py") or not all(part.isidentifier() for part in file.split(".")):
        raise UserError(f"there is no file {file} (looked in {searched})")
    try:
        return importlib.import_module(file)
    except ModuleNotFoundError as error:
        if error.name and (file == error.name or file.startswith(f"{error.name}.")):
            raise UserError(
                f"there is no {file.replace('.', '/')}.py in {searched}, and no module of that name"
            ) from None
        raise UserError(described(error, Path(file))) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(described(error, Path(file))) from error


def described(error: BaseException, path: Path) -> str:
    """An error that a user's file raised in one line: FILE:LINE: what was raised."""
    place, line = str(path), None
    if isinstance(error, SyntaxError) and error.lineno is not None:
        place, line = error.filename or place, error.lineno
    else:
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
        line = frames[-1] if frames else None
    said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    what = said if isinstance(error, UserError) else f"{type(error).__name__}{f': {said}' if said else ''}"
    return f"{place}{f':{line}' if line else ''}: {what}"


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Context in which a file can import its neighbours, as a script can."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
