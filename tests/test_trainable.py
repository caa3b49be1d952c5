"""What trains is a partition: gradient, optimizer, checkpoint and plan see the part that `Stage.trainable` names."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from lm.algorithms.table import algorithm_of, first_state
from lm.experiment import PPO, SFT, Mesh, Optimizer, UserError
from lm.optimizer import make_optimizer
from lm.parallel.mesh import make_mesh
from lm.plan.analytic import estimate
from lm.plan.chips import parse_topology
from lm.plan.program import Program
from lm.train.checkpoint import Checkpoints, named_leaves
from lm.train.loop import checkpoint_items, restore, start_state
from tests.helpers import TINY, VOCAB, random_batch, tiny_model, tiny_stage

CASES = {
    "norms": (SFT(), ("policy/*norm*",), lambda name: "norm" in name),
    "frozen_embedding": (SFT(), ("!policy/*embed*",), lambda name: "embed" not in name),
    "value_head": (PPO(critic="head", max_new_tokens=8), ("critic/*",), lambda name: name.startswith("critic/")),
}
FAST = Optimizer(peak_lr=1e-1, warmup_steps=1)


def case(name, **changes):
    """The stage, and whether a path is of what trains."""
    objective, trainable, trains = CASES[name]
    return tiny_stage(objective, trainable=trainable, optimizer=dataclasses.replace(FAST, **changes)), trains


def steps(stage, count=3):
    """The state before and after some steps."""
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    before = after = first_state(stage, optimizer, tiny_model())
    step = jax.jit(algorithm_of(stage).step(stage, optimizer))
    for seed in range(count):
        after, _ = step(after, random_batch(seed=seed))
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", CASES)
def test_frozen_leaves_stay_to_the_bit_and_the_others_move(name, kind):
    stage, trains = case(name, kind=kind)
    before, after = steps(stage)
    old, new = named_leaves(before.models), named_leaves(after.models)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert moved == {path for path in old if trains(path)} and 0 < len(moved) < len(old)


@pytest.mark.parametrize("name", CASES)
def test_moments_are_of_what_trains_alone(name):
    stage, trains = case(name)
    before, _ = steps(stage, 0)
    count = sum(leaf.size for path, leaf in named_leaves(before.models).items() if trains(path))
    moments = [leaf for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count


def test_masters_are_of_what_trains_alone():
    stage, _ = case("norms")
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    state = first_state(stage, optimizer, tiny_model(param_dtype="bfloat16"))
    masters = named_leaves(state.opt_state.master)
    assert masters and all("norm" in path and leaf.dtype == "float32" for path, leaf in masters.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_part_goes_on_to_the_bit_from_its_checkpoint(name, tmp_path):
    stage, _ = case(name)
    mesh = make_mesh(Mesh(data=1))
    whole, step = start_state(stage, tiny_model(), mesh)
    for seed in range(2):
        whole, _ = step(whole, random_batch(seed=seed))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, checkpoint_items(whole), {})
        checkpoints.wait()
        fresh, _ = start_state(stage, tiny_model(), mesh)
        resumed, at, _ = restore(fresh, checkpoints, mesh, stage)
    assert at == 2
    for seed in (2, 3):
        whole, expected = step(whole, random_batch(seed=seed))
        resumed, got = step(resumed, random_batch(seed=seed))
    assert {key: float(value) for key, value in got.items()} == {key: float(value) for key, value in expected.items()}
    for one, other in zip(
        jax.tree.leaves(checkpoint_items(resumed)), jax.tree.leaves(checkpoint_items(whole)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_of_a_part_needs_less(name):
    stage, _ = case(name)
    topology = parse_topology("v5e:1x1")
    sizes = dict.fromkeys(dataclasses.asdict(Mesh(data=1)), 1)
    part, whole = (
        estimate(Program(dataclasses.replace(stage, trainable=chosen), TINY, VOCAB, topology, sizes))
        for chosen in (stage.trainable, ())
    )
    assert part.memory.parameters == whole.memory.parameters
    assert part.memory.optimizer < whole.memory.optimizer
    assert part.memory.total < whole.memory.total
    assert part.product_flops < whole.product_flops


@pytest.mark.parametrize(
    ("trainable", "said"),
    [
        (("polcy/*nrom*",), r"tiny\.trainable has 'polcy/\*nrom\*', which matches none .* policy/norm"),
        (("policy/*", "!policy/hed"), r"tiny\.trainable has '!policy/hed', which matches none"),
        (("!*",), r"tiny\.trainable is '!\*', which leaves nothing to train"),
    ],
)
def test_a_pattern_without_parameters_is_refused(trainable, said):
    stage = tiny_stage(SFT(), trainable=trainable)
    init = functools.partial(first_state, stage, optax.identity())
    with pytest.raises(UserError, match=said) as error:
        jax.eval_shape(init, jax.eval_shape(tiny_model))
    assert "\n" not in str(error.value)
