"""What trains is a partition: gradient, optimizer, checkpoint and plan see the part that `Stage.trainable` names."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import optax
import pytest

from lm.algorithms import algorithm_of
from lm.algorithms.state import first_state
from lm.experiment import PPO, SFT, Experiment, Mesh, Optimizer, Tokenizer, UserError
from lm.optimizer import make_optimizer
from lm.parallel.mesh import make_mesh
from lm.plan.analytic import estimate
from lm.plan.chips import parse_topology
from lm.plan.program import Program
from lm.sweep.cost import checkpoint_bytes
from lm.train.checkpoint import Checkpoints
from lm.train.loop import checkpoint_items, restore, start_state, untrained
from lm.train.memory import least_bytes
from lm.train.named_arrays import named_leaves
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


def program_of(stage, topology, **axes):
    sizes = dict.fromkeys(dataclasses.asdict(Mesh(data=1)), 1) | axes
    return Program(stage, TINY, VOCAB, parse_topology(topology), sizes)


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
        checkpoints.save(2, checkpoint_items(whole), {}, untrained(stage, whole.models))
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


def saved_twice(folder):
    """A stage that trains norms alone, its checkpoints of steps 1 and 2, and its state at step 2."""
    stage, _ = case("norms")
    state, step = start_state(stage, tiny_model(), make_mesh(Mesh(data=1)))
    with Checkpoints(folder) as checkpoints:
        for number in (1, 2):
            state, _ = step(state, random_batch(seed=number))
            checkpoints.save(number, checkpoint_items(state), {}, untrained(stage, state.models))
    return stage, state


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_what_does_not_train_is_stored_once_beside_the_steps(tmp_path):
    stage, state = saved_twice(tmp_path)
    policy = named_leaves({"policy": state.models["policy"]})
    apart = untrained(stage, state.models)
    assert apart == {path for path in policy if "norm" not in path}
    fixed = sum(policy[path].nbytes for path in apart)
    assert size_of(tmp_path / "untrained") >= fixed > 2 * size_of(tmp_path / "00000002" / "policy")
    shapes = {"policy": jax.eval_shape(lambda: state.models["policy"])}
    with Checkpoints(tmp_path) as checkpoints:  # a reader that knows nothing of the stage gets the model whole
        found = named_leaves(checkpoints.restore(shapes).items)
    for path, leaf in policy.items():
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("hurt", ["flip", "remove", "no manifest"])
def test_a_step_whose_untrained_arrays_are_damaged_is_refused(tmp_path, hurt):
    _, state = saved_twice(tmp_path)
    folder = tmp_path / "untrained"
    largest = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    if hurt == "flip":
        largest.write_bytes(bytes([largest.read_bytes()[0] ^ 1]) + largest.read_bytes()[1:])
    else:
        (largest if hurt == "remove" else folder / "manifest.json").unlink()
    shapes = {"policy": jax.eval_shape(lambda: state.models["policy"])}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"every checkpoint \(step 1, 2\) is damaged"):
            checkpoints.restore(shapes, warn=lambda line: None)
        with pytest.raises(UserError, match=r"untrained.*the last checkpoint of a finished stage"):
            checkpoints.restore(shapes, only=2)


def test_a_stage_that_begins_again_replaces_what_an_earlier_start_left(tmp_path):
    stage, state = saved_twice(tmp_path)
    for number in (1, 2):
        shutil.rmtree(tmp_path / f"{number:08d}")
    other = dataclasses.replace(state, models=jax.tree.map(lambda x: x + 1, state.models))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, checkpoint_items(other), {}, untrained(stage, other.models))
        found = checkpoints.restore({"policy": jax.eval_shape(lambda: other.models["policy"])})
    np.testing.assert_array_equal(found.items["policy"].embed.weight, other.models["policy"].embed.weight)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_of_a_part_needs_less(name):
    stage, _ = case(name)
    part, whole = (
        estimate(program_of(dataclasses.replace(stage, trainable=chosen), "v5e:1x1"))
        for chosen in (stage.trainable, ())
    )
    assert part.memory.parameters == whole.memory.parameters
    assert part.memory.optimizer < whole.memory.optimizer
    assert part.memory.total < whole.memory.total
    assert part.product_flops < whole.product_flops


@pytest.mark.parametrize("name", CASES)
def test_only_gradients_of_what_trains_are_sent(name):
    """Each device sums its part of them over `data`; norms lie whole on every device, all else in two parts."""
    stage, trains = case(name)
    program = program_of(stage, "v5e:2x2", data=2, fsdp=2)
    sent = [item.bytes for item in estimate(program).traffic if item.what == "gradients" and item.axes == ("data",)]
    models = named_leaves(first_state(stage, optax.identity(), tiny_model()).models)
    expected = sum(
        4 * leaf.size / (1 if "norm" in path or path.startswith("critic") else 2)
        for path, leaf in models.items()
        if trains(path)
    )
    assert sent == [expected]


def test_no_activation_is_sent_back_where_the_backward_pass_does_not_go():
    """Two sums a layer on the way forward, as many back, and one more for what full rematerialisation computes again."""
    model = dataclasses.replace(TINY, remat="full")
    sums = {}
    for name in ("value_head", "norms"):
        stage, _ = case(name)
        found = estimate(dataclasses.replace(program_of(stage, "v5e:2x2", tensor=2, fsdp=2), model=model)).traffic
        sums[name] = sum(item.bytes for item in found if item.what == "activations")
    assert sums["value_head"] == 2 / 5 * sums["norms"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_sweep_counts_the_bytes_of_a_checkpoint_of_a_part(name, dtype):
    """The models, what does not train once for all checkpoints, and of the optimizer what belongs to the part that trains."""
    stage, _ = case(name)
    stage = dataclasses.replace(stage, keep_last=1)
    model = dataclasses.replace(TINY, param_dtype=dtype)
    experiment = Experiment(name="x", stages=(stage,), tokenizer=Tokenizer(vocab_size=VOCAB), model=model)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    saved = checkpoint_items(first_state(stage, optimizer, tiny_model(param_dtype=dtype)))
    assert checkpoint_bytes(experiment, stage) == sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
    lean = dataclasses.replace(stage, keep_moments=False)
    apart = untrained(stage, {"policy": saved["policy"], "critic": saved.get("critic", {})})
    sizes = {f"{item}/{path}": x.nbytes for item in saved for path, x in named_leaves(saved[item]).items()}
    policy = {path for path in sizes if path.startswith("policy/")}
    assert checkpoint_bytes(experiment, lean) == sum(sizes[path] for path in policy | apart)
    twice = dataclasses.replace(experiment, stages=(dataclasses.replace(stage, keep_last=2, save_every=1),))
    more = checkpoint_bytes(twice, twice.stages[0]) - checkpoint_bytes(experiment, stage)
    assert more == sum(size for path, size in sizes.items() if path not in apart)


@pytest.mark.parametrize("name", CASES)
def test_the_memory_that_a_stage_needs_at_least_is_of_what_trains(name):
    stage, trains = case(name)
    sizes = dict.fromkeys(dataclasses.asdict(Mesh(data=1)), 1)
    state, activations = least_bytes(TINY, stage, sizes, VOCAB)
    policy = named_leaves({"policy": tiny_model()})
    whole, part = (sum(x.size for path, x in policy.items() if counts(path)) for counts in (lambda path: True, trains))
    assert state == 4 * whole + (4 + 2 * 4) * part
    assert (activations == 0) == (name == "value_head")


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
