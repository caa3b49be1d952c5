"""lm/parallel/row_order.py: devices that split a row have equal work, and the order of the text comes back."""

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel.mesh import make_mesh
from lm.parallel.row_order import ZigzagLayout, from_zigzag, to_zigzag, zigzag_layout
from tests.helpers import layout


def test_every_device_has_as_much_to_look_at():
    cut = ZigzagLayout(parts=4, each=2)
    places = to_zigzag(jnp.arange(64)[None], cut)[0].reshape(4, -1)
    assert len(set(places.sum(1).tolist())) == 1
    assert places[0].tolist() == [*range(8), *range(56, 64)]


def test_it_comes_back():
    x = jax.random.normal(jax.random.key(0), (2, 3, 24, 5))
    for cut in (ZigzagLayout(1, 1), ZigzagLayout(3, 1), ZigzagLayout(3, 2)):
        np.testing.assert_array_equal(from_zigzag(to_zigzag(x, cut, axis=2), cut, axis=2), x)


def test_rows_are_cut_in_two_chunks_a_device_where_they_can_be():
    assert zigzag_layout(64) == (1, 1)
    with jax.set_mesh(make_mesh(layout(context=4, fsdp=2))):
        assert [zigzag_layout(length) for length in (64, 12, 6)] == [(4, 2), (4, 1), (1, 1)]
