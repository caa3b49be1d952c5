"""A run: its stages one after another, each from the model that an earlier one left."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm.check import check, short_warmups
from lm.data.cache import current_cache
from lm.data.pipeline import check_sources, tokenizer_texts
from lm.data.selection import WITHHELD, check_files, held_out_but_trained, held_out_elsewhere, withheld
from lm.data.sources import rows_of
from lm.data.split import Places
from lm.data.tokenizer import FILE_NAME, SubwordTokenizer
from lm.data.vocabulary import train_tokenizer
from lm.evals.examples import spec_of
from lm.experiment import (
    COLLECTED,
    Experiment,
    Stage,
    UserError,
    resolve_sources,
    reward_names,
    strict,
    to_dict,
)
from lm.model.scorer import Scorer
from lm.model.transformer import Transformer
from lm.parallel.distributed import broadcast_from_main, is_main_process, raise_on_all, run_on_main
from lm.parallel.memory import check_memory
from lm.parallel.mesh import check_fits, make_mesh
from lm.rollout.episodes import make_tasks
from lm.train.agreement import check_same, check_same_data, check_shared
from lm.train.batches import Batches
from lm.train.callbacks import listener, load_callbacks
from lm.train.collect import collect_stage
from lm.train.evaluate import Evaluator, check_evals
from lm.train.loop import Interrupted, RunContext, tidy, train_stage
from lm.train.metrics import KINDS, read_lines
from lm.train.models import (
    can_be_read,
    check_reward_models,
    check_trained_parts,
    check_until,
    is_collected,
    load_run,
    located,
    model_before,
    scorers_before,
    scorers_for,
)
from lm.train.provenance import record_environment
from lm.train.resume import beginning, check_beginning, check_collected, check_more_steps, record_beginning
from lm.train.rollouts import make_batches
from lm.train.run_folder import RunFolder
from lm.train.signals import stop_on_signals
from lm.train.trajectory_files import check_trajectories
from lm.train.watchdog import PATIENCE, Watchdog
from lm.user_functions import check_functions, search_recorded


def run(
    experiment: Experiment,
    run_dir: Path,
    fresh: bool = False,
    until: str | None = None,
    profile: tuple[int, int] | None = None,
    watchdog: float | None = None,
    after_stage: Callable[[Path], Any] = lambda run_dir: None,
    callbacks: Sequence[str] = (),
    accept: bool = False,
) -> None:
    """Train all stages that are not finished yet, up to and with `until`. Every process of a job calls it alike.

    Args:
        fresh: set a folder that is already there aside, and begin anew.
        profile: steps of every stage to trace, from and before which, counted from 1.
        watchdog: seconds after which a step that has not come ends the process; None: never.
        after_stage: called with the folder when a stage is finished.
        callbacks: functions of the user's own, FILE:FUNCTION, that process 0 calls with (stage, kind, line) of all that is
            written: see `lm.train.callbacks`.
        accept: go on with other data, tokenizer, collected files or versions than the run began with.

    Raises:
        UserError: whatever in the experiment, its data or the folder the user can put right.
        Interrupted: a signal came; the state is saved.
    """
    started = time.monotonic()
    experiment, last = raise_on_all(lambda: _checked(experiment, until))
    told = raise_on_all(lambda: load_callbacks(callbacks))
    check_same(experiment, {"fresh": fresh, "until": until, "profile": profile, "accept": accept})
    folder = RunFolder(run_dir)
    mesh = raise_on_all(lambda: _whole_mesh(experiment))
    if fresh:
        run_on_main(folder.set_aside)
    with contextlib.ExitStack() as inside:
        run_on_main(lambda: inside.enter_context(folder.lock()))
        stop = inside.enter_context(stop_on_signals())
        dog = inside.enter_context(Watchdog(watchdog))
        inside.enter_context(jax.set_mesh(mesh))
        check_shared(folder)
        run_on_main(lambda: _claim(experiment, folder))
        stages = broadcast_from_main(
            lambda: [i for i in range(last + 1) if not folder.finished(experiment.stages[i].name)]
        )
        tokenizer, held_out = _prepared(experiment, folder, mesh, accept, bool(stages))
        experiment = located(experiment, folder)
        context = RunContext(experiment, folder, tokenizer, mesh, stop, dog, started, profile, told, held_out, accept)
        batches = raise_on_all(lambda: _all_batches(context, stages))
        if stages:
            _tell_evals(context, stages)
        check_same_data({experiment.stages[i].name: made.fingerprint for i, made in batches.items()})
        _train_all(context, stages, batches, after_stage)


def _tell_evals(run: RunContext, stages: list[int]) -> None:
    """Say what the evals measure, and what of it the stages that are finished trained on: evals may be new since then."""
    for line in raise_on_all(lambda: check_evals(run.experiment, run.tokenizer)):
        say(line)
    run_on_main(lambda: _tell_finished(run, run.experiment.stages[: min(stages)]))


def _tell_finished(run: RunContext, stages: tuple[Stage, ...]) -> None:
    for stage in stages:
        if stage.objective.trains:
            counted = run.folder.read_summary(stage.name).get("sources") or [{}] * len(stage.sources)
            for source, then in zip(stage.sources, counted, strict=False):
                left_out = then.get("dropped", {}).get(WITHHELD, 0)
                trained = withheld(source, rows_of(source), run.held_out) - left_out
                if trained > 0:
                    _tell(stage, f"finished, and trained on {trained} rows of {source.path} that are held out now")


def _train_all(
    run: RunContext, stages: list[int], batches: dict[int, Batches], after_stage: Callable[[Path], Any]
) -> None:
    """These stages, one after another."""
    began = run.started
    for index in stages:
        name = run.experiment.stages[index].name
        if reason := run.stop.now():
            raise Interrupted(f"{reason}: stopped before stage {name}")
        run.watchdog.expect(f"the start of stage {name}", PATIENCE)
        _train(run, index, batches.pop(index, None), began)
        began = time.monotonic()
        if is_main_process():
            listener(run.callbacks, name)("summary", run.folder.read_summary(name))
        after_stage(run.folder.path)


def _claim(experiment: Experiment, folder: RunFolder) -> None:
    """Make the folder the experiment's, and remove what a kill left behind in it."""
    names = [stage.name for stage in experiment.stages]
    later = {name: names[place + 1 :] for place, name in enumerate(names)}
    folder.claim(to_dict(experiment), lambda found: check_more_steps(folder, found, later))
    folder.sweep(names)
    current_cache().sweep()
    for stage in experiment.stages:
        for kind in KINDS:  # that they are whole: the report would find it after hours of training
            read_lines(folder.stage_folder(stage.name) / f"{kind}.jsonl")
        check_trajectories(folder.stage_folder(stage.name))
        tidy(folder, stage)


def _prepared(
    experiment: Experiment, folder: RunFolder, mesh: Mesh, accept: bool, trains: bool
) -> tuple[SubwordTokenizer, Places]:
    """The tokenizer, and what sources hold out that others could train on; what they are made of is recorded.

    Args:
        trains: whether anything is left to train, and what the run began with matters.

    Raises:
        UserError: what in the data, the mesh or other runs' reward models does not fit the experiment, or is not what the
            run began with.
    """
    for line in short_warmups(experiment):
        say(line)
    say("reading the data")
    tokenizer = run_on_main(lambda: make_tokenizer(experiment, folder.tokenizer)) or SubwordTokenizer.load(
        folder.tokenizer
    )
    raise_on_all(lambda: check_fits(experiment, dict(mesh.shape), tokenizer.vocab_size))
    raise_on_all(lambda: check_memory(experiment, dict(mesh.shape), tokenizer.vocab_size))

    def record() -> None:
        found = fingerprints(experiment)
        now = beginning(tokenizer, found)
        if trains:
            accepted = check_beginning(folder, now, accept)
            check_collected(experiment, folder, accept)
        record_environment(folder, found, function_files(experiment))
        if trains:
            record_beginning(folder, now, accepted)
        folder.record_finished()

    run_on_main(record)
    raise_on_all(lambda: check_reward_models(experiment, tokenizer))
    return tokenizer, raise_on_all(lambda: held_out_elsewhere(experiment))


def _train(run: RunContext, index: int, batches: Batches | None, began: float) -> None:
    """One stage, from the models that it needs. `batches` is None for what could not be read before."""
    where = run.experiment, run.folder, run.tokenizer, run.mesh
    stage = run.experiment.stages[index]
    model = model_before(*where, index)
    scorers = raise_on_all(lambda: scorers_for(*where, reward_names(stage)))
    if not stage.objective.trains:
        return collect_stage(run, index, model, scorers, began)
    ready = batches or raise_on_all(lambda: _batches(run, index))
    train_stage(run, index, ready, model, scorers, make_evaluator(*where, index), began)


def _checked(experiment: Experiment, until: str | None) -> tuple[Experiment, int]:
    """The experiment with its sources resolved, and the index of the last stage to train; before anything slow."""
    experiment = check(resolve_sources(strict(experiment)))
    last = check_until(experiment, until)
    check_sources(experiment)
    check_files(experiment)
    check_functions(experiment)
    check_trained_parts(experiment)
    for item in experiment.evals:
        spec_of(item)
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


def _all_batches(run: RunContext, stages: list[int]) -> dict[int, Batches]:
    """The data of every stage, read now: what is wrong with the last one's shows before the first is trained.

    What an earlier stage has yet to make is read when its time has come.
    """
    whole, batches = run.experiment, {}
    for index in stages:
        stage = whole.stages[index]
        if not stage.objective.trains:
            _tell(stage, make_tasks(stage, run.tokenizer, whole.seed, run.held_out).feed.report())
        elif can_be_read(stage, whole, run.folder):
            batches[index] = _batches(run, index)
    return batches


def _batches(run: RunContext, index: int) -> Batches:
    made = make_batches(run.experiment, index, run.tokenizer, run.mesh, run.held_out)
    _tell(run.experiment.stages[index], made.report)
    _tell_known(run, index)
    return made


def _tell_known(run: RunContext, index: int) -> None:
    """Say how many questions that collected data hold out were trained on: its answers are new, its prompts need not be."""
    stages = run.experiment.stages
    trained = [one for stage in stages[:index] if stage.objective.trains for one in stage.sources]
    asked = [one for stage in stages[:index] if not stage.objective.trains for one in stage.sources]
    for source in filter(is_collected, stages[index].sources):
        every = [one for one in trained if not is_collected(one)]
        count, known = held_out_but_trained(source, asked, every, run.held_out)
        if known:
            _tell(
                stages[index],
                f"{source.path}: of the {count} questions that it holds out, stages before {stages[index].name} train on "
                f"{known}; the answers to them are new",
            )


def _tell(stage: Stage, report: str) -> None:
    say("\n".join(f"{stage.name}: {line}" for line in report.splitlines()))


def make_tokenizer(experiment: Experiment, folder: Path) -> SubwordTokenizer:
    """The run's vocabulary: the one kept in `folder`, the file that the experiment names, or learnt now; kept there.

    Every stage's training text has a share, so that its words are pieces.
    """
    if (folder / FILE_NAME).is_file():
        return SubwordTokenizer.load(folder)
    if experiment.tokenizer.path is not None:
        tokenizer = SubwordTokenizer.load(experiment.tokenizer.path)
        tokenizer.save(folder)
        return tokenizer
    tokenizer = train_tokenizer(
        tokenizer_texts(experiment, held_out_elsewhere(experiment)), experiment.tokenizer.vocab_size, folder
    )
    if tokenizer.vocab_size < experiment.tokenizer.vocab_size:
        say(
            f"tokenizer: {tokenizer.vocab_size} pieces, all that the training text supports, of the "
            f"{experiment.tokenizer.vocab_size} that tokenizer.vocab_size allows"
        )
    return tokenizer


def say(text: str) -> None:
    """A line for people, from one process of many."""
    if is_main_process():
        print(text, flush=True)


def fingerprints(experiment: Experiment) -> dict[str, str]:
    """SHA-256 of every source that is trained or measured on, by path, and of the files of the user's own functions."""
    sources = [source for stage in experiment.stages for source in stage.sources]
    read = {source.path: source for source in [*sources, *(item.source for item in experiment.evals)]}
    functions = {name: found["sha256"] for name, found in check_functions(experiment).items()}
    return {
        path: rows_of(source).fingerprint for path, source in sorted(read.items()) if not path.startswith(COLLECTED)
    } | functions


def function_files(experiment: Experiment) -> dict[str, str]:
    """The files of the user's own functions, by FILE:FUNCTION."""
    return {name: found["file"] for name, found in check_functions(experiment).items()}


def make_evaluator(
    experiment: Experiment, folder: RunFolder, tokenizer: SubwordTokenizer, mesh: Mesh, index: int
) -> Evaluator:
    """The evaluator of stage `index`; preferences are compared with the model that entered the first preference stage."""
    first = next((i for i, stage in enumerate(experiment.stages) if stage.objective.learns_preferences), None)

    @functools.cache
    def reference() -> Transformer | None:
        if first is None or first > index:
            return None
        return model_before(experiment, folder, tokenizer, mesh, first)

    @functools.cache
    def scorers() -> tuple[Scorer, ...]:
        return scorers_before(experiment, folder, tokenizer, mesh, index)

    return Evaluator(experiment, folder, tokenizer, reference, scorers)


def evaluate_run(
    run_dir: Path, stage: str | None = None, tell: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """The held-out numbers again, from a checkpoint: lines as in eval.jsonl. `tell` is called before each measurement."""
    search_recorded(run_dir)
    loaded = load_run(run_dir, stage)
    check_collected(loaded.experiment, RunFolder(run_dir))
    index = check_until(loaded.experiment, loaded.stage)
    evaluator = make_evaluator(loaded.experiment, RunFolder(run_dir), loaded.tokenizer, loaded.mesh, index)
    lines = []
    for number, item in enumerate(loaded.experiment.evals, start=1):
        tell(f"evaluating {number}/{len(loaded.experiment.evals)}: {item.name}")
        lines += [line for line, _ in evaluator.lines(item, loaded.model, loaded.step, "after")]
    return lines
