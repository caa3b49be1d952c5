"""Rows that a Collect stage writes and later stages of its run read: where they are, and whether they are there."""

from __future__ import annotations

from dataclasses import replace

from lm.experiment import (
    COLLECTED,
    Experiment,
    Source,
    Stage,
)
from lm.train.run_folder import RunFolder

ROWS_FILE = "made.jsonl"  # the rows of a Collect stage, in its folder


def with_collected_paths(experiment: Experiment, folder: RunFolder) -> Experiment:
    """The experiment with every source `collected:STAGE` replaced by the file that the stage writes in this folder."""

    def here(source: Source) -> Source:
        if not source.path.startswith(COLLECTED):
            return source
        return replace(source, path=str(folder.stage_folder(source.path.removeprefix(COLLECTED)) / ROWS_FILE))

    stages = tuple(replace(stage, sources=tuple(map(here, stage.sources))) for stage in experiment.stages)
    evals = tuple(replace(item, source=here(item.source)) for item in experiment.evals)
    return replace(experiment, stages=stages, evals=evals)


def is_collected(source: Source) -> bool:
    """Whether a source (of an experiment from `with_collected_paths`) is the file that a Collect stage writes."""
    return source.path.endswith(f"/{ROWS_FILE}")


def inputs_ready(stage: Stage, experiment: Experiment, folder: RunFolder) -> bool:
    """Whether all Collect stages whose rows the stage (of an experiment from `with_collected_paths`) reads are finished."""
    makers = {str(folder.stage_folder(s.name) / ROWS_FILE): s.name for s in experiment.stages}
    return all(folder.finished(makers[source.path]) for source in stage.sources if source.path in makers)
