"""The study of a sweep in a folder, opened and run out without running any trial."""

import os

from lm.sweep.folder import SweepFolder
from lm.sweep.study import Study

HEADS = {"model.num_heads": (2, 3, 4), "model.num_kv_heads": (1, 3)}


def opened(tmp_path, value):
    folder = SweepFolder(tmp_path / "s", tmp_path / "shared")
    folder.claim(value)
    study = Study(value, folder)
    study.queue()
    return study, folder


def run_out(study, worse=lambda settings: False):
    """Take every trial and tell it a number, or that it failed: the settings that were run."""
    run = []
    while (claimed := study.take()) is not None:
        run.append(tuple(claimed.settings.values()))
        study.tell(claimed, value=1.0, failed="diverged" if worse(claimed.settings) else "")
        os.close(claimed.handle)
    return run
