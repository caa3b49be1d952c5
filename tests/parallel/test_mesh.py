"""Mesh sizes are filled up and checked against devices and shapes, by name."""

import pytest

from lm.experiment import SFT, Experiment, Mesh, Model, UserError
from lm.parallel.mesh import axis_sizes, check_fits
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
