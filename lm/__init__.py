"""lm: train a language model from random weights to a reasoner, on one core or a pod."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from pathlib import Path

    from lm.trained_model import TrainedModel

__version__ = "0.1.0"


def load(run: str | Path, stage: str | None = None, adapter: str | Path | None = None) -> TrainedModel:
    """The model of a run, by its folder or its name in runs/: `lm.load("runs/quickstart").sample(["What is an LLM?"])`.

    Args:
        stage: the model after this stage; None: the last one that left a language model.
        adapter: folder of a PEFT adapter on it.

    Raises:
        lm.experiment.UserError: no such run or stage, or nothing trained yet.
    """
    from lm.trained_model import load  # here, so that `import lm` stays quick

    return load(run, stage, adapter)
