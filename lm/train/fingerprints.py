"""Fingerprints of what a run reads and does not keep in its own folder: data, weights, models of other runs, files, functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lm.config.field import WITH_FILE
from lm.data.sources import load_rows, rows_of
from lm.experiment import COLLECTED, Experiment, reward_names
from lm.interop.peft import CONFIG, WEIGHTS
from lm.open_weights import fingerprint, names_weights
from lm.stored import file_sha256
from lm.train.checkpoint import Checkpoints
from lm.train.run_folder import RunFolder
from lm.user_functions import check_functions


def fingerprints(experiment: Experiment) -> dict[str, str]:
    """SHA-256 by name: of every source of stages and evals, of open weights and of reward models and teachers of other runs
    (RUN:STAGE), of files that verifiers and environments read (endpoint:FILE), and of user functions' files (FILE:FUNCTION).

    Raises:
        UserError: one cannot be read.
    """
    functions = {name: found["sha256"] for name, found in check_functions(experiment).items()}
    models = {name: _model_of_other_run(name, role) for name, role in _models_of_other_runs(experiment)}
    return _data(experiment) | _weights(experiment) | models | _files(experiment) | functions


def function_files(experiment: Experiment) -> dict[str, str]:
    """The path of each user function's file, by FILE:FUNCTION."""
    return {name: found["file"] for name, found in check_functions(experiment).items()}


def _data(experiment: Experiment) -> dict[str, str]:
    sources = [source for stage in experiment.stages for source in stage.sources]
    read = {source.path: source for source in [*sources, *(item.source for item in experiment.evals)]}
    return {
        path: rows_of(source).fingerprint for path, source in sorted(read.items()) if not path.startswith(COLLECTED)
    }


def initial_weights(experiment: Experiment) -> dict[str, str]:
    """SHA-256 by name of the open weights, and of the adapter on them, that a run begins with."""
    weights = {experiment.init: fingerprint(experiment.init)} if experiment.init else {}
    if experiment.adapter:
        folder = Path(experiment.adapter).expanduser()
        weights |= {
            experiment.adapter: file_sha256(folder / WEIGHTS),
            f"{experiment.adapter}/{CONFIG}": file_sha256(folder / CONFIG),
        }
    return weights


def _weights(experiment: Experiment) -> dict[str, str]:
    teachers = {stage.objective.teacher_name for stage in experiment.stages}
    return initial_weights(experiment) | {name: fingerprint(name) for name in sorted(filter(names_weights, teachers))}


def _models_of_other_runs(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(RUN:STAGE, role of the model) of every reward model and teacher that another run has trained."""
    for stage in experiment.stages:
        teacher = stage.objective.teacher_name
        yield from ((name, "reward") for name in reward_names(stage) if ":" in name)
        if ":" in teacher and not names_weights(teacher):
            yield teacher, "policy"


def _model_of_other_run(name: str, role: str) -> str:
    """The fingerprint of the checkpoint that is read: the last of a finished stage, else the newest."""
    run, _, stage = name.rpartition(":")
    folder = RunFolder(Path(run))
    with Checkpoints(folder.checkpoints(stage)) as checkpoints:
        return checkpoints.fingerprint(role, folder.final_step(stage))


def _files(experiment: Experiment) -> dict[str, str]:
    """Those of the files that are there: a stage or an eval that needs another one says so."""
    objectives = [stage.objective for stage in experiment.stages]
    names = {name for o in objectives for name in (*o.verifier_names, o.environment_name)}
    names |= {name for item in experiment.evals for name in (item.verifier, item.environment)}
    named = {name: Path(name.partition(":")[2]) for name in sorted(names) if name.partition(":")[0] in WITH_FILE}
    return {
        name: file_sha256(path) if path.is_file() else load_rows(str(path)).fingerprint
        for name, path in named.items()
        if path.exists() and name.partition(":")[2]
    }
