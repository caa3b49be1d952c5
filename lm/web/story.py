"""Tables of the report, computed from a run folder's files."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lm import experiment as experiments
from lm.overrides import knobs
from lm.train.run_files import BENCHMARK, Line, Run, StageFiles, step_order
from lm.web.numbers import percent, signed

T = TypeVar("T")


# ---- held-out numbers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricStyle:
    """Presentation of a held-out metric: label, unit, direction (`sign`: +1 if higher is better), formats, and extra rows."""

    label: str
    unit: str
    sign: int
    show: Callable[[float], str]
    change: Callable[[float], str]
    extras: tuple[tuple[str, str, Callable[[float], str]], ...]


def _points(value: float) -> str:
    return signed(f"{100 * value:+.1f}")


def _bits(value: float) -> str:
    return signed(f"{value:.3f}")


METRICS = {
    "bits_per_byte": MetricStyle(
        "bits per byte, lower is better",
        "rows of text",
        -1,
        _bits,
        lambda value: signed(f"{value:+.3f}"),
        (("loss, nats per token", "loss", _bits),),
    ),
    "reward": MetricStyle(
        "mean reward",
        "prompts",
        +1,
        percent,
        _points,
        (("answers that ended", "eos_rate", percent), ("tokens per answer", "length", lambda v: f"{v:.1f}")),
    ),
    "pair_accuracy": MetricStyle(
        "preference accuracy",
        "pairs",
        +1,
        percent,
        _points,
        (("margin, nats", "margin", _bits), ("baseline: the longer answer", "longer_accuracy", percent)),
    ),
    "choice_accuracy": MetricStyle(
        "right choices, by log-likelihood",
        "questions",
        +1,
        percent,
        _points,
        (("by log-likelihood a byte", "choice_accuracy_bytes", percent), ("a random choice", "chance", percent)),
    ),
    "continuation_accuracy": MetricStyle(
        "right continuations, greedy", "questions", +1, percent, _points, (("loss, nats per token", "loss", _bits),)
    ),
    "core": MetricStyle(
        "CORE score: accuracy centred on guessing, mean over tasks",
        "items",
        +1,
        percent,
        _points,
        (("tasks", "tasks", lambda value: f"{value:.0f}"),),
    ),
    "pass_at_k": MetricStyle(
        "pass@k",
        "prompts",
        +1,
        percent,
        _points,
        (("k", "k", lambda value: f"{value:.0f}"), ("pass@1", "pass_at_1", percent), ("maj@k", "maj_at_k", percent)),
    ),
}


@dataclass(frozen=True)
class TableCell:
    """One number of the held-out table, with its change over the stage ('better', 'worse' or 'even')."""

    value: str
    change: str = ""
    tone: str = ""
    note: str = ""


@dataclass(frozen=True)
class HeldoutRow:
    name: str
    label: str
    cells: list[TableCell | None]
    extras: list[tuple[str, list[str | None]]]


def before(stage: StageFiles, name: str) -> Line | None:
    return next((line for line in stage.evals if line["eval"] == name and line["when"] == "before"), None)


def latest(stage: StageFiles, name: str) -> Line | None:
    """The last measurement during or after the stage."""
    found = [line for line in stage.evals if line["eval"] == name and line["when"] != "before"]
    return found[-1] if found else None


def eval_names(run: Run) -> list[str]:
    lines = [line for stage in run.stages for line in stage.evals]
    return list(dict.fromkeys(line["eval"] for line in lines if line["metric"] != "best_of_n"))


def measurements(run: Run, name: str) -> list[Line | None]:
    """One eval over the table's columns: the random model, then after each stage.

    A measurement before a stage also counts for the model after the stage that it starts from.
    """
    stages = trained_stages(run)
    starts = _starts(run)
    after = [None, *(latest(stage, name) for stage in stages)]
    earlier = [
        next((line for later, start in starts if start is at and (line := before(later, name))), None)
        for at in (None, *stages)
    ]
    return [line or other for line, other in zip(after, earlier, strict=True)]


def trained_stages(run: Run) -> list[StageFiles]:
    """The stages that train a model: all but Collect."""
    return [stage for stage in run.stages if experiments.OBJECTIVES[stage.kind].produces != "rows"]


def policy_stages(run: Run) -> list[StageFiles]:
    """The stages that leave a language model."""
    return [stage for stage in run.stages if experiments.OBJECTIVES[stage.kind].produces == "policy"]


def _starts(run: Run) -> list[tuple[StageFiles, StageFiles | None]]:
    """Every stage with the stage whose model it starts from; None: the random model."""
    experiment = experiments.from_dict(run.experiment)
    places = [experiments.start_of(experiment, index) for index in range(len(run.stages))]
    return [(stage, None if at is None else run.stages[at]) for stage, at in zip(run.stages, places, strict=True)]


def initial(run: Run) -> str:
    """The kind of the weights that a run begins with."""
    return "open weights" if run.experiment.get("init") else "random"


def columns(run: Run) -> list[str]:
    return [initial(run), *(stage.name for stage in trained_stages(run))]


def heldout_table(run: Run) -> list[HeldoutRow]:
    """The held-out table: evals by stages, each number with its change over the stage."""
    rows = []
    for name in eval_names(run):
        lines = measurements(run, name)
        first = next(line for line in lines if line)
        metric = METRICS[first["metric"]]
        label = f"{metric.label}, {first['count']:,} {metric.unit}"
        if "xz_bits_per_byte" in first:
            label += f"; xz -9e needs {_bits(first['xz_bits_per_byte'])}"
        last = next(line for line in reversed(lines) if line)
        if passed := last.get("passed_over"):
            label += f"; skipped: {', '.join(f'{number:,} {why}' for why, number in passed.items())}"
        if last.get("cut"):
            label += f"; {last['cut']:,} left-truncated"
        earlier = [None, *(before(stage, name) for stage in trained_stages(run))]
        cells = [_cell(line, old, metric) for line, old in zip(lines, earlier, strict=True)]
        extras = [
            (text, [show(line[key]) if line and key in line else None for line in lines])
            for text, key, show in metric.extras
            if any(line and key in line for line in lines)
        ]
        rows.append(HeldoutRow(name, label, cells, extras))
    return rows


def _cell(line: Line | None, old: Line | None, metric: MetricStyle) -> TableCell | None:
    if line is None:
        return None
    value = line[line["metric"]]
    note = f"at step {line['step']:,}" if line["when"] == "during" else ""
    if "xz_bits_per_byte" in line and value < line["xz_bits_per_byte"]:
        note = "below xz -9e"
    if old is None:
        return TableCell(metric.show(value), note=note)
    change = value - old[line["metric"]]
    noise = 2 * math.hypot(standard_error(line), standard_error(old))
    tone = "even" if abs(change) <= noise else "better" if change * metric.sign > 0 else "worse"
    return TableCell(metric.show(value), metric.change(change), tone, note)


def benchmark_table(run: Run) -> list[tuple[str, str, list[str | None], list[tuple[str, str]]]]:
    """Rows of (task, what was measured, value with its standard error of each language model, contamination by stage), by `lm eval --tasks`."""
    stages = policy_stages(run)
    found = {tuple(line.get(name) for name in BENCHMARK): line for stage in stages for line in stage.benchmarks}
    table = []
    for key, line in found.items():
        own = [
            [one for one in stage.benchmarks if tuple(one.get(name) for name in BENCHMARK) == key] for stage in stages
        ]
        shots = f", {line['fewshot']} shots" if isinstance(line["fewshot"], int) else ""
        label = f"{line['metric']}, {line['count']:,} items{shots}{', as chat' if line.get('chat') else ''}"
        last = [lines[-1] if lines else None for lines in own]
        cells = [None if one is None else _with_error(one) for one in last]
        notes = [(stage.name, _contamination(one)) for stage, one in zip(stages, last, strict=True) if one is not None]
        table.append((line["task"], label, cells, [(name, note) for name, note in notes if note]))
    return table


def _contamination(line: Line) -> str:
    """How many items share n-grams with the training data, and the value of the others; "" where that was not looked for."""
    found = line.get("contamination")
    if not isinstance(found, dict):
        return ""
    clean = found["clean"]
    of_others = "" if clean.get("value") is None else f"; {clean['count']:,} others: {_with_error(clean)}"
    return f"{found['text']}{of_others}"


def _with_error(line: Line) -> str:
    value, error = (math.nan if line.get(name) is None else line[name] for name in ("value", "stderr"))
    return f"{value:.4g}" + ("" if math.isnan(error) else f" ±\N{NO-BREAK SPACE}{error:.2g}")


def standard_error(line: Line) -> float:
    """Standard error of a measurement; bits per byte count as exact to 0.0025."""
    if line["metric"] == "pair_accuracy":
        rate = line["pair_accuracy"]
        return math.sqrt(max(rate * (1 - rate), 0.0) / max(line["count"], 1))
    return line.get(f"{line['metric']}_stderr", 0.0025)


@dataclass(frozen=True)
class Headline:
    """A headline number: eval and metric, value of the last model, and notes for comparison."""

    name: str
    value: str
    notes: list[str]


def headlines(run: Run) -> list[Headline]:
    """One headline per eval: the last model's value, with the best stage's, the random model's and xz's for comparison."""
    found = []
    for name in eval_names(run):
        lines = measurements(run, name)
        after = [(stage, line) for stage, line in zip(columns(run)[1:], lines[1:], strict=True) if line]
        if not after:
            continue
        key = after[-1][1]["metric"]
        metric = METRICS[key]
        stage, line = after[-1]
        best_stage, best = max(after, key=lambda pair: _rank(metric.sign * pair[1].get(key, math.nan)))
        notes = [f"model after {stage}" if line["when"] == "after" else f"model of {stage}, step {line['step']:,}"]
        if best_stage != stage and metric.show(best[key]) != metric.show(line[key]):
            notes.append(f"best {metric.show(best[key])}, after {best_stage}")
        if lines[0]:
            notes.append(f"{initial(run)} {metric.show(lines[0][key])}")
        if "xz_bits_per_byte" in line:
            notes.append(f"xz -9e {_bits(line['xz_bits_per_byte'])}")
        found.append(Headline(f"{name}: {metric.label.split(',')[0]}", metric.show(line[key]), notes))
    return found


def _rank(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


@dataclass(frozen=True)
class Mixture:
    """A stage's training mixture as (source, share), and the source of every eval by name."""

    parts: tuple[tuple[str, float], ...] = ()
    evals: tuple[tuple[str, str], ...] = ()

    def words(self) -> str:
        """The mixture as text: `50 % gen:docs, 50 % gen:drills`; a single source by its name."""
        whole = sum(weight for _, weight in self.parts) or 1.0
        if len(self.parts) == 1:
            return self.parts[0][0]
        return ", ".join(f"{100 * weight / whole:.0f} % {path}" for path, weight in self.parts)

    def is_of_all(self, name: str) -> bool:
        """Whether an eval measures the stage's only training source."""
        source = dict(self.evals).get(name)
        return not self.parts or [path for path, _ in self.parts] == [source]

    def source_of(self, name: str) -> str:
        return dict(self.evals).get(name, "")


def mixture(run: Run, index: int) -> Mixture:
    """The mixture of stage `index` and the sources of the run's evals."""
    sources = run.experiment["stages"][index]["sources"]
    return Mixture(
        tuple((source["path"], float(source["weight"])) for source in sources),
        tuple((item["name"], item["source"]["path"]) for item in run.experiment["evals"]),
    )


# ---- sampled answers ---------------------------------------------------------------------------------------------


def prompt_table(run: Run) -> list[tuple[str, list[Line | None]]]:
    """(prompt, answers of the random model and after each stage that leaves a language model) of every prompt."""
    asked = dict.fromkeys(run.experiment["prompts"])
    asked |= dict.fromkeys(line["prompt"] for stage in run.stages for line in _of(stage, "prompt"))
    return [
        (
            prompt,
            [
                _last(line for line in _of(run.stages[0], "prompt", prompt) if line["when"] == "before"),
                *(
                    _last(line for line in _of(stage, "prompt", prompt) if line["when"] != "before")
                    for stage in policy_stages(run)
                ),
            ],
        )
        for prompt in asked
    ]


def _of(stage: StageFiles, kind: str, prompt: str | None = None) -> list[Line]:
    return [line for line in stage.samples if line["kind"] == kind and prompt in (None, line["prompt"])]


def _last(items: Iterable[T]) -> T | None:
    return next(reversed(list(items)), None)


def _last_stage(run: Run, kind: str) -> StageFiles | None:
    return _last(stage for stage in run.stages if _of(stage, kind))


@dataclass(frozen=True)
class JudgedPair:
    """A preference pair and the implicit reward margin in nats before and after the stage (None: not measured)."""

    prompt: str
    chosen: str
    rejected: str
    before: float | None
    after: float | None


def preference_pairs(run: Run) -> tuple[str, list[JudgedPair]] | None:
    """The stage trained on pairs (or the last one measured on them) and its held-out pairs."""
    stages = [stage for stage in run.stages if _of(stage, "pair")]
    stage = _last(stage for stage in stages if experiments.OBJECTIVES[stage.kind].learns_preferences) or _last(stages)
    if stage is None:
        return None
    lines = _of(stage, "pair")
    margins = {(*_pair(line), line["when"] == "before"): line["margin"] for line in lines}
    pairs = dict.fromkeys(map(_pair, lines))
    return stage.name, [JudgedPair(*pair, margins.get((*pair, True)), margins.get((*pair, False))) for pair in pairs]


def _pair(line: Line) -> tuple[str, str, str]:
    return line["prompt"], line["chosen"], line["rejected"]


def choices(margins: Iterable[float | None]) -> str:
    """How often the chosen answer was preferred, as `12 of 20`; empty if all margins are 0."""
    measured = [margin for margin in margins if margin is not None]
    return f"{sum(margin > 0 for margin in measured)} of {len(measured)}" if any(measured) else ""


@dataclass(frozen=True)
class SampledGroups:
    """Groups of answers to a prompt that a stage sampled at its first and at its last step."""

    stage: str
    first_and_last: list[tuple[int, list[Line]]]


def rollouts(run: Run, limit: int = 3) -> SampledGroups | None:
    """The rollouts of the last stage with any; None if no stage has any."""
    stage = _last_stage(run, "rollout")
    if stage is None:
        return None
    steps: dict[int, list[Line]] = {}
    for line in _of(stage, "rollout"):
        steps.setdefault(int(line["step"]), []).append(line)
    return SampledGroups(stage.name, [(step, steps[step][:limit]) for step in dict.fromkeys((min(steps), max(steps)))])


def heldout_examples(run: Run, limit: int = 6) -> list[tuple[str, str, list[Line]]]:
    """(eval, stage, first examples of the last measurement), in the order of the evals."""
    found = {}
    for stage in run.stages:
        for line in _of(stage, "heldout"):
            if line["when"] != "before" or stage is run.stages[0]:
                found[line["eval"]] = (stage, step_order(line))
    return [
        (name, stage.name, [s for s in _of(stage, "heldout") if s["eval"] == name and step_order(s) == last][:limit])
        for name, (stage, last) in found.items()
    ]


# ---- costs, setup ------------------------------------------------------------------------------------------------


def total_seconds(run: Run) -> float:
    return sum((stage.summary or {}).get("seconds", 0.0) for stage in run.stages)


def num_params(run: Run) -> int | None:
    return next((stage.summary.get("num_params") for stage in run.stages if stage.summary), None)


def knob_table(run: Run) -> list[tuple[str, Any, str]]:
    """(dotted name, value, help) of every leaf of the resolved experiment."""
    helps = {knob.name: knob.help for knob in knobs(experiments.from_dict(run.experiment))}
    return [(name, value, helps.get(name, "")) for name, value in experiments.flatten(run.experiment).items()]


def environment_table(run: Run) -> list[tuple[str, str]]:
    """(name, value) rows on model, machine and software; host and folder names stay private."""
    size = num_params(run)
    table = [("parameters", f"{size:,}")] if size else []
    if not run.sessions:
        return table
    found = run.sessions[-1]
    return [
        *table,
        ("command", _command(found["command"])),
        ("started", run.sessions[0]["started"] + (f", {len(run.sessions)} sessions" if run.sessions[1:] else "")),
        ("machine", f"{machine(run)}; {found['cpu']}, {found['platform']}"),
        ("versions", ", ".join([f"python {found['python']}", *map(" ".join, _known(found["versions"]))])),
        ("git commit", _commit(found["git"])),
        *((f"data {path}", f"sha256 {digest}") for path, digest in found["data_fingerprint"].items()),
    ]


def machine(run: Run) -> str:
    """The devices of the latest session: `2 CPU cores`, `8 × TPU v4`; empty where not recorded."""
    if not run.sessions:
        return ""
    found = run.sessions[-1]
    devices = found["devices"]
    if devices["platform"] == "cpu":
        return f"{found['cores']} CPU core{'s' * (found['cores'] != 1)}"
    return f"{devices['count']} × {devices['kind']}"


def _command(words: list[str]) -> str:
    """The command line without its program's folder."""
    return shlex.join([*(Path(word).name for word in words[:2]), *words[2:]])


def _known(versions: dict[str, str | None]) -> list[tuple[str, str]]:
    return [(name, version) for name, version in versions.items() if version]


def _commit(git: dict[str, Any] | None) -> str:
    if git is None:
        return "no git repository"
    return f"{git['commit'] or 'none yet'}{' with uncommitted changes' if git['dirty'] else ''}"
