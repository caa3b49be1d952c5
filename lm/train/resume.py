"""What a run began with, held against what it would go on with: data, vocabulary, collected files, versions."""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.changes import Changes
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import Experiment, UserError
from lm.stored import write_sealed
from lm.train.checkpoint import Checkpoints
from lm.train.models import MADE_FILE
from lm.train.provenance import package_versions
from lm.train.run_folder import RunFolder

COMPARED = ("jax", "jaxlib", "flax", "optax", "lm")  # versions that can change what a step computes
ACCEPT = "--accept-changes"
SHOWN = 3

Began = dict[str, Any]


def beginning(tokenizer: SubwordTokenizer, data: Mapping[str, str]) -> Began:
    """What a run begins with: fingerprints of its sources by path, of its vocabulary, and versions."""
    versions = {name: version for name, version in package_versions().items() if name in COMPARED}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"data": dict(data), "tokenizer": tokenizer.fingerprint, "versions": versions, "python": python}


def check_beginning(folder: RunFolder, now: Began, accept: bool) -> list[str]:
    """The differences, in words, between what a run began with and `now`, which are accepted.

    Raises:
        UserError: there are some, and they are not.
    """
    known = folder.read_environment()
    then = known.get("began") or _of_last_session(known) | _of_checkpoints(folder)
    if "python" in then and then["python"] != now["python"]:
        print(f"note: {folder.path} began with Python {then['python']}; this is {now['python']}", flush=True)
    found = differences(then, now)
    if found and not accept:
        raise UserError(_refusal(f"{folder.path} goes on with other things than it began with", found))
    for line in found:
        print(f"accepted: {line}", flush=True)
    return found


def record_beginning(folder: RunFolder, now: Began, accepted: Sequence[str]) -> None:
    """Write down in environment.json what the run begins with, and what was accepted of other things since."""
    known = folder.read_environment()
    if known.get("began") == now:
        return
    then = known.get("began", {})
    data = then.get("data", {}) | now["data"]  # also of what an earlier session measured
    notes = known.get("accepted", [])
    if accepted:
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        notes = [*notes, {"time": time, "differences": list(accepted), "tokenizer": now["tokenizer"]}]
    write_sealed(folder.environment, known | {"began": now | {"data": data}, "accepted": notes})


def differences(then: Began, now: Began) -> list[str]:
    """Everything that is in both and differs, a line each."""
    lines = []
    for path, old in then.get("data", {}).items():
        new = now["data"].get(path, old)
        if new != old:
            lines.append(f"the data of {path} had SHA-256 {old[:16]}, and have {new[:16]}")
    if "tokenizer" in then and then["tokenizer"] != now["tokenizer"]:
        lines.append(f"the tokenizer had SHA-256 {then['tokenizer'][:16]}, and has {now['tokenizer'][:16]}")
    for name, old in then.get("versions", {}).items():
        new = now["versions"].get(name, old)
        if new != old and name in COMPARED:
            lines.append(f"{name} was {old}, and is {new}")
    return lines


def check_checkpoint(where: str, meta: Mapping[str, Any], now: Mapping[str, Any], accept: bool) -> None:
    """Raises UserError unless the notes of a stage's checkpoint name the same data, tokenizer and versions as `now`."""
    then = {"data": {where: meta["data"]} if "data" in meta else {}} | {
        name: meta[name] for name in ("tokenizer", "versions") if name in meta
    }
    found = differences(then, {**now, "data": {where: now["data"]}})
    if found and not accept:
        raise UserError(_refusal(f"{where} goes on with other things than its checkpoint was trained with", found))


def check_collected(experiment: Experiment, folder: RunFolder, accept: bool = False) -> None:
    """Raises UserError where what a finished stage of Collect wrote for later stages is not what it wrote.

    What is accepted is written down in the stage's summary.
    """
    for stage in experiment.stages:
        if stage.objective.produces != "rows" or not folder.finished(stage.name):
            continue
        summary, file = folder.read_summary(stage.name), folder.stage_folder(stage.name) / MADE_FILE
        old = summary.get("files", {}).get(MADE_FILE)
        new = file_sha256(file)
        if old is None or old == new:
            continue
        if not accept or new is None:
            what = f"{file} is gone" if new is None else f"{file} had SHA-256 {old[:16]}, and has {new[:16]}"
            remedy = f"put back a copy, or remove {file.parent} to collect again" + (f", or {ACCEPT}" if new else "")
            raise UserError(f"{what}: it is not what stage {stage.name} wrote; {remedy}")
        print(f"accepted: {file} had SHA-256 {old[:16]}, and has {new[:16]}", flush=True)
        write_sealed(folder.summary(stage.name), summary | {"files": summary["files"] | {MADE_FILE: new}})


def check_more_steps(folder: RunFolder, found: Changes, later: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where stages get more steps whose optimizer's moments were dropped, or on whose model others rest.

    Args:
        later: the names of the stages behind each stage.
    """
    for name, old, new in found.more_steps:
        onward = (
            f"copy the folder, remove stages/{name} and those after it from the copy, and give the copy as --run-dir"
        )
        begun = [other for other in later.get(name, ()) if folder.stage_folder(other).exists()]
        if begun:
            raise UserError(
                f"{name}.steps: {old} → {new}: stage {begun[0]} has begun from what {name} left after {old} steps; {onward}"
            )
        step = folder.final_step(name)
        checkpoints = folder.checkpoints(name)
        if step is not None and checkpoints.is_dir() and not Checkpoints(checkpoints).has(step, "opt_state"):
            raise UserError(
                f"{name}.steps: {old} → {new}: the optimizer's moments of stage {name} were dropped when it was finished "
                f"({name}.keep_moments); {onward}"
            )


def file_sha256(file: Path) -> str | None:
    """SHA-256 of a file's content, None where there is no file."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _of_last_session(environment: Mapping[str, Any]) -> Began:
    """What an older lm wrote down: of every session its data and versions."""
    last = (environment.get("runs") or [{}])[-1]
    data, versions = last.get("data_fingerprint"), last.get("versions")
    return {
        "data": data if isinstance(data, dict) else {},
        "versions": versions if isinstance(versions, dict) else {},
    }


def _of_checkpoints(folder: RunFolder) -> Began:
    """What the newest checkpoint of a stage says, for a run that has lost its environment.json."""
    for checkpoints in sorted((folder.path / "stages").glob("*/checkpoints")):
        meta = Checkpoints(checkpoints).newest_meta()
        if "tokenizer" in meta:
            return {name: meta[name] for name in ("tokenizer", "versions") if name in meta}
    return {}


def _refusal(what: str, found: Sequence[str]) -> str:
    more = f"; … and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"{what}: {'; '.join(found[:SHOWN])}{more}. Put that back, or {ACCEPT} to go on all the same, or --fresh or "
        "--run-dir DIR to begin anew"
    )
