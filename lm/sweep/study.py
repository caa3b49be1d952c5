"""Scheduling of a sweep's trials: an Optuna study in a journal file, shared by workers on any host.

A grid's trials are all queued; a search's are suggested by Optuna, the base's own settings first, and each is run with
every seed. The worker that runs a trial holds a lock in its folder, which ends with its process: a trial that has begun
and whose lock is free is resumed by the next worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lm.overrides import leaf
from lm.sweep import journal
from lm.sweep.folder import SweepFolder, try_lock
from lm.sweep.results import better, metric_name
from lm.sweep.shared import stage_keys
from lm.sweep.sweep import TPE, Halving, LogUniform, Range, Suggested, Sweep
from lm.sweep.trials import Point, Trial, base_point, settings_text, trial_at, trials

LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
DROPPED = "dropped"  # attribute of trials that were not run because the sweep no longer wants them
AGAIN = "again"  # attribute of failed trials that are run again
_COMPLETE = {"key", "settings", "seed"}  # attributes that every completely recorded trial has
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial locked by this process; `handle` is the lock's file descriptor, which its child processes inherit."""

    number: int
    key: str
    settings: dict[str, str]
    seed: int
    handle: int


class Study:
    """The Optuna study of a sweep. Every method may be called by several processes at the same time.

    Attributes:
        remark: a message about a damaged journal; "" if it is intact.
        refused: messages about impossible trials found by `take`, until the worker has printed them.
    """

    def __init__(self, sweep: Sweep, folder: SweepFolder):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.folder = sweep, folder
        _, field = metric_name(sweep.base, sweep.metric) if sweep.base.evals else ("", "loss")
        self.refused: list[str] = []
        with folder.locked():
            self.remark = journal.recover(folder.journal)
            self._study = optuna.create_study(
                storage=journal.storage(folder.journal),
                study_name="sweep",
                pruner=_pruner(sweep),
                direction="maximize" if better(field) > 0 else "minimize",
                load_if_exists=True,
            )

    def queue(self, retry_failed: bool = False) -> None:
        """Queue every wanted trial that has not ended, and drop queued trials that are no longer wanted.

        A trial that cannot run is recorded as failed.

        Args:
            retry_failed: whether to queue failed trials again.
        """
        with self.folder.locked():
            if isinstance(self.sweep.search, Suggested):
                self._drop(lambda one: one.user_attrs.get("seed") not in self.sweep.seeds)
                self._queue_seeds(self._trials())
                if retry_failed:
                    self._queue_failed()
                return
            wanted = [self.folder.with_existing_key(trial) for trial in trials(self.sweep)]
            keys = {trial.key for trial in wanted}
            self._drop(lambda one: one.user_attrs.get("key") not in keys)
            states = {one.user_attrs.get("key"): one.state for one in self._trials()}  # the newest state of each trial
            for trial in _breadth_first(wanted):
                self.folder.write_trial(trial, _stages_of(trial))
                again = retry_failed and not trial.impossible
                if states.get(trial.key) in (LIVE if again else (*LIVE, TrialState.FAIL)):
                    continue
                failed = self.folder.failed(trial.key) and not again
                attributes = _attributes(trial) | ({AGAIN: True} if again else {})
                self._add(attributes, TrialState.FAIL if failed else TrialState.WAITING)
            self.folder.want_only(keys)

    def take(self) -> ClaimedTrial | None:
        """Take and lock the next trial; None if there is none at present (`open` tells whether more may follow)."""
        with self.folder.locked():
            for one in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if _COMPLETE - set(one.user_attrs):  # its worker was killed between two lines of the journal
                    self._requeue_incomplete(one)
                elif (handle := try_lock(self.folder.trial(one.user_attrs["key"]) / "claim")) is not None:
                    if AGAIN in one.user_attrs or not self.folder.failed(one.user_attrs["key"]):
                        return _claimed(one, handle)
                    os.close(handle)
                    self._study.tell(
                        one.number, state=TrialState.FAIL
                    )  # it failed before, but its end was lost from the journal
            while self._has_next():
                if (claimed := self._ask()) is not None:
                    return claimed
            return None

    def _has_next(self) -> bool:
        """Whether a trial is queued or a search may suggest one; queues seeds that a killed worker did not."""
        if self._waiting() or self._can_suggest():
            return True
        if isinstance(self.sweep.search, Suggested):
            self._queue_seeds(self._trials())
        return self._waiting()

    def _waiting(self) -> bool:
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def open(self) -> bool:
        """Whether any trial is queued, running, or yet to be suggested."""
        states = (TrialState.WAITING, TrialState.RUNNING)
        return bool(self._study.get_trials(deepcopy=False, states=states)) or self._can_suggest()

    def report(self, claimed: ClaimedTrial, step: int, value: float) -> bool:
        """Report an intermediate value; returns whether the search ends the trial because others were better at this step."""
        found = self._study.get_trials(deepcopy=False)[claimed.number]
        trial = optuna.trial.Trial(self._study, found._trial_id)
        if step not in found.intermediate_values:
            trial.report(value, step)
        return trial.should_prune()

    def tell(self, claimed: ClaimedTrial, value: float | None = None, failed: str = "", pruned: bool = False) -> None:
        """Record the end of a trial: with its value, as failed with a reason, or as ended early."""
        self.folder.update(claimed.key, failed=failed, pruned=pruned)
        state = TrialState.FAIL if failed else TrialState.PRUNED if pruned else TrialState.COMPLETE
        self._study.tell(claimed.number, value if state == TrialState.COMPLETE else None, state)

    def counts(self) -> tuple[int, int]:
        """(number of trials that have ended, number of trials so far)."""
        known = self._trials()
        return sum(one.state in ENDED for one in known), len(known)

    def all_failed(self) -> bool:
        """Whether trials have ended and all of them failed."""
        ended = [one for one in self._trials() if one.state in ENDED]
        return bool(ended) and all(one.state == TrialState.FAIL for one in ended)

    def failures(self) -> list[str]:
        """A line for each failed trial: settings and reason."""
        failed = self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        keys = dict.fromkeys(one.user_attrs["key"] for one in failed if "key" in one.user_attrs)
        records = [record for key in keys if (record := self.folder.read_record(key))]
        failing = [one for one in records if one["wanted"] and one.get("failed")]
        return [f"{settings_text(one['settings'])}, seed {one['seed']}: {one['failed']}" for one in failing]

    def _trials(self) -> list[FrozenTrial]:
        return [one for one in self._study.get_trials(deepcopy=False) if DROPPED not in one.user_attrs]

    def _drop(self, unwanted: Callable[[FrozenTrial], bool]) -> None:
        """Remove unwanted trials from the queue; they may be queued again later."""
        storage = self._study._storage  # Optuna's public API cannot end a queued trial
        for one in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if unwanted(one):
                storage.set_trial_user_attr(one._trial_id, DROPPED, True)
                storage.set_trial_state_values(one._trial_id, TrialState.FAIL)

    def _requeue_incomplete(self, one: FrozenTrial) -> None:
        """End a trial whose record is incomplete, and queue its parameters again."""
        self._study._storage.set_trial_user_attr(one._trial_id, DROPPED, True)
        self._study.tell(one.number, state=TrialState.FAIL)
        asked = {name: one.user_attrs[name] for name in ("seed", AGAIN) if name in one.user_attrs}
        params = one.system_attrs.get("fixed_params", one.params)
        if "seed" in asked and set(params) == set(self.sweep.axes):
            self._study.enqueue_trial(params, user_attrs=asked)

    # ---- a search --------------------------------------------------------------------------------------------

    def _queue_seeds(self, known: list[FrozenTrial]) -> None:
        """Queue every known setting with every seed it lacks; at the start of a search, the base's own settings."""
        settings = _seeds_by_params(known)
        if not settings and (own := base_point(self.sweep)) is not None:
            settings = [(_in_axis_order(self.sweep, own), set())]
        for params, seeds in settings:
            for seed in self.sweep.seeds:
                if seed not in seeds:
                    self._study.enqueue_trial(params, user_attrs={"seed": seed})

    def _queue_failed(self) -> None:
        """Queue every wanted setting that failed once more."""
        failed = {
            one.user_attrs["key"]: one
            for one in self._trials()
            if one.state == TrialState.FAIL and set(one.user_attrs) >= _COMPLETE
        }
        for key, one in failed.items():
            if self.folder.failed(key) and one.user_attrs["seed"] in self.sweep.seeds:
                self._study.enqueue_trial(one.params, user_attrs={"seed": one.user_attrs["seed"], AGAIN: True})

    def _can_suggest(self) -> bool:
        search = self.sweep.search
        if not isinstance(search, Suggested):
            return False
        attributes = [one.user_attrs for one in self._trials()]
        return sum(a.get("seed") == self.sweep.seeds[0] and AGAIN not in a for a in attributes) < search.trials

    def _ask(self) -> ClaimedTrial | None:
        """Ask Optuna for the next trial; None if it has ended at once or another worker runs the same experiment."""
        distributions = {}
        if isinstance(self.sweep.search, Suggested):
            self._study.sampler = _sampler(self.sweep, len(self._study.get_trials(deepcopy=False)))
            distributions = {name: _distribution(self.sweep, name) for name in self.sweep.axes}
        asked = self._study.ask(distributions)
        if isinstance(self.sweep.search, Suggested) and not self._prepare_suggestion(asked):
            return None
        handle = try_lock(self.folder.trial(asked.user_attrs["key"]) / "claim")
        if handle is None:  # another worker runs the same experiment: the next free worker tries again
            return None
        return _claimed(self._study.get_trials(deepcopy=False)[asked.number], handle)

    def _prepare_suggestion(self, asked: optuna.trial.Trial) -> bool:
        """Give a suggested trial its seed, experiment and folder; returns False if it cannot run and was ended."""
        if "seed" not in asked.user_attrs:
            asked.set_user_attr("seed", self.sweep.seeds[0])
            for seed in self.sweep.seeds[1:]:
                self._study.enqueue_trial(asked.params, user_attrs={"seed": seed})
        trial = trial_at(self.sweep, _in_axis_order(self.sweep, asked.params), asked.user_attrs["seed"])
        if trial is None:
            self._study.tell(asked, state=TrialState.PRUNED)
            return False
        trial = self.folder.with_existing_key(trial)
        self.folder.write_trial(trial, _stages_of(trial))
        for name, value in _attributes(trial).items():
            asked.set_user_attr(name, value)
        failed = trial.impossible or ("" if AGAIN in asked.user_attrs else self.folder.failed(trial.key))
        if failed:  # impossible, or suggested again after it failed
            self.refused.append(f"{settings_text(trial.settings)}, seed {trial.experiment.seed}: {failed}")
            self._study.tell(asked, state=TrialState.FAIL)
        return not failed

    def _add(self, attributes: dict[str, Any], state: TrialState) -> None:
        self._study.add_trial(create_trial(state=state, user_attrs=attributes))


def _attributes(trial: Trial) -> dict[str, Any]:
    return {"key": trial.key, "settings": trial.settings, "seed": trial.experiment.seed}


def _stages_of(trial: Trial) -> list[str]:
    """The keys of a trial's stages; [] if it cannot run."""
    return [] if trial.impossible else stage_keys(trial.experiment)


def _claimed(one: FrozenTrial, handle: int) -> ClaimedTrial:
    return ClaimedTrial(one.number, one.user_attrs["key"], one.user_attrs["settings"], one.user_attrs["seed"], handle)


def _breadth_first(wanted: list[Trial]) -> list[Trial]:
    """Order trials so that those with distinct first stages come first: workers then wait less for shared stages."""
    seen: set[str] = set()
    early: list[Trial] = []
    late: list[Trial] = []
    for trial in wanted:
        start = "".join(_stages_of(trial)[:1])
        (late if start in seen else early).append(trial)
        seen.add(start)
    return early + late


def _seeds_by_params(known: list[FrozenTrial]) -> list[tuple[dict[str, Any], set[int]]]:
    found: dict[str, tuple[dict[str, Any], set[int]]] = {}
    for one in known:
        params = one.params or one.system_attrs.get("fixed_params", {})
        found.setdefault(repr(sorted(params.items())), (params, set()))[1].add(one.user_attrs.get("seed", -1))
    return list(found.values())


def _distribution(sweep: Sweep, name: str) -> BaseDistribution:
    values = sweep.axes[name]
    if not isinstance(values, Range):
        return CategoricalDistribution(list(range(len(values))))
    log = isinstance(values, LogUniform)
    if leaf(sweep.base, name)[0] is int:
        return IntDistribution(int(values.low), int(values.high), log=log)
    return FloatDistribution(values.low, values.high, log=log)


def _in_axis_order(sweep: Sweep, values: Point) -> Point:
    """Order values by the sweep's axes, which conditions depend on."""
    return {name: values[name] for name in sweep.axes}


def _sampler(sweep: Sweep, asked: int) -> optuna.samplers.BaseSampler:
    """The search's sampler, seeded by the number of trials so far, so that suggestions do not depend on the worker."""
    search: Any = sweep.search
    if isinstance(search, TPE):
        return optuna.samplers.TPESampler(
            seed=1000 * search.seed + asked,
            n_startup_trials=search.startup * len(sweep.seeds),
            multivariate=True,
            constant_liar=True,
        )
    return optuna.samplers.RandomSampler(seed=1000 * search.seed + asked)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    if isinstance(sweep.search, Halving):
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=sweep.search.first, reduction_factor=sweep.search.reduction
        )
    return optuna.pruners.NopPruner()
