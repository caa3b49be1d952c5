"""One stage: batches in, steps, metrics and checkpoints out; resumes where it was killed, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm.data.tokenizer import Tokenizer
from lm.experiment import Experiment, Stage, UserError
from lm.model.transformer import Transformer, num_params
from lm.optimizer import make_optimizer, schedule
from lm.parallel.rules import abstract, batch_sharding, shardings
from lm.steps import STEPS, Step, needs_reference
from lm.train.batches import Batches, check_sampler, make_batches, updates_per_step
from lm.train.checkpoint import Checkpoints
from lm.train.evaluate import Evaluator
from lm.train.metrics import MetricsLog, Progress, peak_memory_mb
from lm.train.run_folder import RunFolder, write_json_atomic
from lm.train.signals import Stop
from lm.types import TrainState


@dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    experiment: Experiment
    folder: RunFolder
    tokenizer: Tokenizer
    mesh: Mesh
    stop: Stop
    started: float  # time.monotonic() when the command began


class Interrupted(Exception):
    """A signal stopped the run after it had saved; running the same command again goes on."""


@dataclass
class Pending:
    """A step whose metrics are still on the devices: they are read one step late, so that nothing waits."""

    step: int
    tokens: int
    metrics: dict[str, Any]
    extra: dict[str, float]


class Costs:
    """Where a stage's time goes, in seconds, over all sessions that worked on it."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = dict(seconds)
        self.began = time.monotonic() - self.seconds.get("seconds", 0.0)

    def add(self, name: str, since: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - since

    def total(self) -> dict[str, float]:
        return self.seconds | {"seconds": time.monotonic() - self.began}


def train_stage(run: Run, index: int, model: Transformer, evaluator: Evaluator) -> None:
    """Train a stage to its end from the model before it, or from its newest checkpoint.

    Raises:
        UserError: bad data, a loss that is not finite, a sampler that disagrees with the trainer.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    stage = run.experiment.stages[index]
    folder = run.folder.stage_folder(stage.name)
    batches = make_batches(run.experiment, index, run.tokenizer)
    state, step_fn = start_state(stage, model, run.mesh)
    with MetricsLog(folder) as log, Checkpoints(folder / "checkpoints") as checkpoints:
        state, start, meta = restore(state, checkpoints, run.mesh)
        costs = Costs(meta.get("costs", {}))
        log.rewind(start)
        if start == 0:
            began = time.monotonic()
            evaluator.before(index, model, log)
            costs.add("eval_seconds", began)
        state, tokens = _steps(
            run, index, state, start, step_fn, batches, evaluator, log, checkpoints, costs, meta.get("tokens", 0)
        )
        began = time.monotonic()
        evaluator.after(index, state.params, log)
        batches.show(log, stage.steps)
        costs.add("eval_seconds", began)
    summary = {"steps": stage.steps, "tokens": tokens, "num_params": num_params(state.params), "data": batches.report}
    write_json_atomic(run.folder.summary(stage.name), summary | {"peak_memory_mb": peak_memory_mb()} | costs.total())


def _steps(
    run: Run,
    index: int,
    state: TrainState,
    start: int,
    step_fn: Step,
    batches: Batches,
    evaluator: Evaluator,
    log: MetricsLog,
    checkpoints: Checkpoints,
    costs: Costs,
    tokens: int,
) -> tuple[TrainState, int]:
    """All steps from `start`: the state after the last, and the tokens that the stage has seen."""
    stage, place = run.experiment.stages[index], batch_sharding(run.mesh)
    progress = Progress(stage.name, stage.steps, start)
    report = _reporter(stage, log, progress, costs)
    pending: Pending | None = None
    try:
        for step in range(start, stage.steps):
            began = time.monotonic()
            updates, extra = batches(step, state.params)
            costs.add(batches.cost, began)
            if step == start:
                check_sampler(state.params, updates[0], stage, run.experiment.model.compute_dtype)
                began = time.monotonic()
            for batch in updates:
                state, metrics = step_fn(state, jax.device_put(batch, place))
            if step == start:
                jax.block_until_ready(metrics)
                costs.add("compile_seconds", began)
                costs.seconds.setdefault("first_step_seconds", time.monotonic() - run.started)
            if pending is not None:
                report(pending)
            seen = sum(int((np.asarray(batch.segments) > 0).sum()) for batch in updates)
            done, tokens = step + 1, tokens + seen
            pending = Pending(done, seen, metrics, extra)
            stopping = run.stop.requested
            if done % stage.save_every == 0 or done == stage.steps or stopping:
                report(pending)  # raises where the state is not finite: such a one is never saved
                pending, began = None, time.monotonic()
                meta = {"costs": costs.total(), "tokens": tokens}
                checkpoints.save(done, {"params": state.params, "opt_state": state.opt_state}, meta)
                costs.add("save_seconds", began)
            if stopping:
                checkpoints.wait()
                raise Interrupted(f"{stopping} at step {done} of {stage.steps} of stage {stage.name}: saved")
            if stage.eval_every and done % stage.eval_every == 0 and done < stage.steps:
                began = time.monotonic()
                evaluator.during(index, state.params, log, done)
                batches.show(log, done)
                costs.add("eval_seconds", began)
    finally:
        progress.close()
    return state, tokens


def start_state(stage: Stage, model: Transformer, mesh: Mesh) -> tuple[TrainState, Step]:
    """The state at step 0 of a stage, born sharded, and its step, which compiles for the mesh on first use."""
    optimizer = make_optimizer(stage.optimizer, stage.steps * updates_per_step(stage))

    def init(params: Transformer) -> TrainState:
        # Copies: the state is donated to every step, and the model that came in still belongs to the caller.
        frozen = {"reference": jax.tree.map(jnp.copy, params)} if needs_reference(stage) else {}
        return TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params), frozen)

    places = shardings(jax.eval_shape(init, model), mesh)
    step = jax.jit(
        STEPS[type(stage.objective)](stage, optimizer),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, None),
        donate_argnums=0,
    )
    return jax.jit(init, out_shardings=places)(model), step


def restore(state: TrainState, checkpoints: Checkpoints, mesh: Mesh) -> tuple[TrainState, int, dict[str, Any]]:
    """The newest sound checkpoint's state, its step and notes; the state as it is where there is none.

    `frozen` is not in checkpoints: it is the model that entered the stage, which the stage before has saved.
    """
    wanted = {"params": state.params, "opt_state": state.opt_state}
    found = checkpoints.restore({k: abstract(jax.eval_shape(lambda x: x, tree), mesh) for k, tree in wanted.items()})
    if found is None:
        return state, 0, {}
    # The optimizer counts updates; a step may have had several.
    state = TrainState(jnp.int32(found.step), found.items["params"], found.items["opt_state"], state.frozen)
    return state, found.step, found.meta


def _reporter(stage: Stage, log: MetricsLog, progress: Progress, costs: Costs) -> Callable[[Pending], None]:
    """Reads a step's metrics, writes and shows them, and stops the run where the loss is not finite."""
    rate, updates = schedule(stage.optimizer, stage.steps * updates_per_step(stage)), updates_per_step(stage)

    def report(pending: Pending) -> None:
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()} | pending.extra
        line: dict[str, Any] = {"step": pending.step, "time": costs.total()["seconds"]}
        line["lr"] = float(rate(pending.step * updates - 1))
        line["tokens_per_second"] = progress.rate(pending.step, pending.tokens)
        log.metrics(line | values)
        bad = [name for name in ("loss", "grad_norm") if not np.isfinite(values[name])]
        if bad:
            raise UserError(
                f"{stage.name}: {bad[0]} is {values[bad[0]]} at step {pending.step}; the last good checkpoint is kept. "
                f"A lower {stage.name}.optimizer.peak_lr or clip_norm often helps"
            )
        progress.update(pending.step, values, pending.tokens)

    return report
