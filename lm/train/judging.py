"""Scores a file of preference pairs with a reward model, an ensemble of several runs', or an implicit reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.chat import is_tie
from lm.data.layouts import canonical
from lm.data.selection import held_out_elsewhere, select, trained_places
from lm.data.sources import Rows, load_rows, why_missing
from lm.data.split import split_key
from lm.data.vocabulary import load_tokenizer
from lm.evals.pairs import Scored, score_pairs, share_right, texts_of_pair
from lm.evals.preferences import Worth, prefers_shorter, worth
from lm.evals.rows import Subject
from lm.experiment import Source, UserError, from_dict
from lm.parallel.mesh import make_mesh
from lm.train.base import base_stage
from lm.train.collected import with_collected_paths
from lm.train.models import StoredRun, load_model, model_before, stage_index
from lm.train.run_folder import RunFolder
from lm.train.scorers import load_scorer


@dataclass(frozen=True)
class PairScores:
    """Result of `judge_pairs`.

    `members` has each run's own accuracy. `what` (the model), `baseline_of` (the pairs that the length baseline is taken
    from) and `remark` (a warning about trained pairs, or "") are texts to print.
    """

    what: str
    path: str
    scored: Scored
    worth: Worth
    members: list[float]
    baseline_of: str
    remark: str

    def to_json(self) -> dict[str, Any]:
        """The result as a plain object for JSON."""
        found = {
            name: value._asdict() if hasattr(value, "_asdict") else value
            for name, value in self.worth._asdict().items()
        }
        found |= {name: [one._asdict() for one in getattr(self.worth, name)] for name in ("calibration", "by_length")}
        counts = {
            "pairs": len(self.scored.gaps),
            "cut": self.scored.cut,
            "left_out": self.scored.left_out,
            "ties": self.scored.ties,
        }
        return {
            "model": self.what, "file": self.path, **counts, **found, "members": self.members, "remark": self.remark,
        }  # fmt: skip


def judge_pairs(runs: Sequence[Path], stage: str | None, path: str, holdout: float | None) -> PairScores:
    """Score the pairs of a file, all or those held out at `holdout`; several runs form an ensemble.

    Raises:
        UserError: there is no such file or stage, a row is not a pair, no pair fits the context, or the runs have
            different tokenizers.
    """
    rows = load_rows(path)
    indices = range(len(rows)) if holdout is None else select(Source(path, holdout=holdout), "heldout")[1]
    pairs = [canonical(rows[i]) for i in indices]
    wheres = [rows.where(i) for i in indices]
    subjects = [_subject(run, stage) for run in runs]
    if len({subject.tokenizer.fingerprint for _, subject in subjects}) > 1:
        raise UserError(
            f"{runs[0]} and the other runs have different tokenizers: an ensemble needs runs with the same one"
        )
    found = [score_pairs(pairs, wheres, subject) for _, subject in subjects]
    scored = found[0]._replace(gaps=np.mean([one.gaps for one in found], axis=0))
    if not scored.rows:
        raise UserError(
            f"{path}: none of {len(pairs)} pairs can be compared in model.max_len {subjects[0][1].model.config.max_len}"
        )
    if holdout is None:
        longer, of = scored.longer, "these pairs themselves"
    else:
        train = select(Source(path, holdout=holdout), "train")[1]
        longer, of = _lengths(rows, train, subjects[0][1]), "the pairs not held out"
    name = subjects[0][0] if len(runs) == 1 else f"{len(runs)} reward models together"
    prompts = [split_key(row) for row in scored.rows]
    return PairScores(
        name, path, scored, worth(scored.gaps, scored.longer, prefers_shorter(longer), prompts),
        [share_right(one.gaps) for one in found], of, "; ".join(filter(None, (_trained_pairs_warning(run, rows, indices, holdout) for run in runs))),
    )  # fmt: skip


def _trained_pairs_warning(run_dir: Path, rows: Rows, indices: Sequence[int], holdout: float | None) -> str:
    """A warning if the run was trained on scored pairs or their prompts; "" otherwise."""
    folder = RunFolder(run_dir)
    experiment = with_collected_paths(from_dict(folder.read_experiment()), folder)
    sources = [source for stage in experiment.stages for source in stage.sources]
    same = [source.holdout for source in sources if Path(source.path).resolve() == Path(rows.path).resolve()]
    if same and (holdout is None or holdout > min(same)):
        return f"{run_dir} was trained on pairs of this file: --heldout {min(same):g} scores only those held out"
    if rows.generated or any(why_missing(source.path) for source in sources):
        return ""
    trained = trained_places(sources, held_out_elsewhere(experiment))
    known = int(np.isin(rows.measures.places[np.asarray(indices)], trained).sum())
    return f"{run_dir} was trained on the prompts of {known} of the {len(indices)} pairs" if known else ""


def _subject(run_dir: Path, stage: str | None) -> tuple[str, Subject]:
    """The name and model that score: the requested stage of a run, or its last reward model."""
    folder = RunFolder(run_dir)
    experiment = with_collected_paths(from_dict(folder.read_experiment()), folder)
    tokenizer = load_tokenizer(folder.tokenizer)
    run = StoredRun(experiment, folder, tokenizer, make_mesh(type(experiment.mesh)(data=1)))
    if stage is not None:
        stage_index(experiment, stage)
    kinds = {s.name: s.objective for s in experiment.stages}
    scorers = [name for name, kind in kinds.items() if kind.produces == "scorer"]
    if stage is None and not scorers:
        speaks = [name for name, kind in kinds.items() if kind.produces == "policy"]
        raise UserError(
            f"{run_dir} has no reward model; --stage takes the implicit reward of one of {', '.join(speaks)}"
        )
    name = stage or scorers[-1]
    if name in scorers:
        return f"{run_dir}, {name}", Subject(load_scorer(run, name), tokenizer)
    first = next((i for i, s in enumerate(experiment.stages) if s.objective.learns_preferences), None)
    if first is None or stage_index(experiment, name) < first:
        raise UserError(
            f"stage {name} of {run_dir} comes before any preference stage: it has no reference, so no implicit reward"
        )
    model = load_model(run, name)
    known = {base_stage(experiment, stage_index(experiment, name)): model}  # an adapter's reference shares its base
    reference, _ = model_before(run, first, known)
    return f"{run_dir}, {name} (implicit reward)", Subject(model, tokenizer, reference)


def _lengths(rows: Rows, indices: Sequence[int], subject: Subject) -> np.ndarray:
    """Length gap of each pair in tokens (chosen minus rejected), without scoring."""
    sizes = [
        [len(subject.tokenizer.encode(text)) for text in texts_of_pair(rows[i], rows.where(i))[1:]]
        for i in indices
        if not is_tie(rows[i], rows.where(i))
    ]
    chosen, rejected = np.array(sizes, np.float64).reshape(-1, 2).T
    return chosen - rejected
