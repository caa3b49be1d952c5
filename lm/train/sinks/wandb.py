"""Weights & Biases: a run on the server, or with WANDB_MODE=offline in the run's folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence

import wandb

from lm.experiment import UserError
from lm.train.sinks.sink import PROJECT, Numbers, Sink, Target

FINISH_SECONDS = 20.0  # for the upload of what is left when a run ends; the rest stays in the run's folder


class HistoryRun:
    """A run of wandb; the charts of a stage are drawn over STAGE/step."""

    def __init__(self, target: Target):
        self.run = target.known or uuid.uuid4().hex[:8]
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_meta=True,  # the command line, the machine's name, the user
            x_disable_stats=True,
            x_save_requirements=False,
            finish_timeout=FINISH_SECONDS,
        )
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise UserError("no key of wandb: run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            id=self.run,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=target.experiment.name,
            config=target.config,
            allow_val_change=True,
            dir=str(target.folder / "sinks"),
            settings=settings,
        )
        for stage in target.experiment.stages:
            self._run.define_metric(f"{stage.name}/*", step_metric=f"{stage.name}/step")
        files = self._run.dir.removesuffix("/files")
        self.where = f"wandb sync {files}" if self._run.offline else str(self._run.url)

    def send(self, lines: Sequence[Numbers]) -> None:
        for line in lines:
            self._run.log({**line.named, f"{line.stage}/step": line.step})

    def flush(self) -> None:
        pass  # its own process keeps what it was given

    def close(self) -> None:
        self._run.finish()


def open_sink(target: Target) -> Sink:
    return HistoryRun(target)
