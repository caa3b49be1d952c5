"""Loads the language models of a run: initial weights, a stage's checkpoint, the model that enters a stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax
from jax.sharding import Mesh as DeviceMesh

from lm import open_weights
from lm.algorithms.state import abstract_state
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import (
    Experiment,
    UserError,
    start_of,
)
from lm.model.heads import Scorer
from lm.model.lora import adapted, base_of, freeze_adapter, has_adapter, without_base
from lm.model.transformer import Transformer
from lm.open_weights import vocabulary_rows
from lm.parallel.distributed import broadcast_from_main, raise_on_all
from lm.parallel.rules import abstract, shardings
from lm.train.base import Known, adapter_stage, base_stage, check_base, read_stored, recorded_base, with_base
from lm.train.checkpoint import Checkpoints, Restored
from lm.train.fingerprints import initial_weights
from lm.train.resume import differences
from lm.train.run_folder import RunFolder

NONE_KNOWN: Known = {}


@dataclass(frozen=True)
class StoredRun:
    """A run whose models are loaded: its experiment, folder and tokenizer, and the devices that the models go on."""

    experiment: Experiment
    folder: RunFolder
    tokenizer: TextTokenizer
    mesh: DeviceMesh


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
    run: StoredRun,
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
    start = start_of(run.experiment, index)
    if start is None:
        raise_on_all(lambda: check_initial_weights(run))
    return _model_of(run, start, known, base)


def check_initial_weights(run: StoredRun) -> None:
    """Raise UserError if the open weights of a run are not those that it began with, or accepted since."""
    then = run.folder.read_environment().get("began", {}).get("data", {})
    if found := differences({"data": then}, {"data": initial_weights(run.experiment)}):
        raise UserError(f"{run.folder.path}: {'; '.join(found)}; restore the weights of that time")


def _model_of(
    run: StoredRun,
    index: int | None,
    known: Known = NONE_KNOWN,
    base: str = "model",
) -> tuple[Transformer, str]:
    experiment = run.experiment
    if index in known and not _lora_before(experiment, index):
        return base_of(known[index]), ""
    if index is not None:
        found = load_stage(run, experiment.stages[index].name, known, base)
        return found.items["policy"], found.meta.get("base", "")
    if base == "model" or not experiment.init or experiment.adapter:  # an adapter may need the original weights
        return init_model(experiment, run.tokenizer, run.mesh), ""
    return raise_on_all(lambda: read_stored(experiment, run.mesh, base))


def _lora_before(experiment: Experiment, index: int | None) -> bool:
    """Whether a model has factors: its stage, or one before it, trained an adapter."""
    return adapter_stage(experiment, index) is not None or bool(experiment.adapter)


def load_model(
    run: StoredRun,
    stage: str,
    known: Known = NONE_KNOWN,
) -> Transformer:
    """Load a stage's language model: of the last step if the stage is finished, else of the newest checkpoint.

    Raises:
        UserError: the stage has no checkpoint, or its last one, or the base of its adapter, is damaged.
    """
    return load_stage(run, stage, known).items["policy"]


def load_stage(
    run: StoredRun,
    stage: str,
    known: Known = NONE_KNOWN,
    base: str = "model",
) -> Restored:
    """A stage's language model as `load_model` loads it, with its step and what its checkpoint records.

    Args:
        base: how open weights are stored that are the base (`model_before`).
    """
    index = stage_index(run.experiment, stage)
    policy = jax.eval_shape(lambda: traced_model(run, index))
    return restore_model(run, index, "policy", policy, lambda model: model, known, base)


def traced_model(run: StoredRun, index: int | None) -> Transformer:
    """A new language model with the structure of the one that stage `index` trains (None: that the run begins with)."""
    experiment = run.experiment
    if index is None:
        return _init(experiment, vocabulary_rows(experiment, run.tokenizer))
    before = freeze_adapter(traced_model(run, start_of(experiment, index)))
    return adapted(before, experiment.stages[index], jax.random.key(0), "policy")


def restore_model(
    run: StoredRun,
    index: int,
    role: str,
    like: Transformer | Scorer,
    of_base: Callable[[Transformer], Transformer | Scorer],
    known: Known,
    base: str = "model",
) -> Restored:
    """Restore a stage's model: from its last step if the stage is finished, else from its newest checkpoint.

    Args:
        like: the model as shapes.
        of_base: what the base of an adapter, which other files have, becomes in it.
        base: how open weights are stored that are the base (`model_before`).
    """
    folder, stage = run.folder, run.experiment.stages[index]
    final = broadcast_from_main(lambda: folder.final_step(stage.name))
    with Checkpoints(folder.checkpoints(stage.name)) as checkpoints:
        found = checkpoints.restore({role: abstract(without_base(like), run.mesh)}, only=final, skip=False)
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint of stage {stage.name!r} yet: `lm run` trains it")
    check_tokenizer(found.meta, run.tokenizer, folder, stage.name)
    if not has_adapter(like):
        return found
    at, meta = base_stage(run.experiment, index), found.meta
    if at in known:  # this session has checked it, and it may be quantised
        model = known[at]
    else:
        model, fingerprint = _model_of(run, at, base=base)
        recorded = recorded_base(stage, model, fingerprint)
        check_base(run.experiment, index, meta, recorded)
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
