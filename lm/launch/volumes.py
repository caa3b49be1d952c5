"""Storage that all hosts of a job see: `--volume SOURCE:PATH`, a bucket or a claim, and where it is mounted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from lm.experiment import UserError
from lm.launch.values import OBJECT, bucket_problem, mounted_path_problem

FORM = re.compile(r"(?:gs://(?P<bucket>[^:]*)|pvc:(?P<claim>[^:]*)):(?P<path>/.*)", re.DOTALL)
SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sbin", "sys", "usr")


@dataclass(frozen=True)
class Volume:
    """One of `bucket` (Cloud Storage) and `claim` (a PersistentVolumeClaim) is set."""

    path: str  # where it is mounted
    bucket: str | None
    claim: str | None


def parse_volume(text: str) -> Volume:
    """`gs://BUCKET:/PATH` or `pvc:CLAIM:/PATH`.

    Raises:
        UserError: it is of neither form, or one of its parts is what storage or hosts do not take.
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
    """Why nothing can be mounted there; None where something can."""
    if not path:
        return "should be a folder below the root, such as /mnt/runs"
    parts = PurePosixPath(path).parts
    if parts[1] in SYSTEM:
        return f"would hide /{parts[1]} of the hosts; take a folder such as /mnt/runs"
    if ":" in path:
        return "has a colon, which ends the path of a mount"
    if "." in path.split("/"):
        return "should have no part that is . alone"
    return mounted_path_problem(path)


def parse_volumes(texts: Iterable[str]) -> tuple[Volume, ...]:
    """All that are mounted.

    Raises:
        UserError: one is wrong, or one lies at or below the place of another.
    """
    volumes = tuple(map(parse_volume, texts))
    places = sorted(PurePosixPath(volume.path) for volume in volumes)
    for outer, inner in pairwise(places):
        if inner == outer:
            raise UserError(f"--volume: two are mounted at {outer}; each needs a folder of its own")
        if inner.is_relative_to(outer):
            raise UserError(f"--volume: {inner} is below {outer}, where another is mounted; take folders side by side")
    return volumes


def check_run_dir(run_dir: str, volumes: tuple[Volume, ...], lost: str) -> None:
    """The run's folder is on one of the volumes.

    Args:
        lost: what becomes of it otherwise, in words.

    Raises:
        UserError: it is not, or it leads out of one by `..`.
    """
    wrong = mounted_path_problem(run_dir)
    if wrong:
        raise UserError(f"--run-dir {run_dir!r} {wrong}")
    if any(PurePosixPath(run_dir).is_relative_to(volume.path) for volume in volumes):
        return
    mounted = ", ".join(volume.path for volume in volumes)
    raise UserError(
        f"--run-dir {run_dir} {lost}: put it below "
        + (f"a mounted volume ({mounted})" if volumes else "storage that all hosts mount, --volume gs://BUCKET:/PATH")
    )
