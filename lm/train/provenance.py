"""Provenance of a run: versions, devices, git state and command line, an entry per session in environment.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import lm
from lm.changes import EXPERIMENTS
from lm.data.workers import cores
from lm.stored import write_sealed
from lm.train.run_folder import RunFolder

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece")
LONGEST_DIFF = 1_000_000
# `tokenizer` and counts of `tokens` are no secrets.
SECRET = re.compile(r"token(?!s|iz)|key|secret|passw|credential", re.IGNORECASE)


def environment(data_fingerprint: Any) -> dict[str, Any]:
    """The environment of this process as a plain value, with secrets of the command line masked.

    `data_fingerprint` is stored as given.
    """
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": without_secrets([*sys.orig_argv]),
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "devices": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "versions": package_versions(),
        "git": git_state(Path(lm.__file__).parent) or git_state(Path.cwd()),
        "data_fingerprint": data_fingerprint,
    }


def package_versions() -> dict[str, str | None]:
    """Versions of lm and of the packages that affect its results, by name; None if not installed."""
    return {**{name: _version(name) for name in PACKAGES}, "lm": lm.__version__}


def record_environment(folder: RunFolder, data_fingerprint: Any, functions: dict[str, str] | None = None) -> None:
    """Append this session to `{"runs": [...]}` in environment.json.

    Args:
        functions: files of the user functions, by FILE:FUNCTION.
    """
    known = folder.read_environment()
    session = environment(data_fingerprint) | ({"functions": functions} if functions else {})
    experiment = {EXPERIMENTS: [folder.read_experiment()]} if folder.experiment.exists() else {}
    write_sealed(folder.environment, known | {"runs": [*known.get("runs", []), session]} | experiment)


def last_session(run_dir: Path) -> dict[str, Any]:
    """The entry of a run's last session in environment.json; {} before the first."""
    return (RunFolder(run_dir).read_environment().get("runs") or [{}])[-1]


def without_secrets(arguments: list[str]) -> list[str]:
    """The command line with `***` in place of the value of every flag or assignment whose name matches SECRET."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        flag = name.startswith("-")
        if hide_next and not name.startswith("--"):
            shown.append("***")
        elif equals and SECRET.search(name):
            shown.append(f"{name}=***")
        else:
            shown.append(re.sub(r"(://)[^/@\s]+@", r"\1***@", argument))
        hide_next = flag and not equals and SECRET.search(name) is not None
    return shown


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and uncommitted changes of the git repository that contains `folder`; None if there is none.

    `diff` is relative to the commit and truncated at 1 MB (`diff_cut`). Untracked files are listed by name only.
    """
    if _git(folder, "rev-parse", "--is-inside-work-tree") != "true":
        return None
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "--directory", "--full-name", ":/") or ""
    difference = _git(folder, "diff", "--no-color", "--no-ext-diff", *(["HEAD"] if commit else ["--cached"])) or ""
    return {
        "commit": commit,
        "branch": _git(folder, "symbolic-ref", "--short", "--quiet", "HEAD"),
        "dirty": bool(difference or untracked),
        "untracked": untracked.splitlines(),
        "diff": difference[:LONGEST_DIFF],
        "diff_cut": len(difference) > LONGEST_DIFF,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None if it fails or git is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=30,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()
