"""Open weights as initial weights (`Experiment.init`): the fields that they fix, their fingerprint, and the model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh as DeviceMesh

from lm.config.field import flatten, shown
from lm.config.objectives import Objective
from lm.config.rope import longest_sequence
from lm.data.cache import current_cache
from lm.data.text_tokenizer import TextTokenizer
from lm.data.vocabulary import is_tokenizer, named_tokenizer
from lm.experiment import (
    DPO,
    SFT,
    Eval,
    Experiment,
    Mesh,
    Model,
    Pretrain,
    Source,
    Stage,
    Tokenizer,
    UserError,
    to_dict,
)
from lm.interop import gguf, hf
from lm.interop.config import RUNNING
from lm.interop.export import family_of
from lm.interop.origin import Origin, read_origin
from lm.interop.peft import read_adapter
from lm.model.transformer import Transformer

OWN = (*RUNNING, "max_len")
"""Fields of Model that the experiment sets; the weights fix the others."""
DEFAULT_TOKENS = 1024  # tokens of a row of the default experiment, if the context of the weights has as many


@dataclass(frozen=True)
class WeightsFormat:
    """A format of open weights, named by the prefix of `Experiment.init`.

    Attributes:
        describe: returns the model and the number of rows of its embedding, from the metadata alone.
        check: raises UserError unless the tensors are those of the metadata; reads no values.
        read: reads the model, with some of its fields changed, in its shardings.
        files: returns all files that determine the model.
        dtype: returns the narrowest dtype of Model.param_dtype that holds every weight exactly.
        origin: returns the parts of the files that an export of a model trained from them keeps.
    """

    describe: Callable[[Path], tuple[Model, int]]
    check: Callable[[Path], Any]
    read: Callable[..., Transformer]
    files: Callable[[Path], list[Path]]
    dtype: Callable[[Path], Any]
    origin: Callable[..., Origin]


FORMATS: dict[str, WeightsFormat] = {
    name: WeightsFormat(one.describe, one.check, one.read, one.files, one.dtype, origin)
    for name, one, origin in (("hf", hf, read_origin), ("gguf", gguf, gguf.read_origin))
}


def names_weights(name: str) -> bool:
    """Whether a name begins with the prefix of a format of open weights."""
    return name.partition(":")[0] in FORMATS


def normalised(init: str) -> str:
    """`PREFIX:PATH` of open weights; a path without a prefix is a GGUF file if it ends in .gguf, else a folder."""
    if names_weights(init) or not init:
        return init
    return f"gguf:{init}" if init.endswith(".gguf") else f"hf:{init}"


def located(init: str) -> tuple[WeightsFormat, Path]:
    """The format and the path of open weights."""
    prefix, _, path = normalised(init).partition(":")
    return FORMATS[prefix], Path(path).expanduser()


def with_init(experiment: Experiment, said: Container[str] = ()) -> Experiment:
    """The experiment with the model and tokenizer of its open weights; unchanged if it has none.

    Args:
        said: fields set on the command line; other fields count as set if they differ from their defaults.

    Raises:
        UserError: the weights do not exist, or a field is set to another value than that of the weights.
    """
    if not experiment.init:
        if experiment.adapter:
            raise UserError(
                f"adapter is {experiment.adapter}, and init is empty: --init must name the adapter's open weights"
            )
        return experiment
    format, path = located(experiment.init)
    model, rows = format.describe(path)
    fixed, ours, defaults = (
        flatten({"model": to_dict(m), "tokenizer": {"vocab_size": size}})
        for m, size in (
            (model, rows),
            (experiment.model, experiment.tokenizer.vocab_size),
            (Model(), Tokenizer.vocab_size),
        )
    )
    for name, value in ours.items():
        is_set = name in said or value != defaults.get(name)
        if is_set and name.split(".")[1] not in OWN and value != fixed.get(name):
            has = f"should be {shown(fixed[name])}, as" if name in fixed else "does not exist"
            raise UserError(f"{name} is {shown(value)}; it {has} in {path}, whose weights determine it: leave it out")
    longest = longest_sequence(model.max_len, [layer.rope_scaling for layer in model.period])
    kept = {name: getattr(experiment.model, name) for name in RUNNING} | {
        "max_len": _max_len(experiment, longest, "model.max_len" in said, path)
    }
    return dataclasses.replace(
        experiment,
        init=normalised(experiment.init),
        model=dataclasses.replace(model, **kept),
        tokenizer=dataclasses.replace(
            experiment.tokenizer, vocab_size=rows, path=experiment.tokenizer.path or str(path)
        ),
    )


def experiment_on(init: str, longest: int | None = None, like: Model | None = None) -> Experiment:
    """An experiment without stages on open weights, with parameters in the dtype of the files.

    Args:
        longest: limit of the context, in tokens.
        like: a model whose other fields of how a model runs it takes; None: their defaults.
    """
    format, path = located(init)
    model, _ = format.describe(path)
    running = {name: getattr(like or Model(), name) for name in RUNNING} | {"param_dtype": format.dtype(path)}
    own = Model(max_len=min(model.max_len, longest or model.max_len), **running)
    return with_init(Experiment(name="open", stages=(), init=init, model=own), ("model.max_len",))


def _max_len(experiment: Experiment, most: int, said: bool, path: Path) -> int:
    """`max_len`: as set, else the longest stage's if above the default; at most that of the weights."""
    value = experiment.model.max_len
    if not said and value == Model.max_len:
        return min(most, max(value, *(stage.seq_len for stage in experiment.stages), 0))
    if value > most:
        raise UserError(f"model.max_len is {value}; it should be at most {most}, the context of {path}")
    return value


def default_experiment(
    path: Path, said: Mapping[str, str], model: Model | None = None, measured: bool = False
) -> Experiment:
    """The experiment on open weights that stands where a command is given them instead of one.

    It has one stage on generated data: SFT, or pretraining if the weights have a tokenizer without a chat template.

    Args:
        said: overrides, of which those of the tokenizer decide whether there is a chat template.
        model: its settings that the weights leave open; None: those of `Model`, with parameters in the dtype of the files.
        measured: all data is held out, and measured by the eval `heldout`; otherwise all is trained on.
    """
    format, path = located(str(path))
    theirs, _ = format.describe(path)
    length = min(DEFAULT_TOKENS, longest_sequence(theirs.max_len, [layer.rope_scaling for layer in theirs.period]))
    settings = Tokenizer(path=said.get("tokenizer.path", str(path)), chat_template=said.get("tokenizer.chat_template"))
    chats = not is_tokenizer(Path(settings.path or path)) or named_tokenizer(settings).chats
    objective: Objective
    name, objective, data = ("sft", SFT(), "gen:instruct") if chats else ("pretrain", Pretrain(), "gen:docs")
    source = Source(data, holdout=float(measured))
    if measured and chats:  # the stage is not run; after a preference stage there are evals of every kind
        objective = DPO()
    stage = Stage(name, objective, (source,), batch_size=16, seq_len=2 if measured else length)
    return Experiment(
        name="open",
        init=str(path),
        stages=(stage,),
        evals=(Eval("heldout", source, "bits_per_byte", max_new_tokens=min(64, length // 2)),) if measured else (),
        prompts=(),
        mesh=Mesh(data=1, fsdp=-1),
        model=dataclasses.replace(model or Model(param_dtype=format.dtype(path)), max_len=length),
    )


def check_weights(experiment: Experiment) -> None:
    """Raise UserError unless the tensors of the experiment's open weights, and of its adapter, are those of its model."""
    if experiment.init:
        format, path = located(experiment.init)
        format.check(path)
        rows = experiment.tokenizer.vocab_size
        jax.eval_shape(lambda: with_adapter(experiment, Transformer(experiment.model, rows, jax.random.key(0))))


def fingerprint(init: str) -> str:
    """SHA-256 of the files of open weights."""
    format, path = located(init)
    digests = [f"{file.name} {current_cache().digest(file)}" for file in format.files(path)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def origin(init: str, tokenizer: str | None = None) -> Origin:
    """The parts of these weights' files that an export keeps.

    Args:
        tokenizer: path of another tokenizer that the model has.
    """
    format, path = located(init)
    return format.origin(path, Path(tokenizer or path).expanduser())


def read(experiment: Experiment, mesh: DeviceMesh | None, store: hf.Store | None = None) -> Transformer:
    """Read the model of an experiment's open weights, with its adapter.

    Args:
        store: called with each parameter before the next one is read; the model keeps what it returns.

    Raises:
        UserError: the files are missing or cannot be read.
    """
    format, path = located(experiment.init)
    model = format.read(path, mesh, store, **{name: getattr(experiment.model, name) for name in OWN})
    return with_adapter(experiment, model, mesh)


def with_adapter(experiment: Experiment, model: Transformer, mesh: DeviceMesh | None = None) -> Transformer:
    """The model with the factors of the experiment's adapter, if there is one, as those of an earlier stage."""
    if not experiment.adapter:
        return model
    family = family_of(model, origin(experiment.init))
    return read_adapter(Path(experiment.adapter).expanduser(), model, family, mesh)


def vocabulary_rows(experiment: Experiment, tokenizer: TextTokenizer) -> int:
    """Number of rows of the embedding: that of the open weights, else the tokenizer's number of tokens.

    Raises:
        UserError: the tokenizer has more tokens than the open weights have rows.
    """
    if not experiment.init:
        return tokenizer.vocab_size
    rows = experiment.tokenizer.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"tokenizer.path {experiment.tokenizer.path} has {tokenizer.vocab_size} tokens, and the embedding of "
            f"{experiment.init} has {rows}: name the tokenizer of these weights"
        )
    return rows
