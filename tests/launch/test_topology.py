"""The slices of TPUs: that what is paid for adds up, and the names under which they are asked for."""

import pytest

from lm.experiment import UserError
from lm.launch.topology import GENERATIONS, parse_topology
from lm.parallel.topology import SHAPES

NAMES = [f"{kind}:{shape}" for kind in GENERATIONS for shape in SHAPES[kind]]


@pytest.mark.parametrize("name", NAMES)
def test_hosts_times_chips_is_the_slice(name):
    topology = parse_topology(name)
    assert topology.hosts * topology.chips_per_host == topology.chips
    assert topology.chips_per_host in (1, 4, 8)


@pytest.mark.parametrize("kind", GENERATIONS)
def test_no_two_slices_have_the_same_name(kind):
    names = [parse_topology(f"{kind}:{shape}").accelerator_type for shape in SHAPES[kind]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name, accelerator_type, hosts, devices", [
    ("v4:2x2x4", "v4-32", 4, 16),
    ("v5e:1x1", "v5litepod-1", 1, 1),
    ("v5e:2x4", "v5litepod-8", 1, 8),
    ("v5e:4x4", "v5litepod-16", 4, 16),
    ("v5p:2x4x4", "v5p-64", 8, 32),
    ("v5p:4x4x4", "v5p-128", 16, 64),
    ("v6e:4x4", "v6e-16", 4, 16),
    ("v6e:16x16", "v6e-256", 64, 256),
    ("tpu7x:2x2x1", "tpu7x-8", 1, 8),
    ("tpu7x:4x4x4", "tpu7x-128", 16, 128),
])  # fmt: skip
def test_slices_that_the_documentation_names(name, accelerator_type, hosts, devices):
    topology = parse_topology(name)
    assert (topology.accelerator_type, topology.hosts, topology.devices) == (accelerator_type, hosts, devices)


@pytest.mark.parametrize("name, words", [
    ("v5x:4x4", ["'v5x'", "v4, v5e, v5p, v6e, tpu7x"]),
    ("v5lite", ["'v5lite'", "v5e"]),
    ("v5e:3x3", ["'3x3'", "1x1, 2x2, 2x4, 4x4"]),
    ("v5p:4x4", ["'4x4'", "2x2x1, 2x2x2"]),
    ("v5p", ["v5p has no shape ''", "2x4x4"]),
])  # fmt: skip
def test_a_name_that_does_not_exist_shows_those_that_do(name, words):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    assert all(word in str(error.value) for word in words), error.value
