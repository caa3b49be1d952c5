"""Stages shared by trials: each has a key, a digest of everything that determines it, and is trained once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lm.changes import without_defaults
from lm.config.former import former_value
from lm.experiment import Experiment, Source, resolve_sources
from lm.sweep.trials import digest


def stage_keys(experiment: Experiment) -> list[str]:
    """For each stage a digest of everything that determines its files: the stage, all earlier stages, and the other fields.

    A tokenizer that is trained depends on the sources of all stages, which are then part of every key. Evals are part of
    the key because their results are written to the stage's folder.
    """
    resolved = resolve_sources(experiment)
    plain = without_defaults(resolved)
    common = {name: value for name, value in plain.items() if name not in ("name", "sinks", "stages")}
    if experiment.tokenizer.path is None:
        common["texts"] = [_text(source) for stage in resolved.stages for source in stage.sources]
    return [digest([common, plain["stages"][: last + 1]]) for last in range(len(plain["stages"]))]


def _text(source: Source) -> list[Any]:
    return [former_value("path", source.path), source.holdout, source.weight > 0]


def pieces(keys: list[str], all_keys: Iterable[list[str]]) -> list[range]:
    """Split a trial's stages wherever fewer trials share the next stage; each piece is trained by one process.

    Args:
        keys: keys of the trial's stages.
        all_keys: the keys of every trial's stages, including this one's.

    Returns:
        Ranges of stage indices.
    """
    shared = Counter(key for one in all_keys for key in one)
    ends = [i + 1 for i in range(len(keys)) if i + 1 == len(keys) or shared[keys[i]] != shared[keys[i + 1]]]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
