"""One stage: batches in, steps, metrics and checkpoints out; resumes where it was killed, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lm.data.tokenizer import Tokenizer
from lm.experiment import Experiment, Stage, UserError
from lm.model.flops import peak_flops, update_flops_per_token
from lm.model.transformer import Transformer, num_params
from lm.optimizer import make_optimizer, schedule
from lm.parallel.rules import abstract, batch_sharding, shardings
from lm.steps import STEPS, Step, needs_reference
from lm.train.batches import Batches, check_sampler, updates_per_step
from lm.train.checkpoint import Checkpoints
from lm.train.evaluate import Evaluator
from lm.train.metrics import MetricsLog, Progress, peak_memory_mb
from lm.train.profile import Trace
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
    profile: tuple[int, int] | None = None  # steps of every stage to trace: from, and before which


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

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Account what happens inside under `name`."""
        began = time.monotonic()
        yield
        self.add(name, began)

    def add(self, name: str, since: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - since

    def total(self) -> dict[str, float]:
        return self.seconds | {"seconds": time.monotonic() - self.began}


def train_stage(run: Run, index: int, batches: Batches, model: Transformer, evaluator: Evaluator) -> None:
    """Train a stage to its end from the model before it, or from its newest checkpoint.

    Raises:
        UserError: a loss that is not finite, a sampler that disagrees with the trainer.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    stage = run.experiment.stages[index]
    folder = run.folder.stage_folder(stage.name)
    state, step_fn = start_state(stage, model, run.mesh)
    with MetricsLog(folder) as log, Checkpoints(folder / "checkpoints") as checkpoints:
        state, start, meta = restore(state, checkpoints, run.mesh)
        log.rewind(start)
        loop = _Loop(run, stage, batches, log, checkpoints, meta)
        if due(stage, start):  # it may have been stopped before it measured what it saved
            with loop.costs.of("eval_seconds"):
                evaluator.during(index, state.params, log, start)
        for done, current in loop.steps(state, start, step_fn):
            state = current
            if done == start + 1:  # after a first step, which shows within seconds that the run works
                with loop.costs.of("eval_seconds"):
                    evaluator.before(index, model, log)
                    if done == 1:
                        batches.show(log, done)
            if due(stage, done):
                with loop.costs.of("eval_seconds"):
                    evaluator.during(index, state.params, log, done)
                    batches.show(log, done)
        with loop.costs.of("eval_seconds"):
            evaluator.after(index, state.params, log)
            batches.show(log, stage.steps)
    counts = {
        "steps": stage.steps,
        "tokens": loop.tokens,
        "num_params": num_params(state.params),
        "data": batches.report,
    }
    write_json_atomic(
        run.folder.summary(stage.name), counts | {"peak_memory_mb": peak_memory_mb()} | loop.costs.total()
    )


def due(stage: Stage, step: int) -> bool:
    """Whether held-out measurements are taken between steps `step` and `step` + 1."""
    return bool(stage.eval_every) and step % stage.eval_every == 0 and 0 < step < stage.steps


class _Loop:
    """The steps of one stage, with what they write and what they cost."""

    def __init__(
        self, run: Run, stage: Stage, batches: Batches, log: MetricsLog, checkpoints: Checkpoints, meta: dict[str, Any]
    ):
        self.run, self.stage, self.batches, self.log, self.checkpoints = run, stage, batches, log, checkpoints
        self.costs, self.tokens = Costs(meta.get("costs", {})), int(meta.get("tokens", 0))
        self.updates = updates_per_step(stage)
        self.rate = schedule(stage.optimizer, stage.steps * self.updates)
        self.trace = Trace(run.folder.stage_folder(stage.name) / "profile", run.profile)
        # The part of the chips' peak that a token a second uses; None where the peak is not known.
        peak = peak_flops(jax.devices()[0].device_kind)
        model, vocab_size = run.experiment.model, run.tokenizer.vocab_size
        cost = update_flops_per_token(model, vocab_size, stage.seq_len, needs_reference(stage))
        self.mfu_per_rate = cost / (peak * run.mesh.size) if peak else None

    def steps(self, state: TrainState, start: int, step_fn: Step) -> Iterator[tuple[int, TrainState]]:
        """(steps done, state) after each step from `start`; saves where it should, and when a signal came."""
        self.progress = Progress(self.stage.name, self.stage.steps, start)
        pending: Pending | None = None
        try:
            for step in range(start, self.stage.steps):
                self.trace.before(step + 1)
                state, latest = self._step(state, step, step_fn, first=step == start)
                self.trace.after(step + 1, latest.metrics)
                if pending is not None:
                    self._report(pending)
                pending, stopping = latest, self.run.stop.requested
                if latest.step % self.stage.save_every == 0 or latest.step == self.stage.steps or stopping:
                    self._report(latest)  # raises where the state is not finite: such a one is never saved
                    pending = None
                    self._save(state, latest.step)
                if stopping:
                    self.checkpoints.wait()
                    where = f"step {latest.step} of {self.stage.steps} of stage {self.stage.name}"
                    raise Interrupted(f"{stopping}: saved at {where}")
                yield latest.step, state
        finally:
            self.trace.close()
            self.progress.close()

    def _step(self, state: TrainState, step: int, step_fn: Step, first: bool) -> tuple[TrainState, Pending]:
        with self.costs.of(self.batches.cost):
            batches, extra = self.batches(step, state.params)
        if first:
            check_sampler(state.params, batches[0], self.stage, self.run.experiment.model.compute_dtype)
        began = time.monotonic()
        for batch in batches:
            state, metrics = step_fn(state, jax.device_put(batch, batch_sharding(self.run.mesh)))
        if first:
            jax.block_until_ready(metrics)
            self.costs.add("compile_seconds", began)
            self.costs.seconds.setdefault("first_step_seconds", time.monotonic() - self.run.started)
        seen = sum(int((np.asarray(batch.segments) > 0).sum()) for batch in batches)
        self.tokens += seen
        return state, Pending(step + 1, seen, metrics, extra)

    def _save(self, state: TrainState, step: int) -> None:
        with self.costs.of("save_seconds"):
            meta = {"costs": self.costs.total(), "tokens": self.tokens}
            self.checkpoints.save(step, {"params": state.params, "opt_state": state.opt_state}, meta)

    def _report(self, pending: Pending) -> None:
        """Read a step's metrics, write and show them, and stop the run where the loss is not finite."""
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()} | pending.extra
        line: dict[str, Any] = {"step": pending.step, "time": self.costs.total()["seconds"]}
        line["lr"] = float(self.rate(pending.step * self.updates - 1))
        line["tokens_per_second"] = self.progress.rate(pending.step, pending.tokens)
        if self.mfu_per_rate is not None:
            line["mfu"] = line["tokens_per_second"] * self.mfu_per_rate
        self.log.metrics(line | values)
        bad = [name for name in ("loss", "grad_norm") if not np.isfinite(values[name])]
        if bad:
            name = self.stage.name
            raise UserError(
                f"{name}: {bad[0]} is {values[bad[0]]} at step {pending.step}; the last good checkpoint is kept. "
                f"A lower {name}.optimizer.peak_lr or {name}.optimizer.clip_norm often helps"
            )
        self.progress.update(pending.step, values, pending.tokens)


def start_state(stage: Stage, model: Transformer, mesh: Mesh) -> tuple[TrainState, Step]:
    """The state at step 0 of a stage, born sharded, and its step, which compiles for the mesh on first use."""
    optimizer = make_optimizer(stage.optimizer, stage.steps * updates_per_step(stage))
    init = functools.partial(first_state, stage, optimizer)
    places = shardings(jax.eval_shape(init, model), mesh)
    return jax.jit(init, out_shardings=places)(model), jit_step(stage, optimizer, places, mesh)


def first_state(stage: Stage, optimizer: optax.GradientTransformation, params: Transformer) -> TrainState:
    """What a stage starts from; copies, since the state is donated to every step and the model is the caller's."""
    frozen = {"reference": jax.tree.map(jnp.copy, params)} if needs_reference(stage) else {}
    return TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params), frozen)


def jit_step(stage: Stage, optimizer: optax.GradientTransformation, places: Any, mesh: Mesh) -> Any:
    """The step of a stage, which takes and gives a state in these places."""
    return jax.jit(
        STEPS[type(stage.objective)](stage, optimizer),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, None),
        donate_argnums=0,
    )


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
