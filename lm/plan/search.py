"""Search over all meshes of a topology by arithmetic, the fastest that fits first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lm.experiment import Experiment, UserError
from lm.plan.advise import plan_stage
from lm.plan.chips import Topology
from lm.plan.plan import Plan

AXES = ("data", "fsdp", "context", "tensor")  # the axis expert is left out: without experts it equals fsdp


def layouts(experiment: Experiment, name: str, topology: Topology) -> list[Plan]:
    """Plans of all meshes that divide the model and the batch: those that fit first, then by step time.

    Raises:
        UserError: no mesh does; has the last mesh's error.
    """
    found, reason = [], "no layout"
    for sizes in factors(topology.slice_devices, len(AXES)):
        mesh = dataclasses.replace(experiment.mesh, expert=1, **dict(zip(AXES, sizes, strict=True)))
        try:
            found.append(plan_stage(dataclasses.replace(experiment, mesh=mesh), name, topology))
        except UserError as error:
            reason = str(error)
    if not found:
        raise UserError(f"no layout of {topology.name} works for {name}; for instance: {reason}")
    return sorted(found, key=lambda plan: (not plan.fits, plan.step_s))


def factors(product: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield every ordered factorisation of a number into `count` factors."""
    if count == 1:
        yield (product,)
        return
    for first in range(1, product + 1):
        if product % first == 0:
            yield from ((first, *rest) for rest in factors(product // first, count - 1))
