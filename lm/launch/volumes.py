"""Shared storage of a job's hosts: parses `--volume SOURCE:PATH`, a bucket or volume claim and its mount path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from lm.experiment import UserError
from lm.launch.values import OBJECT, bucket_problem, mounted_path_problem

FORM = re.compile(r"(?:gs://(?P<bucket>[^:]*)|pvc:(?P<claim>[^:]*)):(?P<path>/.*)", re.DOTALL)
SHARED = ("home", "lm", "opt", "srv", "tmp", "var")  # /lm: the working folder of the Dockerfile's image
SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sbin", "sys", "usr")


@dataclass(frozen=True)
class Volume:
    """A mounted volume; either `bucket` (Cloud Storage) or `claim` (a PersistentVolumeClaim) is set."""

    path: str  # mount path
    bucket: str | None
    claim: str | None


def parse_volume(text: str) -> Volume:
    """Parse `gs://BUCKET:/PATH` or `pvc:CLAIM:/PATH`.

    Raises:
        UserError: it has neither form, or its bucket, claim or path is invalid.
    """
    found = FORM.fullmatch(text)
    if found is None:
        raise UserError(f"--volume {text!r} should be gs://BUCKET:/PATH (Cloud Storage) or pvc:CLAIM:/PATH")
    bucket, claim = found["bucket"], found["claim"]
    path = re.sub("/+", "/", found["path"]).rstrip("/")
    if bucket is not None and "/" in bucket:
        raise UserError(f"--volume {text!r}: a bucket is mounted as a whole: gs://{bucket.split('/')[0]}:{path}"[:300])
    wrong = bucket_problem(bucket) if bucket is not None else OBJECT.problem(claim)
    if wrong:
        raise UserError(f"--volume {text!r}: the {'bucket' if claim is None else 'claim'} {bucket or claim!r} {wrong}")
    wrong = _mount_problem(path)
    if wrong:
        raise UserError(f"--volume {text!r}: the path {found['path']!r} {wrong}")
    return Volume(path, bucket, claim)


def _mount_problem(path: str) -> str | None:
    """Error text for a path at which nothing can be mounted; None if it is valid."""
    if not path:
        return "should be a folder below the root, such as /mnt/runs"
    parts = PurePosixPath(path).parts
    if parts[1] in SYSTEM:
        return f"would hide /{parts[1]} of the hosts; take a folder such as /mnt/runs"
    if len(parts) == 2 and parts[1] in SHARED:
        return f"would hide what the hosts have in {path}; take a folder such as /mnt/runs"
    if ":" in path:
        return "has a colon, which ends the path of a mount"
    if "." in path.split("/"):
        return "should have no part that is . alone"
    return mounted_path_problem(path)


def parse_volumes(texts: Iterable[str]) -> tuple[Volume, ...]:
    """Parse several volumes.

    Raises:
        UserError: one is invalid, or two have the same path or one path is below another.
    """
    volumes = tuple(map(parse_volume, texts))
    places = sorted(PurePosixPath(volume.path) for volume in volumes)
    for outer, inner in pairwise(places):
        if inner == outer:
            raise UserError(f"--volume: two are mounted at {outer}; each needs a folder of its own")
        if inner.is_relative_to(outer):
            raise UserError(f"--volume: {inner} is below {outer}, where another is mounted; use separate folders")
    return volumes


def check_run_dir(run_dir: str, volumes: tuple[Volume, ...], lost: str, flag: str = "--run-dir") -> None:
    """Check that a folder that the hosts write is on one of the volumes.

    Args:
        lost: what would happen to it otherwise, for the error message.
        flag: the flag that names the folder.

    Raises:
        UserError: it is on none, or its path contains `..`.
    """
    wrong = mounted_path_problem(run_dir)
    if wrong:
        raise UserError(f"{flag} {run_dir!r} {wrong}")
    if any(PurePosixPath(run_dir).is_relative_to(volume.path) for volume in volumes):
        return
    mounted = ", ".join(volume.path for volume in volumes)
    raise UserError(
        f"{flag} {run_dir} {lost}: put it below "
        + (f"a mounted volume ({mounted})" if volumes else "storage that all hosts mount, --volume gs://BUCKET:/PATH")
    )
