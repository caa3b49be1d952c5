"""The training loop of one stage: steps, metrics and checkpoints; resumes bitwise after a kill."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from lm.algorithms import algorithm_of
from lm.algorithms.state import first_state, flops_per_token
from lm.between_batches import calling_between_batches
from lm.data.sources import NOWHERE
from lm.data.split import Places
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import Experiment, Stage, UserError, updates_per_step
from lm.model.flops import peak_flops
from lm.model.heads import Scorer, policy_of
from lm.model.lora import without_base
from lm.model.quantised import set_base
from lm.model.transformer import Transformer, num_params
from lm.objectives.own_loss import own_losses
from lm.open_weights import vocabulary_rows
from lm.optimizer import make_optimizer, schedule
from lm.parallel.compiler import compiler_options
from lm.parallel.distributed import is_main_process, run_on_main
from lm.parallel.rules import abstract, batch_sharding, shardings
from lm.stored import write_sealed
from lm.train import goodput
from lm.train.base import check_base
from lm.train.batches import Batches
from lm.train.callbacks import Callback, listener
from lm.train.checkpoint import Checkpoints
from lm.train.evaluate import Evaluator
from lm.train.goodput import Costs
from lm.train.metrics import MetricsLog, Progress, peak_memory_mb
from lm.train.models import StoredRun
from lm.train.named_arrays import named_leaves
from lm.train.profile import Trace
from lm.train.provenance import package_versions
from lm.train.resume import check_checkpoint
from lm.train.rewind import evals_due, rewind
from lm.train.rollout_log import forget
from lm.train.run_folder import RunFolder
from lm.train.signals import Stop, StoppedBySignal
from lm.train.stage_warnings import Warnings
from lm.train.watchdog import PATIENCE, Watchdog
from lm.train_step import Metrics, Models, Step, TrainState, combine, is_trainable, join_state, split_state
from lm.types import TokenBatch

PRODUCED = {"policy", "reward"}
"""Roles of the models that later stages may load from a stage's checkpoint."""


@dataclass(frozen=True)
class RunContext:
    """Everything that all stages of a run share: experiment, folder, tokenizer, mesh, signal and watchdog handles."""

    experiment: Experiment
    folder: RunFolder
    tokenizer: TextTokenizer
    mesh: Mesh
    stop: Stop
    watchdog: Watchdog
    started: float  # time.monotonic() when the command began
    profile: tuple[int, int] | None = None  # steps of every stage to trace: (first, end), end excluded
    callbacks: tuple[Callback, ...] = ()  # user functions called with every line that is written
    held_out: Places = field(
        default_factory=lambda: NOWHERE
    )  # keys held out by one source that another source contains (`held_out_elsewhere`)
    accept: bool = False  # resume although data, tokenizer or versions differ from the checkpoint's

    @property
    def stored(self) -> StoredRun:
        """What models are loaded from."""
        return StoredRun(self.experiment, self.folder, self.tokenizer, self.mesh)


class Interrupted(Exception):
    """Raised after a signal stopped the run and its state was saved; the same command resumes."""


@dataclass
class PendingMetrics:
    """Metrics of a step that are still on the devices; they are read one step late, so that the devices never wait."""

    step: int
    tokens: list[jax.Array]  # number of non-padding tokens of each update
    metrics: dict[str, Any]
    extra: dict[str, float]


def train_stage(
    run: RunContext,
    index: int,
    batches: Batches,
    model: Transformer,
    base: dict[str, str],
    scorers: tuple[Scorer, ...],
    teacher: Transformer | None,
    evaluator: Evaluator,
    began: float,
) -> None:
    """Train a stage to its end, from the entering model or from its newest checkpoint.

    Args:
        base: what its checkpoints record of the model's base (`recorded_base`).
        scorers, teacher: the reward models that the stage reads, and the model that it learns from if its objective names one.
        began: time.monotonic() when this session's work on the stage began.

    Raises:
        UserError: the loss is not finite, or the sampler's log-probabilities disagree with the trainer's.
        Interrupted: SIGINT or SIGTERM arrived; the state is saved.
    """
    stage = run.experiment.stages[index]
    folder = run.folder.stage_folder(stage.name)
    key = jax.random.fold_in(jax.random.key(run.experiment.seed), index)
    state, step_fn = start_state(stage, model, run.mesh, scorers, key, teacher)
    with (
        contextlib.closing(batches),
        MetricsLog(folder, listener(run.callbacks, stage.name)) as log,
        Checkpoints(folder / "checkpoints", stage.keep_last, stage.keep_every) as checkpoints,
    ):
        batches.prepare(model, folder, functools.partial(_before_task, run, stage))
        state, start, meta = restore(state, checkpoints, run.mesh, stage)
        now = _inputs(run, index, batches, base, meta)
        spent = goodput.seconds_spent(folder) if is_main_process() else 0.0
        run_on_main(lambda: goodput.store_seconds_spent(folder, spent))
        run_on_main(lambda: rewind(log, stage, folder, start))
        costs = Costs(began, meta.get("costs", {}), spent)
        loop = _Loop(run, stage, batches, log, checkpoints, meta.get("tokens", 0), now, costs)
        evaluator.tell = loop.show_activity
        if evals_due(stage, start):  # the last session may have stopped between saving this step and evaluating it
            with loop.evaluating(start, start, state):
                evaluator.during(index, policy_of(state.models), log, start)
        for done, current in loop.steps(state, start, step_fn):
            state = current
            if done == start + 1:  # after the first step, which shows within seconds that the run works
                with loop.evaluating(0, done, state):
                    evaluator.before(index, model, log)
            if evals_due(stage, done):
                with loop.evaluating(done, done, state):
                    evaluator.during(index, policy_of(state.models), log, done)
        with loop.evaluating(stage.steps, stage.steps, state):
            if start == stage.steps:  # no step ran in this session
                evaluator.before(index, model, log)
            evaluator.after(index, policy_of(state.models), log, model)
        with loop.costs.of("save_seconds"):
            checkpoints.wait()
        data = num_params(state.models), batches.report, batches.sources
        summarise(run.folder, stage, loop.tokens, *data, loop.costs, {"evals": evaluator.passed_over})
        run_on_main(lambda: tidy(run.folder, stage))


def _inputs(
    run: RunContext, index: int, batches: Batches, base: dict[str, str], meta: dict[str, Any]
) -> dict[str, Any]:
    """Fingerprints of a stage's inputs, recorded in its checkpoints. Raises UserError if an earlier checkpoint's `meta` differs."""
    now = {"data": batches.fingerprint, "tokenizer": run.tokenizer.fingerprint, "versions": package_versions()}
    check_checkpoint(f"stage {run.experiment.stages[index].name}", meta, now, run.accept)
    check_base(run.experiment, index, meta, base)
    batches.resume(meta)
    return now | base


def summarise(
    folder: RunFolder,
    stage: Stage,
    tokens: int,
    size: int,
    data: str,
    sources: list[dict[str, Any]],
    costs: Costs,
    more: dict[str, Any],
) -> None:
    """Write the stage's summary.json, whose existence marks the stage as finished.

    Args:
        tokens, size: number of tokens trained on, and of parameters.
        data: description of the data, as text.
        sources: counts of each source's examples (`Tally.to_json`).
        more: further entries: `files` (SHA-256 of the files for later stages, by name), `evals` (skipped rows by eval).
    """
    if is_main_process():
        counts: dict[str, Any] = {"steps": stage.steps, "final_step": stage.steps, "tokens": tokens, "num_params": size}
        content = (
            counts | {"data": data, "sources": sources} | more | {"peak_memory_mb": peak_memory_mb()} | costs.total()
        )
        write_sealed(folder.summary(stage.name), content)
        folder.record_finished()


def tidy(folder: RunFolder, stage: Stage) -> None:
    """Clean up a finished stage: drop what only serves resuming, and with `keep_moments` false the optimizer state.

    Repeated whenever the run is resumed, in case a kill prevented it.
    """
    step, checkpoints = folder.final_step(stage.name), folder.checkpoints(stage.name)
    if step is not None:
        forget(folder.stage_folder(stage.name))
    if step is not None and checkpoints.is_dir() and not stage.keep_moments:
        with Checkpoints(checkpoints, stage.keep_last, stage.keep_every) as found:
            found.finish(step, PRODUCED)


def _before_task(run: RunContext, stage: Stage, what: str) -> None:
    """Called before each slow task that precedes the first step: stops after a signal and restarts the watchdog."""
    if reason := run.stop.now():
        raise Interrupted(f"{reason}: stopped before the first step of stage {stage.name}")
    run.watchdog.expect(what, PATIENCE)


class _Loop:
    """Runs the steps of one stage with logging, checkpoints and cost accounting."""

    def __init__(
        self,
        run: RunContext,
        stage: Stage,
        batches: Batches,
        log: MetricsLog,
        checkpoints: Checkpoints,
        tokens: int,
        now: dict[str, Any],
        costs: Costs,
    ):
        self.run, self.stage, self.batches, self.log, self.checkpoints = run, stage, batches, log, checkpoints
        self.costs, self.tokens, self.now = costs, int(tokens), now
        self.pending: PendingMetrics | None = None
        self.progress: Progress | None = None  # from the first step on
        self.updates = updates_per_step(stage)
        self.rate = schedule(stage.optimizer, stage.steps * self.updates)
        self.trace = Trace(run.folder.stage_folder(stage.name) / "profile", run.profile)
        peak = peak_flops(jax.devices()[0].device_kind)
        cost = flops_per_token(stage, run.experiment.model, vocabulary_rows(run.experiment, run.tokenizer))
        self.mfu_per_rate = cost / (peak * run.mesh.size) if peak else None  # model FLOPs utilisation

    def show_activity(self, text: str) -> None:
        """Show the current activity (compiling, an evaluation) in the progress line, or print it before the first step."""
        if self.progress is not None:
            self.progress.show_activity(text)
        elif is_main_process():
            print(f"{self.stage.name}  {text}", flush=True)

    @contextlib.contextmanager
    def ending_on_signal(self, state: TrainState, done: int) -> Iterator[None]:
        """Context of an evaluation or a rollout, which a signal ends between two batches or two looks of the sampler.

        The state after step `done` is saved, and a resumed run repeats the evaluation or the rollout.
        """
        try:
            with calling_between_batches(self.run.stop.check):
                yield
        except StoppedBySignal as stopped:
            if self.pending is not None:
                self._report(self.pending)
            self._save(state, done)
            self._interrupt(str(stopped), done)

    @contextlib.contextmanager
    def evaluating(self, step: int, done: int, state: TrainState) -> Iterator[None]:
        """Context of an evaluation at `step`: its time is counted as `eval_seconds`, and the watchdog waits longer."""
        what = f"the evaluation after step {step} of stage {self.stage.name}"
        patient = self.run.watchdog.patiently(what)
        with self.ending_on_signal(state, done), self.costs.of("eval_seconds"), patient:
            yield
        if self.progress is not None:
            self.warnings.compare_held_out()

    def steps(self, state: TrainState, start: int, step_fn: Step) -> Iterator[tuple[int, TrainState]]:
        """Yield (steps done, state) after each step from `start`; saves every `save_every` steps and after a signal."""
        self.progress = progress = Progress(self.stage.name, self.stage.steps, start)
        self.warnings = Warnings(self.run.experiment, self.stage, self.log, progress.say)
        try:
            for step in range(start, self.stage.steps):
                self.trace.before(step + 1)
                if self.pending is None:
                    self._expect(step + 1, PATIENCE if step == start else 1.0)
                state, latest = self._step(state, step, step_fn, new=step == start)
                self.trace.after(step + 1, latest.metrics)
                if self.pending is not None:
                    self._report(self.pending)
                    self._expect(latest.step)
                self.pending, stopping = latest, self.run.stop.now()
                if latest.step in (1, self.stage.steps) or evals_due(self.stage, latest.step):
                    self.batches.show(self.log, latest.step)  # before saving: a step that is saved is not run again
                if latest.step % self.stage.save_every == 0 or latest.step == self.stage.steps or stopping:
                    self._report(latest)  # raises if the loss is not finite: such a state is never saved
                    self._save(state, latest.step)
                if stopping:
                    self._interrupt(stopping, latest.step)
                yield latest.step, state
        finally:
            self.trace.close()
            progress.close()

    def _interrupt(self, reason: str, step: int) -> NoReturn:
        self.checkpoints.wait()
        raise Interrupted(f"{reason}: saved at step {step} of {self.stage.steps} of stage {self.stage.name}")

    def _expect(self, step: int, patience: float = 1.0) -> None:
        self.run.watchdog.expect(f"step {step} of stage {self.stage.name}", patience)

    def _step(self, state: TrainState, step: int, step_fn: Step, new: bool) -> tuple[TrainState, PendingMetrics]:
        if new:
            self.show_activity("compiling")
        with self.ending_on_signal(state, step), self.costs.of(self.batches.cost):
            batches, extra = self.batches(step, state)
        for kind, text in self.batches.notes.items():
            self.warnings.add(kind, text, step + 1)
        self.batches.notes.clear()
        began = time.monotonic()
        for batch in batches:
            state, metrics = step_fn(state, batch)
        if new:
            jax.block_until_ready(metrics)
            self.costs.add("compile_seconds", began)
            self.costs.seconds.setdefault("first_step_seconds", time.monotonic() - self.run.started)
        with self.costs.of(self.batches.cost):
            self.batches.work_ahead(step)
        return state, PendingMetrics(step + 1, [_count_tokens(batch) for batch in batches], metrics, extra)

    def _save(self, state: TrainState, step: int) -> None:
        with self.costs.of("save_seconds"):
            self.log.sync()
            ahead = self.batches.record(step, self.checkpoints)
            meta = {"costs": self.costs.total(), "tokens": self.tokens, **self.now, **ahead}
            self.checkpoints.save(step, checkpoint_items(state), meta, untrained(self.stage, state.models))

    def _report(self, pending: PendingMetrics) -> None:
        """Fetch, log and show a step's metrics. Raises UserError if the loss or the gradient norm is not finite."""
        assert self.progress is not None
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()} | pending.extra
        tokens = sum(map(int, jax.device_get(pending.tokens)))
        self.tokens += tokens
        if self.pending is pending:
            self.pending = None
        line: dict[str, Any] = {"step": pending.step, "time": self.costs.total()["seconds"]}
        line["lr"] = float(self.rate(pending.step * self.updates - 1))
        line["tokens_per_second"] = self.progress.rate(pending.step, tokens)
        if self.mfu_per_rate is not None:
            line["mfu"] = line["tokens_per_second"] * self.mfu_per_rate
        self.log.metrics(line | values)
        self.warnings.see(line | values)
        bad = [name for name in ("loss", "grad_norm") if not np.isfinite(values[name])]
        if bad:
            raise UserError(
                f"{self.stage.name}: {bad[0]} is {values[bad[0]]} at step {pending.step}; the last good checkpoint is kept. "
                f"{_advice(self.stage)}"
            )
        self.progress.update(pending.step, values, tokens)


def _advice(stage: Stage) -> str:
    """What to change when the loss of a stage or its gradient is not finite: a loss of the user's own is the first suspect."""
    own = ", ".join(f"{stage.name}.objective.{field} ({name})" for field, name in own_losses(stage))
    rates = f"lower {stage.name}.optimizer.peak_lr or {stage.name}.optimizer.clip_norm often helps"
    return (
        f"Look first whether {own} and its gradient are finite for every input; else a {rates}" if own else f"A {rates}"
    )


@jax.jit
def _count_tokens(batch: TokenBatch) -> jax.Array:
    return jnp.sum(batch.segments > 0)


def start_state(
    stage: Stage,
    model: Transformer,
    mesh: Mesh,
    scorers: tuple[Scorer, ...] = (),
    key: PRNGKeyArray | None = None,
    teacher: Transformer | None = None,
) -> tuple[TrainState, Step]:
    """The sharded state at step 0 of a stage, and its step function, which compiles on first use.

    Args:
        scorers, teacher: the reward models that the stage reads, and the model that it learns from if its objective names one.
        key: random key of new parameters (a reward model's head).
    """
    optimizer = make_optimizer(stage.optimizer, stage.steps * updates_per_step(stage))
    given = set_base(model, stage.lora.base, mesh), scorers, key, teacher

    def init(*given: Any) -> Any:
        return split_state(first_state(stage, optimizer, *given), stage)

    traced, shapes = jax.make_jaxpr(init, return_shape=True)(*given)
    places = shardings(shapes, mesh)
    # Most arrays that the step only reads are inputs: they are shared here, because jit would copy them.
    inputs = dict(zip(map(id, traced.jaxpr.invars), jax.tree.leaves(given), strict=True))
    changing = len(jax.tree.leaves(shapes[0]))
    shared = [None] * changing + [inputs.get(id(var)) for var in traced.jaxpr.outvars[changing:]]
    where = list(zip(shared, jax.tree.leaves(places), strict=True))

    def new(*given: Any) -> list[jax.Array]:
        return [x for x, old in zip(jax.tree.leaves(init(*given)), shared, strict=True) if old is None]

    made = iter(jax.jit(new, out_shardings=[place for old, place in where if old is None])(*given))
    leaves = [next(made) if old is None else jax.device_put(old, place) for old, place in where]
    state = join_state(*jax.tree.unflatten(jax.tree.structure(shapes), leaves))
    return state, Stepper(stage, optimizer, places, mesh)


class Stepper:
    """The compiled step of a stage: it donates the arrays that it changes and only reads the others.

    Args:
        places: shardings of the two parts of the state, as `split_state` gives them.
    """

    def __init__(self, stage: Stage, optimizer: optax.GradientTransformation, places: Any, mesh: Mesh):
        self.stage, step = stage, algorithm_of(stage).step(stage, optimizer)
        changes, reads = places

        def changed(changing: TrainState, read: Any, batch: Any) -> tuple[TrainState, Metrics]:
            state, metrics = step(join_state(changing, read), batch)
            return split_state(state, stage)[0], metrics

        self.jitted = jax.jit(
            changed,
            in_shardings=(changes, reads, batch_sharding(mesh)),
            out_shardings=(changes, None),
            donate_argnums=0,
            compiler_options=compiler_options(mesh),
        )

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        changing, read = split_state(state, self.stage)
        changing, metrics = self.jitted(changing, read, batch)
        return join_state(changing, read), metrics

    def lower(self, state: TrainState, batch: Any) -> Any:
        """The step for a state and a batch, lowered for compilation."""
        return self.jitted.lower(*split_state(state, self.stage), batch)


def restore(
    state: TrainState, checkpoints: Checkpoints, mesh: Mesh, stage: Stage
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state, step and meta of the newest intact checkpoint; (`state`, 0, {}) if there is none.

    Checkpoints hold neither `frozen` nor the base of an adapter; `state` has both from an earlier stage or the initial
    weights. At the stage's last step the optimizer state may be missing, since only evaluations are left.

    Raises:
        UserError: steps are left, and the checkpoint has no optimizer state.
    """
    wanted = checkpoint_items(state)
    shapes = {k: abstract(jax.eval_shape(lambda x: x, tree), mesh) for k, tree in wanted.items()}
    found = checkpoints.restore(shapes, optional=wanted.keys() - PRODUCED)
    if found is None:
        return state, 0, {}
    items = wanted | found.items
    if len(found.items) < len(wanted) and found.step < stage.steps:
        raise UserError(
            f"stage {stage.name} cannot resume from step {found.step}: its checkpoint lost "
            f"{', '.join(sorted(wanted.keys() - found.items.keys()))} when the stage finished ({stage.name}.keep_moments); "
            f"remove {checkpoints.folder.parent} to train it from its start"
        )
    models = {role: combine(items[role], model) for role, model in state.models.items()}
    # The optimizer counts updates; a step may have had several.
    state = TrainState(jnp.int32(found.step), models, items["opt_state"], items["carry"], state.frozen)
    return state, found.step, found.meta


def checkpoint_items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint by name: each model by its role (without the base of an adapter), `opt_state` and `carry`."""
    return {role: without_base(model) for role, model in state.models.items()} | {
        "opt_state": state.opt_state,
        "carry": state.carry,
    }


def untrained(stage: Stage, models: Models) -> set[str]:
    """Names of the parameters that the stage does not train, which its checkpoints store once for all steps."""
    stored = {role: without_base(model) for role, model in models.items()}
    return {name for name in named_leaves(stored) if not is_trainable(name, stage)}
