"""A stage that cannot fit is refused before anything compiles, by a bound that is below what is really needed."""

import dataclasses

import pytest

from lm.experiment import DPO, GRPO, SFT, Model, Optimizer, RewardModel, UserError
from lm.parallel.mesh import axis_sizes
from lm.plan.analytic import estimate
from lm.plan.chips import parse_topology
from lm.plan.program import resolve
from lm.train.memory import check_memory, device_memory, least_bytes
from tests.plan.plan_helpers import experiment

TOPOLOGY = parse_topology("v5e:2x2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [SFT(), DPO(), GRPO(group_size=4), RewardModel(layers=1)], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("remat, dtype", [("none", "float32"), ("full", "bfloat16")])
def test_the_bound_is_below_the_plan(objective, remat, dtype):
    value = experiment(objective, model={"remat": remat, "param_dtype": dtype}, rows=64)
    memory = estimate(resolve(value, value.stages[0], TOPOLOGY)).memory
    state, activations = least_bytes(value.model, value.stages[0], axis_sizes(value.mesh, 4), 1024)
    assert state <= memory.state + memory.gradients + memory.activations and state + activations <= memory.total


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model": {"embed_dim": 2**20}}, "parameters with gradients and optimizer"),
        ({"model": {"num_layers": 2**14, "mlp_dim": 2**16}}, "parameters with gradients and optimizer"),
        ({"rows": 2**24}, "activations of 16,777,216 rows of 256 tokens"),
    ],
    ids=str,
)
def test_what_no_machine_holds_is_refused_in_one_line(changes, told):
    value = experiment(**changes)
    with pytest.raises(UserError, match="train needs at least") as refusal:
        check_memory(value, axis_sizes(value.mesh, 1), 1024)
    assert told in str(refusal.value) and "this machine has" in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_fits_is_taken():
    value = experiment(model={"embed_dim": 512})
    check_memory(value, axis_sizes(value.mesh, 1), 1024)
    stage = dataclasses.replace(value.stages[0], optimizer=Optimizer(kind="muon", state_dtype="bfloat16"))
    need = sum(least_bytes(Model(), stage, axis_sizes(value.mesh, 1), 1024))
    assert need < sum(least_bytes(Model(), value.stages[0], axis_sizes(value.mesh, 1), 1024)) < device_memory()
