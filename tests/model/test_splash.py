"""lm/model/kernels/splash.py against plain attention, values and gradients, the kernel interpreted."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lm.check import check
from lm.experiment import SFT, Experiment, Mesh, Model, Source, Stage, UserError
from lm.model.attention import attend, attention_mask
from lm.model.kernels.splash import block_size, fits, splash
from lm.model.transformer import Transformer
from lm.parallel.mesh import axis_sizes, check_fits, make_mesh
from lm.parallel.row_order import from_zigzag, to_zigzag, zigzag_layout
from tests.helpers import layout

pytestmark = pytest.mark.slow

LENGTH, HEADS, KV_HEADS, WIDTH = 256, 4, 2, 128
WIDE = Model(num_layers=2, embed_dim=64, num_heads=2, num_kv_heads=1, head_dim=WIDTH, mlp_dim=64, max_len=LENGTH)


def packed(rows: int, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segments) of rows that hold two documents and padding, cut at another place in each."""
    cuts = [(40 + 7 * i, length // 2 - 28 + 11 * i) for i in range(rows)]
    parts = [(a, b, length - a - b) for a, b in cuts]
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in parts])
    segments = np.stack([np.repeat([1, 2, 0], row) for row in parts])
    return positions.astype(np.int32), segments.astype(np.int32)


def both(rows: int, window: int = 0, softcap: float = 0.0, length: int = LENGTH):
    """(value, gradients) of a weighted sum of the kernel's and of plain attention's result; padding has no weight."""
    cut = zigzag_layout(length)
    positions, segments = packed(rows, length)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, n, length, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    weights = weights * (segments > 0)[:, None, :, None]
    mask = attention_mask(positions, positions, segments, segments, window)

    def by_kernel(q, k, v):
        q, k, v = (to_zigzag(x, cut, axis=2) for x in (q, k, v))
        out = splash(q, k, v, to_zigzag(segments, cut), (128,) * 4, window, softcap, interpret=True)
        return (from_zigzag(out, cut, axis=2) * weights).sum()

    fast = jax.value_and_grad(by_kernel, (0, 1, 2))
    slow = jax.value_and_grad(lambda q, k, v: (attend(q, k, v, mask, softcap) * weights).sum(), (0, 1, 2))
    return jax.jit(fast)(q, k, v), jax.jit(slow)(q, k, v)


def agree(fast, slow):
    np.testing.assert_allclose(fast[0], slow[0], rtol=1e-4)
    for got, wanted in zip(fast[1], slow[1], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.fixture(params=["a whole row", "pieces of a row"])
def backward(request, monkeypatch):
    """Both ways to the gradients: of devices whose vector memory holds the sums of a row, and of others."""
    row = 3 * LENGTH * WIDTH * 4
    memory = {"cpu": 2 * row if request.param == "a whole row" else row}
    monkeypatch.setattr("lm.model.kernels.splash_kernels.VECTOR_MEMORY", memory)


def test_packed_rows_and_grouped_heads(backward):
    agree(*both(rows=2))


def test_a_window_and_squeezed_scores(backward):
    agree(*both(rows=2, window=50, softcap=0.7))


def test_a_window_that_leaves_blocks_out(backward):
    agree(*both(rows=1, window=20))


def test_on_a_mesh_each_device_has_its_rows_and_heads(backward):
    with jax.set_mesh(make_mesh(layout(data=2, fsdp=2, tensor=2))):
        agree(*both(rows=4))


def test_devices_that_split_a_row_gather_keys_and_values(backward):
    with jax.set_mesh(make_mesh(layout(fsdp=2, context=2, tensor=2))):
        agree(*both(rows=2, length=512))


@pytest.mark.parametrize("window", [0, 200])
def test_each_device_has_an_early_and_a_late_chunk_of_a_row(window):
    with jax.set_mesh(make_mesh(layout(context=4, tensor=2))):
        assert zigzag_layout(1024) == (4, 2)
        agree(*both(rows=1, length=1024, window=window))


def test_a_model_has_the_same_logits_and_gradients_with_it(backward, monkeypatch):
    monkeypatch.setattr("lm.model.kernels.splash.splash", functools.partial(splash, interpret=True))
    positions, segments = packed(2)
    tokens = jax.random.randint(jax.random.key(1), positions.shape, 0, 64)
    found = {}
    for kind in ("plain", "splash"):
        model = jax.jit(
            lambda kind=kind: Transformer(dataclasses.replace(WIDE, attention=kind), 64, jax.random.key(0))
        )()

        def loss(model):
            logits = jax.nn.log_softmax(model(tokens, positions, segments))
            return (logits[..., 7] * (segments > 0)).sum()

        value, gradient = jax.jit(jax.value_and_grad(loss))(model)
        found[kind] = value, jax.tree.leaves(gradient)
    agree(found["splash"], found["plain"])


def test_blocks_divide_the_row():
    assert [block_size(length, 512) for length in (128, 256, 384, 640, 2048)] == [128, 256, 384, 128, 512]


def test_it_takes_shapes_that_are_whole_vectors_and_as_many_rows_for_every_device():
    assert fits(1, 256, 128) and not fits(1, 200, 128) and not fits(1, 256, 64)
    with jax.set_mesh(make_mesh(layout(data=2, fsdp=2, tensor=2))):
        assert fits(8, 256, 128) and not fits(6, 256, 128)


def test_what_the_kernel_does_not_take_is_refused_where_it_is_asked_for():
    stage = Stage("sft", SFT(), (Source("gen:instruct"),), seq_len=LENGTH)
    asked = Experiment("x", (stage,), model=dataclasses.replace(WIDE, attention="splash"))
    check(asked)
    with pytest.raises(
        UserError, match=r"model\.head_dim is 64 and model\.attention is splash, which needs a multiple of 128"
    ):
        check(dataclasses.replace(asked, model=dataclasses.replace(asked.model, head_dim=64)))
    with pytest.raises(UserError, match=r"sft\.seq_len is 200"):
        check(dataclasses.replace(asked, stages=(dataclasses.replace(stage, seq_len=200),)))
    with pytest.raises(UserError, match=r"splash is a kernel for TPUs; the devices here are cpu"):
        check_fits(asked, axis_sizes(Mesh(data=1), 1))
