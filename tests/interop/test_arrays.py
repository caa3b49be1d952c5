"""Weights are read into sharded arrays as they are read whole, and little beside the arrays is in memory meanwhile."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from flax import nnx

from lm.experiment import Mesh, Model
from lm.interop import arrays, hf, tensors
from lm.interop.export import write
from lm.model.transformer import Transformer
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import shardings

SHAPE = Model(
    num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_len=64,
    qk_norm=False, qkv_bias=True, tied_head=False,
)  # fmt: skip


def written(folder, family="", **changes):
    config = dataclasses.replace(SHAPE, **changes)
    model = jax.jit(lambda: Transformer(config, 96, jax.random.key(0)))()
    write(model, folder, family)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family, bias, dtype", [("qwen2", True, "bfloat16"), ("phi3", False, "float32")])
def test_each_device_gets_its_shard(tmp_path, monkeypatch, family, bias, dtype):
    monkeypatch.setattr(tensors, "BLOCK", 500)
    model = written(tmp_path, family, qkv_bias=bias)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    in_place = hf.read(tmp_path, mesh, param_dtype=dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    by_layer = hf.read(tmp_path, mesh, param_dtype=dtype)
    is_array = {"is_leaf": lambda leaf: isinstance(leaf, nnx.Variable)}
    for place, *leaves in zip(*(jax.tree.leaves(tree, **is_array) for tree in (shardings(model, mesh), model, in_place, by_layer)), strict=True):  # fmt: skip
        expected = np.asarray(leaves[0][...]).astype(dtype)
        for leaf in leaves[1:]:
            assert leaf[...].sharding == place.get_value()
            np.testing.assert_array_equal(np.asarray(leaf[...]), expected)


def test_the_memory_that_is_read_into_is_that_of_the_array(tmp_path, monkeypatch):
    written(tmp_path)
    filled = []
    original = arrays._filled
    monkeypatch.setattr(arrays, "_filled", lambda *given: filled.append(original(*given)) or filled[-1])
    model = hf.read(tmp_path, make_mesh(Mesh(data=1)))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)] == [one.ctypes.data for one in filled]


def test_beside_the_arrays_less_than_the_largest_tensor_is_in_memory(tmp_path, monkeypatch):
    written(tmp_path, embed_dim=128, mlp_dim=1024)
    monkeypatch.setattr(tensors, "BLOCK", 2**14)
    tracemalloc.start()
    hf.read(tmp_path, make_mesh(Mesh(data=1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * 4 * 128 * 1024
