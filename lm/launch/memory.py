"""Check that an experiment's stages fit into the memory of the requested TPUs, by the arithmetic of `lm plan`."""

from __future__ import annotations

from collections.abc import Sequence

from lm.experiment import Experiment, Stage, UserError
from lm.launch.topology import SliceTopology
from lm.plan import chips
from lm.plan.advise import plan_stage

GB = 1e9


def check_memory(experiment: Experiment, topology: SliceTopology, slices: int, until: str | None) -> list[str]:
    """Check each stage's memory; returns messages about what could not be checked.

    Args:
        until: name of the last stage that will run; None: all stages.

    Raises:
        UserError: a stage needs more memory than a device has.
    """
    asked = f"--topology {topology.kind}:{topology.shape}" + (f" --slices {slices}" if slices > 1 else "")
    if topology.kind not in chips.CHIPS:
        return [f"memory is not checked: lm plan has no figures for {topology.kind}"]
    planned = chips.parse_topology(f"{topology.kind}:{topology.shape}", slices)
    for stage in _until(experiment.stages, until):
        if not stage.objective.trains:
            continue
        plan = plan_stage(experiment, stage.name, planned)
        if not plan.fits:
            raise UserError(
                f"{asked}: stage {stage.name} needs {plan.bytes / GB:.1f} GB per device, which has {plan.limit / GB:.1f}; "
                f"`lm plan` with the same {asked} shows what would fit; --skip-memory-check launches anyway"
            )
    if experiment.tokenizer.path is not None:
        return ["memory is checked with tokenizer.vocab_size, since the tokenizer file is only read on the hosts"]
    return []


def _until(stages: Sequence[Stage], last: str | None) -> Sequence[Stage]:
    names = [stage.name for stage in stages]
    return stages if last is None else stages[: names.index(last) + 1]
