"""Values that Python files define: an experiment, a sweep, by the name of its file below `experiments/`."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TypeVar

import lm
from lm.changes import read_experiment
from lm.experiment import Experiment, UserError, from_dict, nearest
from lm.stored import read_json
from lm.user_functions import beside, search_first, search_recorded

Kind = TypeVar("Kind")
EXPERIMENTS = (Path("experiments"), Path(lm.__file__).resolve().parent.parent / "experiments")
"""Where names are looked for: in the current folder, then beside the package, where that is a clone."""


def load(name: str) -> Experiment:
    """The `experiment` that a file defines: a path, or a name or dotted name below `experiments/`; or a run's .json.

    Raises:
        UserError: no such file (lists what is there), or it defines no `experiment`.
    """
    if Path(name).suffix == ".json":
        search_recorded(Path(name).parent)
        file = Path(name)
        return from_dict(read_experiment(file.parent) if file.name == "experiment.json" else read_json(file))
    return defined_in(file_of(name), "experiment", Experiment)


def file_of(name: str) -> Path:
    """The file of a path, or of a name or dotted name below `experiments/`, here or of the clone that `lm` is run from.

    Raises:
        UserError: there is none; says what there is.
    """
    if Path(name).suffix == ".py":
        if not Path(name).is_file():
            raise UserError(f"no experiment file {name} (from {Path.cwd()})")
        return Path(name)
    below = Path(*name.removeprefix("experiments.").split(".")).with_suffix(".py")
    found = next((folder / below for folder in EXPERIMENTS if (folder / below).is_file()), None)
    if found is None:
        modules = (path.relative_to(folder).with_suffix("") for folder in EXPERIMENTS for path in folder.rglob("*.py"))
        names = sorted({".".join(module.parts) for module in modules})
        raise UserError(
            f"no experiment {name!r}{nearest(name, names)}; there are {', '.join(names) or 'none'} in "
            f"{' and '.join(map(str, EXPERIMENTS))}; or give the path of a .py file"
        )
    return found


def experiments_folder(name: str) -> Path:
    """A folder below `experiments/`: here, else of the clone that `lm` is run from."""
    return next((folder / name for folder in EXPERIMENTS if (folder / name).is_dir()), EXPERIMENTS[0] / name)


def defined_in(path: Path, name: str, kind: type[Kind]) -> Kind:
    """The value `name` of a type that a Python file defines; UserError where it defines none."""
    search_first(path.parent)
    with beside(path.resolve().parent):
        value = runpy.run_path(str(path)).get(name)
    if not isinstance(value, kind):
        raise UserError(f"{path} defines no `{name}` (a value of {kind.__module__}.{kind.__name__})")
    return value
