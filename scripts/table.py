"""Print the held-out numbers of one or more runs (seeds) as a Markdown table: `scripts/table.py RUN [RUN ...]`.

With several runs each cell is a mean with its 95 % interval (Student's t), and the change over each stage is given
with the interval of the paired differences.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

from lm.experiment import UserError, from_dict
from lm.stored import read_json
from lm.train.metrics import read_lines
from lm.train.run_folder import RunFolder

T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # by degrees of freedom
ENDS = 8  # steps at the beginning and the end of a stage over which its rollouts' reward is averaged


def interval(values: list[float]) -> str:
    """Mean, with half the width of its 95 % interval if there is more than one value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def number(folder: RunFolder, stage: str, name: str, when: str, value: str) -> float | None:
    """The value in the last line of eval.jsonl for an eval."""
    lines = read_lines(folder.stage_folder(stage) / "eval.jsonl")
    found = [line[value] for line in lines if line["eval"] == name and line["when"] == when and value in line]
    return found[-1] if found else None


def main(paths: list[str]) -> None:
    folders = [RunFolder(Path(path)) for path in paths]
    experiment = from_dict(folders[0].read_experiment())
    print(f"| stage | measure | before | after | change |\n|---|---|---|---|---|  <!-- {len(paths)} run(s) -->")
    for stage in experiment.stages:
        for item in experiment.evals:
            for value in {"reward": ("reward", "eos_rate")}.get(item.metric, (item.metric,)):
                sides = [[number(f, stage.name, item.name, w, value) for f in folders] for w in ("before", "after")]
                pairs = [(a, b) for a, b in zip(*sides, strict=True) if a is not None and b is not None]
                if pairs:
                    cells = [
                        interval([a for a, _ in pairs]),
                        interval([b for _, b in pairs]),
                        interval([b - a for a, b in pairs]),
                    ]
                    print(f"| {stage.name} | {item.name} {value} | {' | '.join(cells)} |")
        rewards = [
            [line["reward"] for line in read_lines(f.stage_folder(stage.name) / "metrics.jsonl") if "reward" in line]
            for f in folders
        ]
        if all(len(one) >= 2 * ENDS for one in rewards):
            sides = [[statistics.fmean(one[part]) for one in rewards] for part in (slice(ENDS), slice(-ENDS, None))]
            cells = [interval(side) for side in (*sides, [b - a for a, b in zip(*sides, strict=True)])]
            print(f"| {stage.name} | rollouts' reward, first and last {ENDS} steps | {' | '.join(cells)} |")
    print("\n| stage | seconds | first step after | seconds a step | peak memory |\n|---|---|---|---|---|")
    for stage in experiment.stages:
        if not all(f.summary(stage.name).is_file() for f in folders):
            continue  # not finished in every run
        s = [read_json(f.summary(stage.name)) for f in folders]
        cells = [statistics.fmean(x[k] for x in s) for k in ("seconds", "first_step_seconds", "peak_memory_mb")]
        step = statistics.fmean((x.get("step_seconds", 0.0) + x.get("sample_seconds", 0.0)) / x["steps"] for x in s)
        print(f"| {stage.name} | {cells[0]:.0f} s | {cells[1]:.0f} s | {step:.2f} s | {cells[2]:,.0f} MB |")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: scripts/table.py RUN [RUN ...]")
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"table: error: {error}")
