"""A run: its stages one after another, each from the model that the one before left; and a finished run, loaded."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm.check import check
from lm.data.pipeline import check_sources, tokenizer_texts
from lm.data.selection import check_files
from lm.data.sources import load_rows
from lm.data.tokenizer import FILE_NAME, Tokenizer
from lm.experiment import Experiment, Preference, UserError, from_dict, resolve_sources, to_dict
from lm.model.transformer import Transformer
from lm.parallel.distributed import as_first, first, in_first, together
from lm.parallel.mesh import check_fits, make_mesh
from lm.parallel.rules import abstract, shardings
from lm.rollout.environments import check_verifier
from lm.train.agreement import check_same, check_same_data, check_shared
from lm.train.batches import Batches, make_batches
from lm.train.checkpoint import Checkpoints
from lm.train.evaluate import Evaluator
from lm.train.loop import Interrupted, Run, train_stage
from lm.train.provenance import record_environment
from lm.train.run_folder import RunFolder
from lm.train.signals import stop_on_signals
from lm.train.watchdog import PATIENCE, Watchdog


def run(
    experiment: Experiment,
    run_dir: Path,
    fresh: bool = False,
    until: str | None = None,
    profile: tuple[int, int] | None = None,
    watchdog: float | None = None,
    after_stage: Callable[[Path], Any] = lambda run_dir: None,
) -> None:
    """Train all stages that are not finished yet, up to and with `until`. Every process of a job calls it alike.

    Args:
        fresh: set a folder that is already there aside, and begin anew.
        profile: steps of every stage to trace, from and before which, counted from 1.
        watchdog: seconds after which a step that has not come ends the process; None: never.
        after_stage: called with the folder when a stage is finished.

    Raises:
        UserError: whatever in the experiment, its data or the folder the user can put right.
        Interrupted: a signal came; the state is saved.
    """
    started = time.monotonic()
    experiment, last = together(lambda: _checked(experiment, until))
    check_same(experiment, {"fresh": fresh, "until": until, "profile": profile})
    folder = RunFolder(run_dir)
    mesh = together(lambda: _whole_mesh(experiment))
    if fresh:
        in_first(folder.set_aside)
    with contextlib.ExitStack() as inside:
        in_first(lambda: inside.enter_context(folder.lock()))
        stop = inside.enter_context(stop_on_signals())
        dog = inside.enter_context(Watchdog(watchdog))
        inside.enter_context(jax.set_mesh(mesh))
        check_shared(folder)
        in_first(lambda: folder.claim(to_dict(experiment)))
        say("reading the data")
        tokenizer = in_first(lambda: make_tokenizer(experiment, folder.tokenizer)) or Tokenizer.load(folder.tokenizer)
        together(lambda: check_fits(experiment, dict(mesh.shape), tokenizer.vocab_size))
        in_first(lambda: record_environment(folder, fingerprints(experiment)))
        context = Run(experiment, folder, tokenizer, mesh, stop, dog, started, profile)
        stages = as_first(lambda: [i for i in range(last + 1) if not folder.finished(experiment.stages[i].name)])
        batches = together(lambda: _all_batches(context, stages))
        check_same_data({experiment.stages[i].name: batches[i].fingerprint for i in stages})
        began = started
        for index in stages:
            name = experiment.stages[index].name
            if reason := stop.now():
                raise Interrupted(f"{reason}: stopped before stage {name}")
            dog.expect(f"the start of stage {name}", PATIENCE)
            model = model_before(experiment, folder, tokenizer, mesh, index)
            evaluator = make_evaluator(experiment, folder, tokenizer, mesh, index)
            train_stage(context, index, batches.pop(index), model, evaluator, began)
            began = time.monotonic()
            after_stage(folder.path)


def _checked(experiment: Experiment, until: str | None) -> tuple[Experiment, int]:
    """The experiment with its sources resolved, and the index of the last stage to train; before anything slow."""
    experiment = resolve_sources(experiment)
    check(experiment)
    last = check_until(experiment, until)
    check_sources(experiment)
    check_files(experiment)
    for item in experiment.evals:
        check_verifier(item.verifier, f"evals.{item.name}.verifier")
    return experiment, last


def _whole_mesh(experiment: Experiment) -> Mesh:
    """The mesh of the experiment, in which every process has devices.

    Raises:
        UserError: the mesh does not fit the devices, or leaves a process without any.
    """
    mesh = make_mesh(experiment.mesh)
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise UserError(
            f"the mesh takes {mesh.size} of {jax.device_count()} devices and leaves none of process {min(idle)}'s: "
            "mesh.data -1 takes them all, or start fewer processes"
        )
    return mesh


def _all_batches(run: Run, stages: list[int]) -> dict[int, Batches]:
    """The data of every stage, read now: what is wrong with the last one's shows before the first is trained."""
    batches = {}
    for index in stages:
        batches[index] = make_batches(run.experiment, index, run.tokenizer, run.mesh)
        name = run.experiment.stages[index].name
        say("\n".join(f"{name}: {line}" for line in batches[index].report.splitlines()))
    return batches


def check_until(experiment: Experiment, stage: str | None) -> int:
    """Index of the stage of that name (None: the last).

    Raises:
        UserError: there is none.
    """
    names = [s.name for s in experiment.stages]
    if stage is None:
        return len(names) - 1
    if stage not in names:
        raise UserError(f"no stage {stage!r}; the stages are {', '.join(names)}")
    return names.index(stage)


def make_tokenizer(experiment: Experiment, folder: Path) -> Tokenizer:
    """The run's vocabulary: the one kept in `folder`, the file that the experiment names, or learnt now; kept there.

    Every stage's training text has a share, so that its words are pieces.
    """
    if (folder / FILE_NAME).is_file():
        return Tokenizer.load(folder)
    if experiment.tokenizer.path is not None:
        tokenizer = Tokenizer.load(experiment.tokenizer.path)
        tokenizer.save(folder)
        return tokenizer
    return Tokenizer.train(tokenizer_texts(experiment), experiment.tokenizer.vocab_size, folder)


def say(text: str) -> None:
    """A line for people, from one process of many."""
    if first():
        print(text, flush=True)


def fingerprints(experiment: Experiment) -> dict[str, str]:
    """SHA-256 of every source's content, by path."""
    return {source.path: load_rows(source.path).fingerprint for stage in experiment.stages for source in stage.sources}


def init_model(experiment: Experiment, vocab_size: int, mesh: Mesh) -> Transformer:
    """The random model of the experiment's seed, born sharded."""
    make = functools.partial(_init, experiment, vocab_size)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def _init(experiment: Experiment, vocab_size: int) -> Transformer:
    return Transformer(experiment.model, vocab_size, jax.random.key(experiment.seed))


def model_before(
    experiment: Experiment, folder: RunFolder, tokenizer: Tokenizer, mesh: Mesh, index: int
) -> Transformer:
    """The model that enters stage `index`: random, or what the stage before left."""
    if index == 0:
        return init_model(experiment, tokenizer.vocab_size, mesh)
    return load_model(experiment, folder, tokenizer, mesh, experiment.stages[index - 1].name)


def load_model(experiment: Experiment, folder: RunFolder, tokenizer: Tokenizer, mesh: Mesh, stage: str) -> Transformer:
    """The newest sound checkpoint of a stage.

    Raises:
        UserError: the stage has none.
    """
    wanted = abstract(jax.eval_shape(functools.partial(_init, experiment, tokenizer.vocab_size)), mesh)
    with Checkpoints(folder.stage_folder(stage) / "checkpoints") as checkpoints:
        found = checkpoints.restore({"params": wanted})
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint of stage {stage!r} yet: `lm run` trains it")
    return found.items["params"]


def make_evaluator(
    experiment: Experiment, folder: RunFolder, tokenizer: Tokenizer, mesh: Mesh, index: int
) -> Evaluator:
    """The evaluator of stage `index`; preferences are compared with the model that entered the first preference stage."""
    first = next((i for i, stage in enumerate(experiment.stages) if isinstance(stage.objective, Preference)), None)

    @functools.cache
    def reference() -> Transformer | None:
        if first is None or first > index:
            return None
        return model_before(experiment, folder, tokenizer, mesh, first)

    return Evaluator(experiment, folder, tokenizer, reference)


@dataclass(frozen=True)
class Loaded:
    """A run's model after one of its stages, with what is needed to use it."""

    experiment: Experiment
    tokenizer: Tokenizer
    model: Transformer
    mesh: Mesh
    stage: str


def load_run(run_dir: Path, stage: str | None = None) -> Loaded:
    """The model of a run after `stage` (None: the last that has a checkpoint), on this machine's devices.

    Raises:
        UserError: not a run's folder, no such stage, or nothing trained yet.
    """
    folder = RunFolder(run_dir)
    experiment = from_dict(folder.read_experiment())
    # A run from a larger machine is looked at on this one.
    mesh = make_mesh(type(experiment.mesh)(data=1))
    tokenizer = Tokenizer.load(folder.tokenizer)
    if stage is None:
        trained = [
            s.name for s in experiment.stages if Checkpoints(folder.stage_folder(s.name) / "checkpoints").steps()
        ]
        if not trained:
            raise UserError(f"{run_dir} has no checkpoint yet: `lm run` trains it")
        stage = trained[-1]
    check_until(experiment, stage)
    return Loaded(experiment, tokenizer, load_model(experiment, folder, tokenizer, mesh, stage), mesh, stage)


def evaluate_run(run_dir: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The held-out numbers again, from a checkpoint: lines as in eval.jsonl."""
    loaded = load_run(run_dir, stage)
    index = check_until(loaded.experiment, loaded.stage)
    evaluator = make_evaluator(loaded.experiment, RunFolder(run_dir), loaded.tokenizer, loaded.mesh, index)
    step = Checkpoints(RunFolder(run_dir).checkpoints(loaded.stage)).steps()[-1]
    lines = []
    for item in loaded.experiment.evals:
        lines += [line for line, _ in evaluator.lines(item, loaded.model, step, "after")]
    return lines
