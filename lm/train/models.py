"""Loads the models of a run: initial weights, a stage's checkpoint, the model that enters a stage, reward models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh as DeviceMesh

from lm import open_weights
from lm.algorithms.table import abstract_state
from lm.config.objective import ObjectiveConfig
from lm.data.text_tokenizer import TextTokenizer
from lm.data.vocabulary import load_tokenizer, named_tokenizer, same_vocabulary
from lm.experiment import (
    COLLECTED,
    Experiment,
    Mesh,
    Model,
    Source,
    Stage,
    UserError,
    from_dict,
    reward_names,
    start_of,
)
from lm.files import is_open_weights
from lm.interop.export import family_of
from lm.interop.origin import Origin
from lm.interop.peft import read_adapter
from lm.model.heads import Scorer
from lm.model.lora import adapted, base_of, freeze_adapter, has_adapter, without_base
from lm.model.quantised import set_base
from lm.model.transformer import Transformer
from lm.open_weights import experiment_on, vocabulary_rows
from lm.parallel.distributed import broadcast_from_main, raise_on_all
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import abstract, shardings
from lm.stored import read_record, write_sealed
from lm.train.base import Known, adapter_stage, base_stage, check_base, read_stored, recorded_base, with_base
from lm.train.checkpoint import Checkpoints, Restored
from lm.train.run_folder import RunFolder

NONE_KNOWN: Known = {}
ROWS_FILE = "made.jsonl"  # the rows of a Collect stage, in its folder


def with_collected_paths(experiment: Experiment, folder: RunFolder) -> Experiment:
    """The experiment with every source `collected:STAGE` replaced by the file that the stage writes in this folder."""

    def here(source: Source) -> Source:
        if not source.path.startswith(COLLECTED):
            return source
        return replace(source, path=str(folder.stage_folder(source.path.removeprefix(COLLECTED)) / ROWS_FILE))

    stages = tuple(replace(stage, sources=tuple(map(here, stage.sources))) for stage in experiment.stages)
    evals = tuple(replace(item, source=here(item.source)) for item in experiment.evals)
    return replace(experiment, stages=stages, evals=evals)


def is_collected(source: Source) -> bool:
    """Whether a source (of an experiment from `with_collected_paths`) is the file that a Collect stage writes."""
    return source.path.endswith(f"/{ROWS_FILE}")


def inputs_ready(stage: Stage, experiment: Experiment, folder: RunFolder) -> bool:
    """Whether all Collect stages whose rows the stage (of an experiment from `with_collected_paths`) reads are finished."""
    makers = {str(folder.stage_folder(s.name) / ROWS_FILE): s.name for s in experiment.stages}
    return all(folder.finished(makers[source.path]) for source in stage.sources if source.path in makers)


def init_model(experiment: Experiment, tokenizer: TextTokenizer, mesh: DeviceMesh) -> Transformer:
    """The model that a run begins with, in its shardings: its open weights, else random by the experiment's seed."""
    if experiment.init:
        return raise_on_all(lambda: open_weights.read(experiment, mesh))
    make = functools.partial(_init, experiment, tokenizer.vocab_size)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def _init(experiment: Experiment, vocab_size: int) -> Transformer:
    return open_weights.with_adapter(
        experiment, Transformer(experiment.model, vocab_size, jax.random.key(experiment.seed))
    )


def check_trained_parts(experiment: Experiment) -> None:
    """Raise UserError for a stage whose `trainable` patterns match no parameter or leave nothing to train."""
    for stage in experiment.stages:
        if stage.trainable or stage.lora.targets:
            abstract_state(stage, optax.identity(), experiment.model, 1)


def model_before(
    experiment: Experiment,
    folder: RunFolder,
    tokenizer: TextTokenizer,
    mesh: DeviceMesh,
    index: int,
    known: Known = NONE_KNOWN,
    base: str = "model",
) -> tuple[Transformer, str]:
    """The model that enters stage `index`: that of the stage it starts from, or the run's initial model.

    Args:
        base: storage of open weights (see `LoRA.base`), converted while they are read; other weights stay unchanged.

    Returns:
        the model, and the fingerprint of its base; "" if it still has to be computed.
    """
    start = start_of(experiment, index)
    return _model_of(experiment, folder, tokenizer, mesh, start, known, base)


def _model_of(
    experiment: Experiment,
    folder: RunFolder,
    tokenizer: TextTokenizer,
    mesh: DeviceMesh,
    index: int | None,
    known: Known = NONE_KNOWN,
    base: str = "model",
) -> tuple[Transformer, str]:
    if index in known and not _lora_before(experiment, index):
        return base_of(known[index]), ""
    if index is not None:
        found = _load(experiment, folder, tokenizer, mesh, experiment.stages[index].name, known, base)
        return found.items["policy"], found.meta.get("base", "")
    if base == "model" or not experiment.init or experiment.adapter:  # an adapter may need the original weights
        return init_model(experiment, tokenizer, mesh), ""
    return raise_on_all(lambda: read_stored(experiment, mesh, base))


def _lora_before(experiment: Experiment, index: int | None) -> bool:
    """Whether a model has factors: its stage, or one before it, trained an adapter."""
    return adapter_stage(experiment, index) is not None or bool(experiment.adapter)


def load_model(
    experiment: Experiment,
    folder: RunFolder,
    tokenizer: TextTokenizer,
    mesh: DeviceMesh,
    stage: str,
    known: Known = NONE_KNOWN,
) -> Transformer:
    """Load a stage's language model: of the last step if the stage is finished, else of the newest intact checkpoint.

    Raises:
        UserError: the stage has no checkpoint, or its last one, or the base of its adapter, is damaged.
    """
    return _load(experiment, folder, tokenizer, mesh, stage, known).items["policy"]


def _load(
    experiment: Experiment,
    folder: RunFolder,
    tokenizer: TextTokenizer,
    mesh: DeviceMesh,
    stage: str,
    known: Known = NONE_KNOWN,
    base: str = "model",
) -> Restored:
    index = stage_index(experiment, stage)
    policy = jax.eval_shape(lambda: _traced(experiment, vocabulary_rows(experiment, tokenizer), index))
    return _restore((experiment, folder, tokenizer, mesh), index, "policy", policy, lambda model: model, known, base)


def _traced(experiment: Experiment, vocab_size: int, index: int | None) -> Transformer:
    """A new language model with the structure of the one that stage `index` trains."""
    if index is None:
        return _init(experiment, vocab_size)
    before = freeze_adapter(_traced(experiment, vocab_size, start_of(experiment, index)))
    return adapted(before, experiment.stages[index], jax.random.key(0), "policy")


def load_scorer(
    experiment: Experiment,
    folder: RunFolder,
    tokenizer: TextTokenizer,
    mesh: DeviceMesh,
    stage: str,
    known: Known = NONE_KNOWN,
) -> Scorer:
    """Load a stage's reward model: of the last step if the stage is finished, else of the newest intact checkpoint.

    Raises:
        UserError: there is no such stage, it trains no reward model, or it has no checkpoint.
    """
    layers = _scorer_stage(experiment, folder, stage).trained_model(experiment.model).num_layers
    index = stage_index(experiment, stage)

    def make() -> Scorer:
        before = _traced(experiment, vocabulary_rows(experiment, tokenizer), start_of(experiment, index))
        new = Scorer(freeze_adapter(before), jax.random.key(0), layers)
        return adapted(new, experiment.stages[index], jax.random.key(0), "reward")

    run, like = (experiment, folder, tokenizer, mesh), jax.eval_shape(make)
    return _restore(run, index, "reward", like, lambda base: Scorer(base, None, layers), known).items["reward"]


def scorers_for(
    experiment: Experiment,
    folder: RunFolder,
    tokenizer: TextTokenizer,
    mesh: DeviceMesh,
    names: tuple[str, ...],
    known: Known = NONE_KNOWN,
) -> tuple[Scorer, ...]:
    """Load reward models by name: STAGE of this run, or RUN:STAGE of another run's folder.

    Raises:
        UserError: there is no such reward model, or it has another tokenizer than this run.
    """
    found = []
    for name in names:
        run, _, stage = name.rpartition(":")
        if run:
            other = RunFolder(Path(run))
            found.append(load_scorer(_experiment_with_same_tokenizer(name, tokenizer), other, tokenizer, mesh, stage))
        else:
            found.append(load_scorer(experiment, folder, tokenizer, mesh, stage, known))
    return tuple(found)


def check_reward_models(experiment: Experiment, tokenizer: TextTokenizer) -> None:
    """Check the reward models that the experiment takes from other runs, before anything is trained.

    Raises:
        UserError: there is no such run or stage, it has no checkpoint, or its tokenizer is not this run's.
    """
    for name in dict.fromkeys(name for stage in experiment.stages for name in reward_names(stage) if ":" in name):
        run, _, stage = name.rpartition(":")
        _scorer_stage(_experiment_with_same_tokenizer(name, tokenizer), RunFolder(Path(run)), stage)
        if not Checkpoints(RunFolder(Path(run)).checkpoints(stage)).steps():
            raise UserError(f"{run} has no checkpoint of stage {stage!r} yet: `lm run` trains it")


def _experiment_with_same_tokenizer(name: str, tokenizer: TextTokenizer) -> Experiment:
    """The experiment of the run of a reward model RUN:STAGE. Raises UserError unless it has the same tokenizer."""
    other = RunFolder(Path(name.rpartition(":")[0]))
    experiment = from_dict(other.read_experiment())
    theirs = load_tokenizer(other.tokenizer)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the reward model {name} has another tokenizer ({theirs.vocab_size} pieces) than this run "
            f"({tokenizer.vocab_size}): its scores would be meaningless; use its tokenizer for this run, "
            f"--tokenizer.path {other.tokenizer}"
        )
    return experiment


def _scorer_stage(experiment: Experiment, folder: RunFolder, stage: str) -> ObjectiveConfig:
    kinds = {s.name: s.objective for s in experiment.stages}
    found = kinds.get(stage)
    if found is None or found.produces != "scorer":
        trained = ", ".join(name for name, kind in kinds.items() if kind.produces == "scorer") or "none"
        raise UserError(f"{folder.path} has no reward model {stage!r}; its stages of reward models are {trained}")
    return found


def load_teacher(
    experiment: Experiment,
    folder: RunFolder,
    tokenizer: TextTokenizer,
    mesh: DeviceMesh,
    stage: Stage,
    known: Known = NONE_KNOWN,
) -> Transformer | None:
    """Load the model that a stage learns from: a stage of this run or of another, or open weights; None if it names none.

    Raises:
        UserError: there is no such model, or it has another vocabulary than this run.
    """
    name = stage.objective.teacher_name
    if not name:
        return None
    other, (run, _, last) = check_teacher(stage, tokenizer, experiment.model), name.rpartition(":")
    if other is None:
        return load_model(experiment, folder, tokenizer, mesh, name, known)
    if other.init == name:
        return open_weights.read(other, mesh)
    return load_model(other, RunFolder(Path(run)), load_tokenizer(RunFolder(Path(run)).tokenizer), mesh, last)


def check_teacher(stage: Stage, tokenizer: TextTokenizer, like: Model) -> Experiment | None:
    """The experiment of a teacher that is not of this run, checked before anything is trained; None for others.

    Args:
        like: the model of this run, as which open weights run.

    Raises:
        UserError: there is no such run, stage or folder, or it has another vocabulary or a shorter context than the stage.
    """
    name, where = stage.objective.teacher_name, f"{stage.name}.objective.teacher is {stage.objective.teacher_name}"
    run, _, last = name.rpartition(":")
    if open_weights.names_weights(name):
        found = experiment_on(name, stage.seq_len, like)
        theirs = named_tokenizer(found.tokenizer)
    elif run:
        folder = RunFolder(Path(run))
        found, theirs = from_dict(folder.read_experiment()), load_tokenizer(folder.tokenizer)
        speaks = [s.name for s in found.stages if s.objective.produces == "policy"]
        if last not in speaks:
            raise UserError(f"{where}; the stages of {run} that train a language model are {', '.join(speaks)}")
        if not Checkpoints(folder.checkpoints(last)).steps():
            raise UserError(f"{where}; {run} has no checkpoint of stage {last!r} yet: `lm run` trains it")
    else:
        return None
    if not same_vocabulary(theirs, tokenizer):
        raise UserError(
            f"{where}, whose vocabulary of {theirs.vocab_size} tokens is not that of this run, {tokenizer.vocab_size} tokens: their "
            "distributions cannot be compared; use its tokenizer for this run, tokenizer.path"
        )
    if found.model.max_len < stage.seq_len:
        raise UserError(
            f"{where}, whose context is {found.model.max_len} tokens: {stage.name}.seq_len {stage.seq_len} should be at most that"
        )
    return found


def scorers_before(
    experiment: Experiment,
    folder: RunFolder,
    tokenizer: TextTokenizer,
    mesh: DeviceMesh,
    index: int,
    known: Known = NONE_KNOWN,
) -> tuple[Scorer, ...]:
    """The reward models that stage `index` reads; if none, the last one trained before it (for evals), if any."""
    names = reward_names(experiment.stages[index])
    earlier = [s.name for s in experiment.stages[: index + 1] if s.objective.produces == "scorer"]
    ready = broadcast_from_main(lambda: [name for name in earlier if folder.finished(name)])
    return scorers_for(experiment, folder, tokenizer, mesh, names or tuple(ready[-1:]), known)


def _restore(
    run: tuple[Experiment, RunFolder, TextTokenizer, DeviceMesh],
    index: int,
    role: str,
    like: Transformer | Scorer,
    of_base: Callable[[Transformer], Transformer | Scorer],
    known: Known,
    base: str = "model",
) -> Restored:
    """Restore a stage's model: from its last step if the stage is finished, else from its newest intact checkpoint.

    Args:
        like: the model as shapes.
        of_base: what the base of an adapter, which other files have, becomes in it.
        base: how open weights are stored that are the base (`model_before`).
    """
    (experiment, folder, tokenizer, mesh), stage = run, run[0].stages[index]
    final = broadcast_from_main(lambda: folder.final_step(stage.name))
    with Checkpoints(folder.checkpoints(stage.name)) as checkpoints:
        found = checkpoints.restore({role: abstract(without_base(like), mesh)}, only=final)
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint of stage {stage.name!r} yet: `lm run` trains it")
    check_tokenizer(found.meta, tokenizer, folder, stage.name)
    if not has_adapter(like):
        return found
    at, meta = base_stage(experiment, index), found.meta
    if at in known:  # this session has checked it, and it may be quantised
        model = known[at]
    else:
        model, fingerprint = _model_of(*run, at, base=base)
        recorded = recorded_base(stage, model, fingerprint)
        check_base(experiment, index, meta, recorded)
        meta = meta | recorded
    return replace(found, items={role: with_base(found.items[role], of_base(model))}, meta=meta)


def check_tokenizer(meta: dict[str, Any], tokenizer: TextTokenizer, folder: RunFolder, stage: str) -> None:
    """Raise UserError if a checkpoint's `meta` names another tokenizer (checkpoints of older versions name none)."""
    theirs = meta.get("tokenizer", tokenizer.fingerprint)
    accepted = [note.get("tokenizer") for note in folder.read_environment().get("accepted", ())]
    if tokenizer.fingerprint not in (theirs, *accepted):
        raise UserError(
            f"{folder.tokenizer} is not the tokenizer that stage {stage} was trained with (SHA-256 "
            f"{tokenizer.fingerprint[:16]}, then {theirs[:16]}): put back a copy of it"
        )


def stage_index(experiment: Experiment, stage: str | None) -> int:
    """Index of a stage by name (None: the last).

    Raises:
        UserError: there is no such stage.
    """
    names = [s.name for s in experiment.stages]
    if stage is None:
        return len(names) - 1
    if stage not in names:
        raise UserError(f"no stage {stage!r}; the stages are {', '.join(names)}")
    return names.index(stage)


@dataclass(frozen=True)
class LoadedRun:
    """A run's language model after one of its stages, with its experiment, tokenizer and mesh; open weights have stage ""."""

    experiment: Experiment
    tokenizer: TextTokenizer
    model: Transformer
    mesh: DeviceMesh
    stage: str
    step: int


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
    found = _load(experiment, folder, tokenizer, mesh, stage, base=base)
    model = set_base(found.items["policy"], base, mesh)
    return LoadedRun(experiment, tokenizer, model, mesh, stage, found.step)


def load_reward_model(run_dir: Path, stage: str) -> tuple[TextTokenizer, Scorer] | None:
    """The tokenizer and the reward model of a run's stage, onto one device; None if the stage trains a language model."""
    folder = RunFolder(run_dir)
    experiment = with_collected_paths(from_dict(folder.read_experiment()), folder)
    if experiment.stages[stage_index(experiment, stage)].objective.produces != "scorer":
        return None
    tokenizer, mesh = load_tokenizer(folder.tokenizer), make_mesh(Mesh(data=1))
    return tokenizer, load_scorer(experiment, folder, tokenizer, mesh, stage)


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
    if found := open_weights.origin(experiment.init, experiment.tokenizer.path):
        write_sealed(folder.origin, vars(found))


def origin_of(path: Path) -> Origin | None:
    """The origin of a run's open weights, or of open weights themselves; None for a run from random weights."""
    if is_open_weights(path):
        return open_weights.origin(str(path))
    kept = RunFolder(path).origin
    return Origin(**read_record(kept, {"config": str, "tensors": dict}, {"files": dict})) if kept.exists() else None
