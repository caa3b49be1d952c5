"""Storage that all hosts of a job see: `--volume SOURCE:PATH`, a bucket or a claim, and where it is mounted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from lm.experiment import UserError

FORM = re.compile(r"(?:gs://(?P<bucket>[a-z0-9][a-z0-9._-]+[a-z0-9])|pvc:(?P<claim>[a-z0-9][a-z0-9.-]*)):(?P<path>/.+)")


@dataclass(frozen=True)
class Volume:
    """One of `bucket` (Cloud Storage) and `claim` (a PersistentVolumeClaim) is set."""

    path: str  # where it is mounted
    bucket: str | None
    claim: str | None


def parse_volume(text: str) -> Volume:
    """`gs://BUCKET:/PATH` or `pvc:CLAIM:/PATH`.

    Raises:
        UserError: it is of neither form.
    """
    found = FORM.fullmatch(text)
    if found is None:
        raise UserError(f"--volume {text!r} should be gs://BUCKET:/PATH (Cloud Storage) or pvc:CLAIM:/PATH")
    return Volume(found["path"], found["bucket"], found["claim"])


def check_run_dir(run_dir: str, volumes: tuple[Volume, ...], lost: str) -> None:
    """The run's folder is on one of the volumes.

    Args:
        lost: what becomes of it otherwise, in words.

    Raises:
        UserError: it is not.
    """
    if any(PurePosixPath(run_dir).is_relative_to(volume.path) for volume in volumes):
        return
    mounted = ", ".join(volume.path for volume in volumes)
    raise UserError(
        f"--run-dir {run_dir} {lost}: put it below "
        + (f"a mounted volume ({mounted})" if volumes else "storage that all hosts mount, --volume gs://BUCKET:/PATH")
    )
