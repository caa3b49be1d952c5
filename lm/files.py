"""Values that Python files define: an experiment, a sweep, by the name of its file below `experiments/`."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import TypeVar

from lm.experiment import Experiment, UserError, from_dict, nearest
from lm.user_functions import beside, search_first, search_recorded

Kind = TypeVar("Kind")


def load(name: str) -> Experiment:
    """The `experiment` that a file defines: a path, or a name or dotted name below `experiments/`; or a run's .json.

    Raises:
        UserError: no such file (lists what is there), or it defines no `experiment`.
    """
    if Path(name).suffix == ".json":
        search_recorded(Path(name).parent)
        try:
            return from_dict(json.loads(Path(name).read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: {getattr(error, 'strerror', None) or f'not JSON: {error}'}") from None
    return defined_in(file_of(name), "experiment", Experiment)


def file_of(name: str) -> Path:
    """The file of a path, or of a name or dotted name below `experiments/`; UserError, with what is there, for none."""
    path = Path(name)
    if path.suffix != ".py":
        path = Path("experiments", *name.removeprefix("experiments.").split(".")).with_suffix(".py")
    if not path.is_file():
        here = (p.relative_to("experiments").with_suffix("").parts for p in Path("experiments").rglob("*.py"))
        names = sorted(map(".".join, here))
        raise UserError(
            f"no experiment file {path}{nearest(name, names)}; experiments/ here has: {', '.join(names) or 'nothing'}"
        )
    return path


def defined_in(path: Path, name: str, kind: type[Kind]) -> Kind:
    """The value `name` of a type that a Python file defines; UserError where it defines none."""
    search_first(path.parent)
    with beside(path.resolve().parent):
        value = runpy.run_path(str(path)).get(name)
    if not isinstance(value, kind):
        raise UserError(f"{path} defines no `{name}` (a value of {kind.__module__}.{kind.__name__})")
    return value
