"""Loads the models that distillation learns from: of the run itself, of another one, or open weights."""

from __future__ import annotations

from pathlib import Path

from lm import open_weights
from lm.data.text_tokenizer import TextTokenizer
from lm.data.vocabulary import load_tokenizer, named_tokenizer, same_vocabulary
from lm.experiment import (
    Experiment,
    Model,
    Stage,
    UserError,
    from_dict,
)
from lm.model.transformer import Transformer
from lm.open_weights import experiment_on
from lm.train.base import Known
from lm.train.checkpoint import Checkpoints
from lm.train.models import NONE_KNOWN, StoredRun, load_model
from lm.train.run_folder import RunFolder


def load_teacher(
    run: StoredRun,
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
    other = check_teacher(stage, run.tokenizer, run.experiment.model)
    if other is None:
        return load_model(run, name, known)
    if other.init == name:
        return open_weights.read(other, run.mesh)
    path, _, last = name.rpartition(":")
    folder = RunFolder(Path(path))
    return load_model(StoredRun(other, folder, load_tokenizer(folder.tokenizer), run.mesh), last)


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
