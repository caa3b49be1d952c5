"""A run: trains its stages in order, each from the model of an earlier stage."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm.allocator import keep_freed_memory
from lm.check import check, short_warmups
from lm.data.cache import current_cache
from lm.data.selection import (
    WITHHELD,
    check_files,
    check_sources,
    held_out_but_trained,
    held_out_elsewhere,
    tokenizer_texts,
    withheld,
)
from lm.data.sources import rows_of
from lm.data.split import Places
from lm.data.text_tokenizer import TextTokenizer
from lm.data.vocabulary import is_tokenizer, load_tokenizer, named_tokenizer, train_tokenizer
from lm.evals.examples import spec_of
from lm.experiment import (
    Experiment,
    Stage,
    UserError,
    resolve_sources,
    reward_names,
    start_of,
    strict,
    to_dict,
)
from lm.model.heads import Scorer
from lm.model.lora import without_adapter
from lm.model.quantised import set_base
from lm.model.transformer import Transformer
from lm.objectives.own_loss import check_own_losses
from lm.open_weights import check_weights, located, vocabulary_rows, with_init
from lm.parallel.distributed import broadcast_from_main, is_main_process, raise_on_all, run_on_main
from lm.parallel.mesh import check_fits, check_split, make_mesh
from lm.rollout.episodes import make_tasks
from lm.train.agreement import check_same, check_same_data, check_shared
from lm.train.base import adapters_on_random_weights, base_stage, recorded_base
from lm.train.batches import Batches
from lm.train.callbacks import Callback, listener, load_callbacks
from lm.train.collect import collect_stage
from lm.train.collected import inputs_ready, is_collected, with_collected_paths
from lm.train.evaluate import Evaluator, Line, check_evals
from lm.train.fingerprints import fingerprints, function_files
from lm.train.loaded_run import LoadedRun, load_adapters, load_open_weights, load_run, record_origin
from lm.train.loop import Interrupted, RunContext, tidy, train_stage
from lm.train.memory import check_memory
from lm.train.metrics import KINDS, read_lines
from lm.train.models import StoredRun, check_trained_parts, model_before, stage_index
from lm.train.provenance import record_environment
from lm.train.resume import check_collected, check_more_steps, check_run_inputs, record_run_inputs, run_inputs
from lm.train.rollouts import make_batches
from lm.train.run_folder import RunFolder
from lm.train.scorers import check_reward_models, scorers_before, scorers_for
from lm.train.signals import stop_on_signals
from lm.train.sinks.feed import feeding
from lm.train.teachers import check_teacher, load_teacher
from lm.train.trajectory_files import check_trajectories
from lm.train.watchdog import PATIENCE, Watchdog
from lm.user_functions import check_functions, search_recorded

Measurements = dict[str, list[Line]]
"""Lines as in eval.jsonl, by the name of the adapter; "" without one."""


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
    """Train all unfinished stages up to and including `until` (None: the last). Every process calls it with the same arguments.

    Args:
        fresh: rename an existing run folder and start from scratch.
        profile: steps of every stage to trace: (first, end), counted from 1, end excluded.
        watchdog: seconds without a new step after which the process ends; None: never.
        after_stage: called with the run folder after each finished stage.
        callbacks: user functions, FILE:FUNCTION, which process 0 calls with (stage, kind, line) for every line that is
            written: see `lm.train.callbacks`.
        accept: resume although data, tokenizer, collected files or versions differ from those at the start of the run.

    Raises:
        UserError: an error in the experiment, its data or the folder that the user can fix.
        Interrupted: a signal arrived; the state is saved.
    """
    started = time.monotonic()
    experiment, last = raise_on_all(lambda: _check_experiment(experiment, until))
    loaded = raise_on_all(lambda: load_callbacks(callbacks))
    check_same(experiment, {"fresh": fresh, "until": until, "profile": profile, "accept": accept})
    folder = RunFolder(run_dir)
    mesh = raise_on_all(lambda: _make_run_mesh(experiment))
    if fresh:
        run_on_main(folder.set_aside)
    with contextlib.ExitStack() as inside:
        run_on_main(lambda: inside.enter_context(folder.lock()))
        stop = inside.enter_context(stop_on_signals())
        dog = inside.enter_context(Watchdog(watchdog))
        inside.enter_context(jax.set_mesh(mesh))
        check_shared(folder)
        run_on_main(lambda: _claim_folder(experiment, folder))
        shown = experiment if is_main_process() else replace(experiment, sinks=())
        feeds = inside.enter_context(feeding(shown, folder, print_on_main))
        loaded += tuple(Callback(feed.name, feed.write) for feed in feeds)
        stages = broadcast_from_main(
            lambda: [i for i in range(last + 1) if not folder.finished(experiment.stages[i].name)]
        )
        tokenizer, held_out = _prepare_data(experiment, folder, mesh, accept, bool(stages))
        experiment = with_collected_paths(experiment, folder)
        context = RunContext(experiment, folder, tokenizer, mesh, stop, dog, started, profile, loaded, held_out, accept)
        batches = raise_on_all(lambda: _all_batches(context, stages))
        if stages:
            _print_evals(context, stages)
        check_same_data({experiment.stages[i].name: made.fingerprint for i, made in batches.items()})
        _train_all(context, stages, batches, after_stage)


def _print_evals(run: RunContext, stages: list[int]) -> None:
    """Print what each eval measures, and warn of rows that are held out now but that finished stages trained on."""
    for line in raise_on_all(lambda: check_evals(run.experiment, run.tokenizer)):
        print_on_main(line)
    run_on_main(lambda: _warn_of_trained_evals(run, run.experiment.stages[: min(stages)]))


def _warn_of_trained_evals(run: RunContext, stages: tuple[Stage, ...]) -> None:
    """Print the number of held-out rows that each finished stage trained on: evals may have been added since."""
    for stage in stages:
        if stage.objective.trains:
            counted = run.folder.read_summary(stage.name).get("sources") or [{}] * len(stage.sources)
            for source, then in zip(stage.sources, counted, strict=False):
                left_out = then.get("dropped", {}).get(WITHHELD, 0)
                trained = withheld(source, rows_of(source), run.held_out) - left_out
                if trained > 0:
                    _print_lines(
                        stage, f"finished, and trained on {trained} rows of {source.path} that are held out now"
                    )


def _train_all(
    run: RunContext, stages: list[int], batches: dict[int, Batches], after_stage: Callable[[Path], Any]
) -> None:
    """Train these stages (by index) in order."""
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


def _claim_folder(experiment: Experiment, folder: RunFolder) -> None:
    """Claim the run folder for the experiment, remove leftovers of a kill, and check that its files are intact."""
    names = [stage.name for stage in experiment.stages]
    later = {name: names[place + 1 :] for place, name in enumerate(names)}
    folder.claim(to_dict(experiment), lambda found: check_more_steps(folder, found, later))
    folder.sweep(names)
    current_cache().sweep()
    for stage in experiment.stages:
        for kind in KINDS:  # check them now: otherwise the report finds damage after hours of training
            read_lines(folder.stage_folder(stage.name) / f"{kind}.jsonl")
        if folder.finished(stage.name):
            folder.read_summary(stage.name)
        check_trajectories(folder.stage_folder(stage.name))
        tidy(folder, stage)


def _prepare_data(
    experiment: Experiment, folder: RunFolder, mesh: Mesh, accept: bool, trains: bool
) -> tuple[TextTokenizer, Places]:
    """Make the tokenizer and find the held-out keys; records fingerprints of data, tokenizer and versions in the folder.

    Args:
        trains: whether stages are left to train; only then must the fingerprints equal those at the start of the run.

    Raises:
        UserError: data, mesh, memory or another run's reward model does not fit the experiment, or a fingerprint differs
            from the start of the run.
    """
    for line in [*short_warmups(experiment), *adapters_on_random_weights(experiment)]:
        print_on_main(line)
    print_on_main("reading the data")
    tokenizer = run_on_main(lambda: make_tokenizer(experiment, folder.tokenizer)) or load_tokenizer(folder.tokenizer)
    rows = raise_on_all(lambda: vocabulary_rows(experiment, tokenizer))
    raise_on_all(lambda: check_fits(experiment, dict(mesh.shape)))
    raise_on_all(lambda: check_memory(experiment, dict(mesh.shape), rows))

    raise_on_all(lambda: check_reward_models(experiment, tokenizer))
    raise_on_all(lambda: [check_teacher(stage, tokenizer, experiment.model) for stage in experiment.stages])

    def record() -> None:
        found = fingerprints(experiment)
        now = run_inputs(tokenizer, found)
        if trains:
            accepted = check_run_inputs(folder, now, accept)
            check_collected(experiment, folder, accept)
        record_environment(folder, found, function_files(experiment))
        record_origin(experiment, folder)
        if trains:
            record_run_inputs(folder, now, accepted)
        folder.record_finished()

    run_on_main(record)
    return tokenizer, raise_on_all(lambda: held_out_elsewhere(experiment))


def _train(run: RunContext, index: int, batches: Batches | None, began: float) -> None:
    """Train a stage from the models that it needs; `batches` is None for data that did not exist when the run started."""
    stored, stage = run.stored, run.experiment.stages[index]
    keep_freed_memory(not stage.lora.rank)
    shares_base = reward_names(stage) or stage.objective.teacher_name  # these models need the original base
    base = "model" if shares_base else stage.lora.base
    model, fingerprint = model_before(stored, index, base=base)
    known = {base_stage(run.experiment, start_of(run.experiment, index)): model}
    scorers = raise_on_all(lambda: scorers_for(stored, reward_names(stage), known))
    if not stage.objective.trains:
        return collect_stage(run, index, model, scorers, began)
    ready = batches or raise_on_all(lambda: _batches(run, index))
    teacher = raise_on_all(lambda: load_teacher(stored, stage, known))
    recorded = recorded_base(stage, model, fingerprint)  # before quantisation, whose rounding may depend on the device
    evaluator = make_evaluator(stored, index, model)
    train_stage(run, index, ready, model, recorded, scorers, teacher, evaluator, began)


def _check_experiment(experiment: Experiment, until: str | None) -> tuple[Experiment, int]:
    """Check everything that is fast to check; returns the experiment with its sources resolved and the last stage's index."""
    experiment = check(resolve_sources(with_init(strict(experiment))))
    last = stage_index(experiment, until)
    check_sources(experiment)
    check_files(experiment)
    check_functions(experiment)
    check_own_losses(experiment.stages)
    check_trained_parts(experiment)
    check_weights(experiment)
    for item in experiment.evals:
        spec_of(item)
    return experiment, last


def _make_run_mesh(experiment: Experiment) -> Mesh:
    """The mesh of the experiment, checked to have devices of every process.

    Raises:
        UserError: the mesh does not fit the devices, or leaves a process without any.
    """
    alone, devices = experiment.rollout_mesh.devices, jax.devices()
    check_split(experiment, len(devices))
    if alone and jax.process_count() > 1:
        raise UserError(
            f"rollout_mesh.devices is {alone} and the run has {jax.process_count()} processes, which sample on all devices: it should be 0"
        )
    mesh = make_mesh(experiment.mesh, devices[: len(devices) - alone])
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise UserError(
            f"the mesh takes {mesh.size} of {jax.device_count()} devices and leaves none of process {min(idle)}'s: "
            "mesh.data -1 takes them all, or start fewer processes"
        )
    return mesh


def _all_batches(run: RunContext, stages: list[int]) -> dict[int, Batches]:
    """Batches of every stage by its index, made before training, so that errors in any stage's data show at once.

    Data that an earlier stage has yet to collect is left out: it is read when its stage begins.
    """
    whole, batches = run.experiment, {}
    for index in stages:
        stage = whole.stages[index]
        if not stage.objective.trains:
            _print_lines(stage, make_tasks(stage, run.tokenizer, whole.seed, run.held_out).report())
        elif inputs_ready(stage, whole, run.folder):
            batches[index] = _batches(run, index)
    return batches


def _batches(run: RunContext, index: int) -> Batches:
    made = make_batches(run.experiment, index, run.tokenizer, run.mesh, run.held_out)
    _print_lines(run.experiment.stages[index], made.report)
    _warn_of_trained_prompts(run, index)
    return made


def _warn_of_trained_prompts(run: RunContext, index: int) -> None:
    """Print how many held-out prompts of collected data earlier stages trained on (with other answers)."""
    stages = run.experiment.stages
    trained = [one for stage in stages[:index] if stage.objective.trains for one in stage.sources]
    asked = [one for stage in stages[:index] if not stage.objective.trains for one in stage.sources]
    for source in filter(is_collected, stages[index].sources):
        every = [one for one in trained if not is_collected(one)]
        count, known = held_out_but_trained(source, asked, every, run.held_out)
        if known:
            _print_lines(
                stages[index],
                f"{source.path}: of the {count} questions that it holds out, stages before {stages[index].name} train on "
                f"{known}; the answers to them are new",
            )


def _print_lines(stage: Stage, report: str) -> None:
    """Print each line with the stage's name before it, on the main process."""
    print_on_main("\n".join(f"{stage.name}: {line}" for line in report.splitlines()))


def make_tokenizer(experiment: Experiment, folder: Path) -> TextTokenizer:
    """The run's tokenizer: loaded from `folder`, else from `tokenizer.path`, else trained now; saved in `folder`.

    It is trained on text of every stage's training data.
    """
    if is_tokenizer(folder):
        return load_tokenizer(folder)
    if experiment.tokenizer.path is not None:
        tokenizer = named_tokenizer(experiment.tokenizer)
        tokenizer.save(folder)
        return tokenizer
    tokenizer = train_tokenizer(
        tokenizer_texts(experiment, held_out_elsewhere(experiment)), experiment.tokenizer.vocab_size, folder
    )
    if tokenizer.vocab_size < experiment.tokenizer.vocab_size:
        print_on_main(
            f"tokenizer: {tokenizer.vocab_size} pieces, all that the training text supports, of the "
            f"{experiment.tokenizer.vocab_size} that tokenizer.vocab_size allows"
        )
    return tokenizer


def print_on_main(text: str) -> None:
    """Print on the main process only."""
    if is_main_process():
        print(text, flush=True)


def make_evaluator(run: StoredRun, index: int, entering: Transformer | None) -> Evaluator:
    """The evaluator of stage `index`; its reference is the model that entered the first preference stage.

    Args:
        entering: the model that enters the stage, if it is loaded: reference and reward models with its base share that.
    """
    experiment = run.experiment
    first = next((i for i, stage in enumerate(experiment.stages) if stage.objective.learns_preferences), None)
    known = {} if entering is None else {base_stage(experiment, start_of(experiment, index)): entering}

    @functools.cache
    def reference() -> Transformer | None:
        if first is None or first > index:
            return None
        if first == index and entering is not None:
            return entering
        base = experiment.stages[first].lora.base
        found, _ = model_before(run, first, known, base)
        return set_base(found, base, run.mesh)

    @functools.cache
    def scorers() -> tuple[Scorer, ...]:
        return scorers_before(run, index, known)

    return Evaluator(experiment, run.folder, run.tokenizer, reference, scorers)


def evaluate_run(
    run_dir: Path,
    stage: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
    adapters: Sequence[str] = (),
) -> Measurements:
    """Run a run's evals again on a stage's checkpoint, or on it with each of several PEFT adapters.

    Args:
        stage: name of the stage; None: the last with a checkpoint.
        tell: called with a line of progress before each eval.
    """
    search_recorded(run_dir)
    loaded = load_run(run_dir, stage)
    check_collected(loaded.experiment, RunFolder(run_dir))
    index = stage_index(loaded.experiment, loaded.stage)
    entering = without_adapter(loaded.model) if loaded.experiment.stages[index].lora.rank else None
    evaluator = make_evaluator(loaded.stored(run_dir), index, entering)
    return _evaluate(load_adapters(loaded, run_dir, adapters), evaluator, "after", tell)


def evaluate_open_weights(
    experiment: Experiment, tell: Callable[[str], None] = lambda text: None, adapters: Sequence[str] = ()
) -> Measurements:
    """Run an experiment's evals on the open weights that it begins with, or on these with each of several PEFT adapters.

    The reference of an adapter is the model without it.
    """
    experiment, _ = _check_experiment(experiment, None)
    loaded = load_open_weights(experiment)
    reference = loaded.model if adapters else None
    evaluator = Evaluator(experiment, RunFolder(Path()), loaded.tokenizer, lambda: reference)
    _, path = located(experiment.init)
    return _evaluate(load_adapters(loaded, path, adapters), evaluator, "before", tell)


def _evaluate(
    models: dict[str, LoadedRun], evaluator: Evaluator, when: str, tell: Callable[[str], None]
) -> Measurements:
    def lines(name: str, loaded: LoadedRun) -> Iterator[Line]:
        for number, item in enumerate(loaded.experiment.evals, start=1):
            tell(f"evaluating {f'{name}, ' if name else ''}{number}/{len(loaded.experiment.evals)}: {item.name}")
            yield from (line for line, _ in evaluator.lines(item, loaded.model, loaded.step, when))

    return {name: list(lines(name, loaded)) for name, loaded in models.items()}
