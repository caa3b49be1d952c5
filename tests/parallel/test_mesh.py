"""Mesh sizes are filled up and checked against devices and shapes, by name."""

import pytest

from lm.experiment import SFT, Experiment, Mesh, Model, RolloutMesh, UserError
from lm.parallel.mesh import axis_sizes, check_fits, rollout_sizes
from tests.helpers import tiny_stage


def test_minus_one_takes_what_is_left():
    ones = dict.fromkeys(("slices", "data", "fsdp", "expert", "context", "tensor"), 1)
    assert axis_sizes(Mesh(data=-1, fsdp=2, tensor=2), 8) == ones | {"data": 2, "fsdp": 2, "tensor": 2}
    assert axis_sizes(Mesh(data=2), 8) == ones | {"data": 2}


@pytest.mark.parametrize(
    "mesh, message",
    [
        (Mesh(data=16), "needs 16 devices; there are 8"),
        (Mesh(data=-1, fsdp=-1), "at most one is -1"),
        (Mesh(data=-1, fsdp=3), "does not divide the 8 devices"),
        (Mesh(data=0), "sizes are 1 or more"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        axis_sizes(mesh, 8)


def test_a_layout_of_sampling_takes_all_devices_of_the_mesh():
    ones = dict.fromkeys(("slices", "data", "fsdp", "expert", "context", "tensor"), 1)
    sizes = ones | {"slices": 2, "fsdp": 8, "tensor": 2}
    assert rollout_sizes(RolloutMesh(4), sizes) == ones | {"slices": 2, "data": 4, "tensor": 4}
    assert rollout_sizes(RolloutMesh(), sizes) == sizes


@pytest.mark.parametrize(
    ("tensor", "sizes", "can"),
    [
        (3, {"fsdp": 8}, "the 8 devices of the mesh, model.num_heads 4, model.num_kv_heads 4, model.mlp_dim 1024: 1, 2, 4,"),
        (8, {"fsdp": 8}, ".*: 1, 2, 4, or be 0"),
        (4, {"fsdp": 2}, "the 2 devices of the mesh, model.num_heads 4, model.num_kv_heads 4, model.mlp_dim 1024: 1, 2,"),
        (4, {"slices": 2, "fsdp": 2}, "the 2 devices of the mesh in a slice, .*: 1, 2,"),
    ],
)  # fmt: skip
def test_a_layout_of_sampling_that_cannot_be_is_refused_with_those_that_can(tensor, sizes, can):
    model = Model(num_heads=4, num_kv_heads=4, mlp_dim=1024)
    value = Experiment(name="x", stages=(tiny_stage(SFT()),), model=model, rollout_mesh=RolloutMesh(tensor))
    with pytest.raises(UserError, match=f"^rollout_mesh.tensor is {tensor}; it should divide {can}"):
        check_fits(value, axis_sizes(Mesh(**({"data": 1} | sizes)), 8), platform="cpu")


@pytest.mark.parametrize(
    "model, stage, message",
    [
        (
            Model(),
            {"batch_size": 6},
            r"6 rows in a microbatch .*tiny\.batch_size 6.*mesh\.data x mesh\.fsdp = 2 x 2 = 4; 6 divides by 1, 2, 3, 6",
        ),
        (Model(embed_dim=33), {}, "embed_dim 33 is not a multiple of mesh.fsdp 2"),
        (Model(num_kv_heads=1), {}, "num_kv_heads 1 is not a multiple of mesh.tensor 2"),
    ],
)
def test_shapes_are_checked_against_the_mesh(model, stage, message):
    experiment = Experiment(name="x", stages=(tiny_stage(SFT(), **stage),), model=model)
    with pytest.raises(UserError, match=message):
        check_fits(experiment, axis_sizes(Mesh(data=2, fsdp=2, tensor=2), 8))
