"""Data counts of a run: examples, tokens, truncated and dropped, by stage and source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm.train.run_files import Line, Run, StageFiles


@dataclass(frozen=True)
class SourceCounts:
    """Counts of one source, as text. `partial`: counts so far of an endless source."""

    source: str
    examples: str
    tokens: str
    trained: str
    truncated: str
    dropped: str
    reasons: list[str]
    partial: bool


@dataclass(frozen=True)
class StageCounts:
    """Counts of a stage's sources; older runs have text lines (`said`) instead."""

    stage: str
    sources: list[SourceCounts]
    said: list[str]


def data_counts(run: Run) -> list[StageCounts]:
    """The counts of every finished stage."""
    found = [_stage(stage, stage.summary) for stage in run.stages if stage.summary]
    return [one for one in found if one.sources or one.said]


def _stage(stage: StageFiles, summary: Line) -> StageCounts:
    sources = [_source(one) for one in summary.get("sources") or [] if isinstance(one, dict)]
    said = [] if sources else [line for line in str(summary.get("data") or "").splitlines() if line.strip()]
    return StageCounts(stage.name, sources, said)


def _source(one: dict[str, Any]) -> SourceCounts:
    dropped = {str(reason): int(count) for reason, count in (one.get("dropped") or {}).items() if count}
    first = one.get("first") or {}
    reasons = [
        f"{count:,} {reason}" + (f", the first: {first[reason]}" if first.get(reason) else "")
        for reason, count in dropped.items()
    ]
    if one.get("truncated_tokens"):
        reasons.append(f"{_number(one['truncated_tokens'])} tokens cut off")
    if one.get("unread"):
        reasons.append(f"columns not read: {', '.join(map(str, one['unread']))}")
    unit = one.get("unit") or "examples"
    return SourceCounts(
        source=str(one.get("source", "")),
        examples=f"{_number(one.get('examples'))} {unit}",
        tokens=_number(one.get("tokens")),
        trained=_number(one.get("trained_tokens") or None),  # of prompts, and where nothing is known: none
        truncated=_number(one.get("truncated")),
        dropped=_number(sum(dropped.values())),
        reasons=reasons,
        partial=bool(one.get("partial")),
    )


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else "–"
