"""Loads a model as commands and notebooks use it: of a run's stage or open weights, with adapters, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jax.sharding import Mesh as DeviceMesh

from lm import open_weights
from lm.data.text_tokenizer import TextTokenizer
from lm.data.vocabulary import load_tokenizer, named_tokenizer
from lm.experiment import (
    Experiment,
    Mesh,
    UserError,
    from_dict,
)
from lm.files import is_open_weights
from lm.interop.export import family_of
from lm.interop.origin import Origin, stored_origin
from lm.interop.peft import read_adapter
from lm.model.heads import Scorer
from lm.model.quantised import set_base
from lm.model.transformer import Transformer
from lm.open_weights import experiment_on, vocabulary_rows
from lm.parallel.mesh import make_mesh
from lm.stored import write_sealed
from lm.train.checkpoint import Checkpoints
from lm.train.collected import with_collected_paths
from lm.train.models import StoredRun, load_stage, stage_index
from lm.train.run_folder import RunFolder
from lm.train.scorers import load_scorer


@dataclass(frozen=True)
class LoadedRun:
    """A run's language model after one of its stages, with its experiment, tokenizer and mesh; open weights have stage ""."""

    experiment: Experiment
    tokenizer: TextTokenizer
    model: Transformer
    mesh: DeviceMesh
    stage: str
    step: int

    def stored(self, run_dir: Path) -> StoredRun:
        """The run in a folder that this model came from, from which further models of it are loaded."""
        return StoredRun(self.experiment, RunFolder(run_dir), self.tokenizer, self.mesh)


def load_run(run_dir: Path, stage: str | None = None, longest: int | None = None) -> LoadedRun:
    """Load a run's language model after `stage` (None: the last with a checkpoint), or open weights, onto one device.

    Args:
        longest: limit of the context of open weights, in tokens.

    Raises:
        UserError: it is not a run's folder, there is no such stage, or it has no checkpoint yet.
    """
    if is_open_weights(run_dir):
        if stage:
            raise UserError(f"{run_dir} is no run, and has no stage {stage!r}")
        return load_open_weights(experiment_on(str(run_dir), longest))
    folder = RunFolder(run_dir)
    experiment = with_collected_paths(from_dict(folder.read_experiment()), folder)
    # One device, since the run may have used a larger machine.
    mesh = make_mesh(Mesh(data=1))
    tokenizer = load_tokenizer(folder.tokenizer)
    speaks = [s.name for s in experiment.stages if s.objective.produces == "policy"]
    if stage is None:
        trained = [name for name in speaks if folder.finished(name) or Checkpoints(folder.checkpoints(name)).steps()]
        if not trained:
            raise UserError(f"{run_dir} has no checkpoint yet: `lm run` trains it")
        stage = trained[-1]
    index = stage_index(experiment, stage)
    if stage not in speaks:
        raise UserError(f"stage {stage} of {run_dir} trains no language model; those that do are {', '.join(speaks)}")
    base = experiment.stages[index].lora.base
    found = load_stage(StoredRun(experiment, folder, tokenizer, mesh), stage, base=base)
    model = set_base(found.items["policy"], base, mesh)
    return LoadedRun(experiment, tokenizer, model, mesh, stage, found.step)


def load_reward_model(run_dir: Path, stage: str) -> tuple[TextTokenizer, Scorer] | None:
    """The tokenizer and the reward model of a run's stage, onto one device; None if the stage trains a language model."""
    folder = RunFolder(run_dir)
    experiment = with_collected_paths(from_dict(folder.read_experiment()), folder)
    if experiment.stages[stage_index(experiment, stage)].objective.produces != "scorer":
        return None
    tokenizer, mesh = load_tokenizer(folder.tokenizer), make_mesh(Mesh(data=1))
    return tokenizer, load_scorer(StoredRun(experiment, folder, tokenizer, mesh), stage)


def load_adapters(loaded: LoadedRun, run_dir: Path, folders: Sequence[str]) -> dict[str, LoadedRun]:
    """A loaded model with each of several PEFT adapters, by the adapter folder's name; without folders, the model by "".

    Raises:
        UserError: a folder has no adapter for this model, or two folders have the same name.
    """
    found = {"": loaded} if not folders else {}
    for folder in map(Path, folders):
        name = folder.expanduser().resolve().name
        if name in found:
            raise UserError(f"--adapter has two folders named {name}: rename one of them")
        family = family_of(loaded.model, origin_of(run_dir))
        model = read_adapter(folder.expanduser(), loaded.model, family, loaded.mesh)
        found[name] = replace(loaded, model=model)
    return found


def load_open_weights(experiment: Experiment) -> LoadedRun:
    """Load the open weights that an experiment starts from, onto one device of this machine.

    Raises:
        UserError: they cannot be read, or the tokenizer belongs to another model.
    """
    tokenizer = named_tokenizer(experiment.tokenizer)
    vocabulary_rows(experiment, tokenizer)
    mesh = make_mesh(Mesh(data=1))
    return LoadedRun(experiment, tokenizer, open_weights.read(experiment, mesh), mesh, "", 0)


def record_origin(experiment: Experiment, folder: RunFolder) -> None:
    """Save the origin of the run's open weights in its folder, for exports."""
    if not experiment.init or folder.origin.exists():
        return
    write_sealed(folder.origin, vars(open_weights.origin(experiment.init, experiment.tokenizer.path)))


def origin_of(path: Path) -> Origin | None:
    """The origin of a run's open weights, or of open weights themselves; None for a run from random weights.

    Raises:
        UserError: the run's file of it is damaged, or gone.
    """
    if is_open_weights(path):
        return open_weights.origin(str(path))
    folder = RunFolder(path)
    if folder.origin.exists():
        return stored_origin(folder.origin)
    if folder.read_experiment().get("init"):
        raise UserError(f"{folder.origin} is gone: put back a copy of it, or `lm run` writes it again")
    return None
