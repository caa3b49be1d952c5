"""Checks on resuming a run: data, tokenizer, collected files and versions must be those at its start, or be accepted."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from lm.changes import Changes
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import Experiment, UserError
from lm.stored import file_sha256, write_sealed
from lm.train.checkpoint import Checkpoints
from lm.train.collected import ROWS_FILE
from lm.train.provenance import package_versions
from lm.train.run_folder import RunFolder

COMPARED = ("jax", "jaxlib", "flax", "optax", "lm")  # versions that can change what a step computes
ACCEPT = "--accept-changes"
SHOWN = 3

RunInputs = dict[str, Any]


def run_inputs(tokenizer: TextTokenizer, data: Mapping[str, str]) -> RunInputs:
    """The inputs of a run: fingerprints of its sources by path and of its tokenizer, and versions."""
    versions = {name: version for name, version in package_versions().items() if name in COMPARED}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"data": dict(data), "tokenizer": tokenizer.fingerprint, "versions": versions, "python": python}


def check_run_inputs(folder: RunFolder, now: RunInputs, accept: bool) -> list[str]:
    """Compare a run's recorded inputs with the current ones; returns the accepted differences, a line each.

    Before the first stage has begun any inputs are accepted, so that corrected data can be run again.

    Raises:
        UserError: there are differences and `accept` is false.
    """
    if not folder.has_begun():
        return []
    known = folder.read_environment()
    then = known.get("began") or _inputs_of_last_session(known) | _inputs_of_checkpoints(folder)
    if "python" in then and then["python"] != now["python"]:
        print(f"note: {folder.path} began with Python {then['python']}; this is {now['python']}", flush=True)
    found = differences(then, now)
    if found and not accept:
        raise UserError(_refusal(f"{folder.path} was started with other inputs", found))
    for line in found:
        print(f"accepted: {line}", flush=True)
    return found


def record_run_inputs(folder: RunFolder, now: RunInputs, accepted: Sequence[str]) -> None:
    """Record the run's inputs in environment.json, with the differences accepted since its start."""
    known = folder.read_environment()
    if known.get("began") == now:
        return
    then = known.get("began", {})
    data = then.get("data", {}) | now["data"]  # keep sources that only an earlier session read
    notes = known.get("accepted", [])
    if accepted:
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        notes = [*notes, {"time": time, "differences": list(accepted), "tokenizer": now["tokenizer"]}]
    write_sealed(folder.environment, known | {"began": now | {"data": data}, "accepted": notes})


def differences(then: RunInputs, now: RunInputs) -> list[str]:
    """The inputs that both have and that differ, a line each."""
    lines = []
    for path, old in then.get("data", {}).items():
        new = now["data"].get(path, old)
        if new != old:
            lines.append(f"the data of {path} had SHA-256 {old[:16]} and now have {new[:16]}")
    if "tokenizer" in then and then["tokenizer"] != now["tokenizer"]:
        lines.append(f"the tokenizer had SHA-256 {then['tokenizer'][:16]} and now has {now['tokenizer'][:16]}")
    for name, old in then.get("versions", {}).items():
        new = now["versions"].get(name, old)
        if new != old and name in COMPARED:
            lines.append(f"{name} was {old} and is now {new}")
    return lines


def check_checkpoint(where: str, meta: Mapping[str, Any], now: Mapping[str, Any], accept: bool) -> None:
    """Raise UserError unless a checkpoint's `meta` has the same data, tokenizer and versions as `now`, or `accept` is set."""
    then = {"data": {where: meta["data"]} if "data" in meta else {}} | {
        name: meta[name] for name in ("tokenizer", "versions") if name in meta
    }
    found = differences(then, {**now, "data": {where: now["data"]}})
    if found and not accept:
        raise UserError(_refusal(f"the checkpoint of {where} was trained with other inputs", found))


def check_collected(experiment: Experiment, folder: RunFolder, accept: bool = False) -> None:
    """Raise UserError if the rows that a finished Collect stage wrote were changed or removed, unless changes are accepted.

    Accepted changes are recorded in the stage's summary.
    """
    for stage in experiment.stages:
        if stage.objective.produces != "rows" or not folder.finished(stage.name):
            continue
        summary, file = folder.read_summary(stage.name), folder.stage_folder(stage.name) / ROWS_FILE
        old = summary.get("files", {}).get(ROWS_FILE)
        new = file_sha256(file) if file.is_file() else None
        if old is None or old == new:
            continue
        if not accept or new is None:
            what = f"{file} is gone" if new is None else f"{file} had SHA-256 {old[:16]} and now has {new[:16]}"
            remedy = f"put back a copy, or remove {file.parent} to collect again" + (f", or {ACCEPT}" if new else "")
            raise UserError(f"{what}: it is not what stage {stage.name} wrote; {remedy}")
        print(f"accepted: {file} had SHA-256 {old[:16]} and now has {new[:16]}", flush=True)
        write_sealed(folder.summary(stage.name), summary | {"files": summary["files"] | {ROWS_FILE: new}})


def check_more_steps(folder: RunFolder, found: Changes, later: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError if a stage with more steps than before has lost its optimizer state, or a later stage has begun.

    Args:
        later: for each stage, the names of the stages after it.
    """
    for name, old, new in found.more_steps:
        onward = (
            f"copy the folder, remove stages/{name} and those after it from the copy, and give the copy as --run-dir"
        )
        begun = [other for other in later.get(name, ()) if folder.stage_folder(other).exists()]
        if begun:
            raise UserError(
                f"{name}.steps: {old} → {new}: stage {begun[0]} has begun from the model of {name} after {old} steps; {onward}"
            )
        step = folder.final_step(name)
        checkpoints = folder.checkpoints(name)
        if step is not None and checkpoints.is_dir() and not Checkpoints(checkpoints).has(step, "opt_state"):
            raise UserError(
                f"{name}.steps: {old} → {new}: the optimizer state of stage {name} was dropped when the stage finished "
                f"({name}.keep_moments); {onward}"
            )


def _inputs_of_last_session(environment: Mapping[str, Any]) -> RunInputs:
    """The inputs recorded by an older version of lm: data and versions of the last session."""
    last = (environment.get("runs") or [{}])[-1]
    data, versions = last.get("data_fingerprint"), last.get("versions")
    return {
        "data": data if isinstance(data, dict) else {},
        "versions": versions if isinstance(versions, dict) else {},
    }


def _inputs_of_checkpoints(folder: RunFolder) -> RunInputs:
    """The inputs named by a stage's newest checkpoint, for a run whose environment.json is missing."""
    for checkpoints in sorted((folder.path / "stages").glob("*/checkpoints")):
        meta = Checkpoints(checkpoints).newest_meta()
        if "tokenizer" in meta:
            return {name: meta[name] for name in ("tokenizer", "versions") if name in meta}
    return {}


def _refusal(what: str, found: Sequence[str]) -> str:
    more = f"; … and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"{what}: {'; '.join(found[:SHOWN])}{more}. Restore them, accept the change with {ACCEPT}, or start a new run with "
        "--fresh or --run-dir DIR"
    )
