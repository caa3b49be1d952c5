"""Stages that trials have in common: addressed by everything that determines them, so that each is trained once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lm.changes import without_defaults
from lm.config.former import former_value
from lm.experiment import Experiment, Source, resolve_sources
from lm.sweep.trials import digest


def stage_keys(experiment: Experiment) -> list[str]:
    """For each stage a digest of all that determines what it leaves: itself, the stages before it, and what they share.

    The vocabulary, where it is learnt, is learnt from the sources of all stages. Evaluations use no randomness of the
    training, and what they write lies in the stage's folder: they belong to its key.
    """
    resolved = resolve_sources(experiment)
    plain = without_defaults(resolved)
    common = {name: value for name, value in plain.items() if name not in ("name", "stages")}
    if experiment.tokenizer.path is None:
        common["texts"] = [_text(source) for stage in resolved.stages for source in stage.sources]
    return [digest([common, plain["stages"][: last + 1]]) for last in range(len(plain["stages"]))]


def _text(source: Source) -> list[Any]:
    return [former_value("path", source.path), source.holdout, source.weight > 0]


def pieces(keys: list[str], everybody: Iterable[list[str]]) -> list[range]:
    """The stages of a trial, cut where fewer trials go on together than came so far: each piece is one process.

    Args:
        keys: of the trial's stages.
        everybody: those of every trial, its own among them.
    """
    shared = Counter(key for one in everybody for key in one)
    ends = [i + 1 for i in range(len(keys)) if i + 1 == len(keys) or shared[keys[i]] != shared[keys[i + 1]]]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
