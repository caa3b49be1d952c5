"""Loads experiments and sweeps from Python files, by path or by name below `experiments/`."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, TypeVar

import lm
from lm.changes import stored_experiment
from lm.config.field import shown
from lm.experiment import Experiment, UserError, from_dict, nearest, strict
from lm.stored import read_json
from lm.user_functions import beside, described, search_first, search_recorded

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
        return from_dict(stored_experiment(file.parent) if file.name == "experiment.json" else read_json(file))
    return strict(defined_in(file_of(name), "experiment", Experiment))


def file_of(name: str) -> Path:
    """The file of a path, or of a name or dotted name below `experiments/`, here or of the clone that `lm` is run from.

    Raises:
        UserError: there is none; says what there is.
    """
    if Path(name).suffix == ".py":
        if not Path(name).is_file():
            raise UserError(f"no experiment file {name} (from {Path.cwd()})")
        return Path(name)
    parts = name.removeprefix("experiments.").split(".")
    below = Path(*parts[:-1], f"{parts[-1]}.py")
    found = next((folder / below for folder in EXPERIMENTS if all(parts) and (folder / below).is_file()), None)
    if is_open_weights(Path(name)):
        raise UserError(f"{name} is a published model, not an experiment: name an experiment, and --init {name}")
    if found is None:
        modules = (path.relative_to(folder).with_suffix("") for folder in EXPERIMENTS for path in folder.rglob("*.py"))
        names = sorted({".".join(module.parts) for module in modules})
        raise UserError(
            f"no experiment {name!r}{nearest(name, names)}; there are {', '.join(names) or 'none'} in "
            f"{' and '.join(map(str, EXPERIMENTS))}; or give the path of a .py file"
        )
    return found


def is_open_weights(path: Path) -> bool:
    """Whether a path is of a published model's weights, and not of a run."""
    return path.suffix == ".gguf" or ((path / "config.json").is_file() and not (path / "experiment.json").is_file())


def experiments_folder(name: str) -> Path:
    """A folder below `experiments/`: here, else of the clone that `lm` is run from."""
    return next((folder / name for folder in EXPERIMENTS if (folder / name).is_dir()), EXPERIMENTS[0] / name)


def defined_in(path: Path, name: str, kind: type[Kind]) -> Kind:
    """The value `name`, of a given type, that a Python file defines.

    Raises:
        UserError: the file cannot be read or run (says the line), or defines no such value.
    """
    door = (
        "lm.experiment" if kind.__module__.startswith("lm.config.") else kind.__module__
    )  # where users import it from
    wanted = f"a value of {door}.{kind.__name__}"
    values = run_file(path)
    if name not in values:
        raise UserError(f"{path} defines no `{name}` ({wanted})")
    if type(values[name]) is not kind:
        raise UserError(f"{path}: `{name}` is {shown(values[name])}; it should be {wanted}")
    return values[name]


def run_file(path: Path) -> dict[str, Any]:
    """What a Python file of the user's defines. Whatever it raises, `sys.exit` too, is a UserError with file and line."""
    search_first(path.parent)
    try:
        compile(path.read_bytes(), str(path), "exec")  # runpy would take a compiled file too
        with beside(path.resolve().parent):
            return runpy.run_path(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(described(error, path)) from error
