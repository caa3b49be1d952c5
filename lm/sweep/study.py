"""Which trial is next, and how each ended: an Optuna study in a journal file, which workers on any host share.

A grid's trials are queued by name; a search's are suggested by Optuna, the base's own settings first, and each is run
with every seed. Who holds a trial is told by a lock in its folder, which ends with its process: one that has begun and is
held by nobody is taken up again.
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
from lm.sweep.trials import Point, Trial, own_point, told, trial_at, trials

LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
DROPPED = "dropped"  # an attribute of trials that nobody ran, because the sweep asks for them no more
AGAIN = "again"  # an attribute of trials that are run although they failed before
_COMPLETE = {"key", "settings", "seed"}  # attributes of a trial that is written down whole
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Claimed:
    """A trial that this process alone holds; `handle` is its lock, which the processes that it starts inherit."""

    number: int
    key: str
    settings: dict[str, str]
    seed: int
    handle: int


class Study:
    """The Optuna study of a sweep. Every method may be called by many processes at the same time.

    Attributes:
        remark: a line about a journal that was damaged; "" where it was not.
        refused: a line for each trial that `take` found impossible, until somebody has said them.
    """

    def __init__(self, sweep: Sweep, folder: SweepFolder):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.folder = sweep, folder
        _, field = metric_name(sweep.base, sweep.metric) if sweep.base.evals else ("", "loss")
        self.refused: list[str] = []
        with folder.alone():
            self.remark = journal.recover(folder.journal)
            self._study = optuna.create_study(
                storage=journal.storage(folder.journal),
                study_name="sweep",
                pruner=_pruner(sweep),
                direction="maximize" if better(field) > 0 else "minimize",
                load_if_exists=True,
            )

    def queue(self, retry_failed: bool = False) -> None:
        """Ask for every trial that the sweep wants and that is not there yet; what is done stays, what waits unwanted goes.

        A trial that cannot run is there as a failed one.

        Args:
            retry_failed: also for those that failed.
        """
        with self.folder.alone():
            if isinstance(self.sweep.search, Suggested):
                self._drop(lambda one: one.user_attrs.get("seed") not in self.sweep.seeds)
                self._queue_seeds(self._known())
                if retry_failed:
                    self._queue_failed()
                return
            wanted = [self.folder.placed(trial) for trial in trials(self.sweep)]
            keys = {trial.key for trial in wanted}
            self._drop(lambda one: one.user_attrs.get("key") not in keys)
            states = {one.user_attrs.get("key"): one.state for one in self._known()}  # the newest of each
            for trial in _breadth_first(wanted):
                self.folder.write_trial(trial, _stages_of(trial))
                again = retry_failed and not trial.impossible
                if states.get(trial.key) in (LIVE if again else (*LIVE, TrialState.FAIL)):
                    continue
                failed = self.folder.failed(trial.key) and not again
                attributes = _attributes(trial) | ({AGAIN: True} if again else {})
                self._add(attributes, TrialState.FAIL if failed else TrialState.WAITING)
            self.folder.want_only(keys)

    def take(self) -> Claimed | None:
        """The next trial, held by this process; None if there is none now: look at `open` for whether there will be."""
        with self.folder.alone():
            for one in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if _COMPLETE - set(one.user_attrs):  # its worker was killed between two lines of the journal
                    self._drop_half(one)
                elif (handle := try_lock(self.folder.trial(one.user_attrs["key"]) / "claim")) is not None:
                    if AGAIN in one.user_attrs or not self.folder.failed(one.user_attrs["key"]):
                        return _claimed(one, handle)
                    os.close(handle)
                    self._study.tell(
                        one.number, state=TrialState.FAIL
                    )  # as it did before its end in the journal was lost
            while self._more():
                if (claimed := self._ask()) is not None:
                    return claimed
            return None

    def _more(self) -> bool:
        """Whether a trial waits, or a search has more to suggest; seeds that a killed worker left out are queued first."""
        if self._waiting() or self._may_suggest():
            return True
        if isinstance(self.sweep.search, Suggested):
            self._queue_seeds(self._known())
        return self._waiting()

    def _waiting(self) -> bool:
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def open(self) -> bool:
        """Whether any trial is still to be run, or is being run."""
        states = (TrialState.WAITING, TrialState.RUNNING)
        return bool(self._study.get_trials(deepcopy=False, states=states)) or self._may_suggest()

    def report(self, claimed: Claimed, step: int, value: float) -> bool:
        """Tell a number on the way; whether the trial is to end here, because others were better at this step."""
        found = self._study.get_trials(deepcopy=False)[claimed.number]
        trial = optuna.trial.Trial(self._study, found._trial_id)
        if step not in found.intermediate_values:
            trial.report(value, step)
        return trial.should_prune()

    def tell(self, claimed: Claimed, value: float | None = None, failed: str = "", pruned: bool = False) -> None:
        """How a trial ended: with its number, with a reason, or early."""
        self.folder.update(claimed.key, failed=failed, pruned=pruned)
        state = TrialState.FAIL if failed else TrialState.PRUNED if pruned else TrialState.COMPLETE
        self._study.tell(claimed.number, value if state == TrialState.COMPLETE else None, state)

    def counts(self) -> tuple[int, int]:
        """(trials that have ended, trials known so far)."""
        known = self._known()
        return sum(one.state in ENDED for one in known), len(known)

    def all_failed(self) -> bool:
        """Whether trials have ended, and none with a number."""
        ended = [one for one in self._known() if one.state in ENDED]
        return bool(ended) and all(one.state == TrialState.FAIL for one in ended)

    def failures(self) -> list[str]:
        """A line for each trial that failed: its settings and why."""
        failed = self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        keys = dict.fromkeys(one.user_attrs["key"] for one in failed if "key" in one.user_attrs)
        records = [record for key in keys if (record := self.folder.read_record(key))]
        failing = [one for one in records if one["wanted"] and one.get("failed")]
        return [f"{told(one['settings'])}, seed {one['seed']}: {one['failed']}" for one in failing]

    def _known(self) -> list[FrozenTrial]:
        return [one for one in self._study.get_trials(deepcopy=False) if DROPPED not in one.user_attrs]

    def _drop(self, unwanted: Callable[[FrozenTrial], bool]) -> None:
        """Let no worker take a trial that waits and is not wanted any more; it may be asked for again."""
        storage = self._study._storage  # a study cannot end what has not begun
        for one in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if unwanted(one):
                storage.set_trial_user_attr(one._trial_id, DROPPED, True)
                storage.set_trial_state_values(one._trial_id, TrialState.FAIL)

    def _drop_half(self, one: FrozenTrial) -> None:
        """End a trial that was asked for and not written down whole; what it was asked for with is asked for again."""
        self._study._storage.set_trial_user_attr(one._trial_id, DROPPED, True)
        self._study.tell(one.number, state=TrialState.FAIL)
        asked = {name: one.user_attrs[name] for name in ("seed", AGAIN) if name in one.user_attrs}
        params = one.system_attrs.get("fixed_params", one.params)
        if "seed" in asked and set(params) == set(self.sweep.axes):
            self._study.enqueue_trial(params, user_attrs=asked)

    # ---- a search --------------------------------------------------------------------------------------------

    def _queue_seeds(self, known: list[FrozenTrial]) -> None:
        """The base's own settings, where nothing has begun; and every setting with every seed."""
        settings = _seeds_of(known)
        if not settings and (own := own_point(self.sweep)) is not None:
            settings = [(_on_axes(self.sweep, own), set())]
        for params, seeds in settings:
            for seed in self.sweep.seeds:
                if seed not in seeds:
                    self._study.enqueue_trial(params, user_attrs={"seed": seed})

    def _queue_failed(self) -> None:
        """Every setting that has failed and is wanted, once more."""
        failed = {
            one.user_attrs["key"]: one
            for one in self._known()
            if one.state == TrialState.FAIL and set(one.user_attrs) >= _COMPLETE
        }
        for key, one in failed.items():
            if self.folder.failed(key) and one.user_attrs["seed"] in self.sweep.seeds:
                self._study.enqueue_trial(one.params, user_attrs={"seed": one.user_attrs["seed"], AGAIN: True})

    def _may_suggest(self) -> bool:
        search = self.sweep.search
        if not isinstance(search, Suggested):
            return False
        attributes = [one.user_attrs for one in self._known()]
        return sum(a.get("seed") == self.sweep.seeds[0] and AGAIN not in a for a in attributes) < search.trials

    def _ask(self) -> Claimed | None:
        """The next trial; None where it has ended at once, or somebody runs the same experiment."""
        distributions = {}
        if isinstance(self.sweep.search, Suggested):
            self._study.sampler = _sampler(self.sweep, len(self._study.get_trials(deepcopy=False)))
            distributions = {name: _distribution(self.sweep, name) for name in self.sweep.axes}
        asked = self._study.ask(distributions)
        if isinstance(self.sweep.search, Suggested) and not self._placed(asked):
            return None
        handle = try_lock(self.folder.trial(asked.user_attrs["key"]) / "claim")
        if handle is None:  # the same experiment twice, and the other one runs: whoever is free next looks again
            return None
        return _claimed(self._study.get_trials(deepcopy=False)[asked.number], handle)

    def _placed(self, asked: optuna.trial.Trial) -> bool:
        """Give a suggestion its seed, experiment and folder; False where there is nothing to run, and it has ended."""
        if "seed" not in asked.user_attrs:
            asked.set_user_attr("seed", self.sweep.seeds[0])
            for seed in self.sweep.seeds[1:]:
                self._study.enqueue_trial(asked.params, user_attrs={"seed": seed})
        trial = trial_at(self.sweep, _on_axes(self.sweep, asked.params), asked.user_attrs["seed"])
        if trial is None:
            self._study.tell(asked, state=TrialState.PRUNED)
            return False
        trial = self.folder.placed(trial)
        self.folder.write_trial(trial, _stages_of(trial))
        for name, value in _attributes(trial).items():
            asked.set_user_attr(name, value)
        failed = trial.impossible or ("" if AGAIN in asked.user_attrs else self.folder.failed(trial.key))
        if failed:  # impossible, or a search that came to the same setting again
            self.refused.append(f"{told(trial.settings)}, seed {trial.experiment.seed}: {failed}")
            self._study.tell(asked, state=TrialState.FAIL)
        return not failed

    def _add(self, attributes: dict[str, Any], state: TrialState) -> None:
        self._study.add_trial(create_trial(state=state, user_attrs=attributes))


def _attributes(trial: Trial) -> dict[str, Any]:
    return {"key": trial.key, "settings": trial.settings, "seed": trial.experiment.seed}


def _stages_of(trial: Trial) -> list[str]:
    """Keys of the stages of a trial; of one that cannot run none."""
    return [] if trial.impossible else stage_keys(trial.experiment)


def _claimed(one: FrozenTrial, handle: int) -> Claimed:
    return Claimed(one.number, one.user_attrs["key"], one.user_attrs["settings"], one.user_attrs["seed"], handle)


def _breadth_first(wanted: list[Trial]) -> list[Trial]:
    """The first trial of every different start, then the others, so that workers do not wait for one another's stages."""
    seen: set[str] = set()
    early: list[Trial] = []
    late: list[Trial] = []
    for trial in wanted:
        start = "".join(_stages_of(trial)[:1])
        (late if start in seen else early).append(trial)
        seen.add(start)
    return early + late


def _seeds_of(known: list[FrozenTrial]) -> list[tuple[dict[str, Any], set[int]]]:
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


def _on_axes(sweep: Sweep, values: Point) -> Point:
    """In the order of the axes, which conditions need."""
    return {name: values[name] for name in sweep.axes}


def _sampler(sweep: Sweep, asked: int) -> optuna.samplers.BaseSampler:
    """Its own seed for every suggestion, so that one does not depend on which worker asks."""
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
