"""Topologies by name."""

import pytest

from lm.experiment import UserError
from lm.model.flops import PEAK_FLOPS, peak_flops
from lm.plan.chips import CHIPS, parse_topology


def test_a_topology_counts_its_devices():
    assert parse_topology("v5e:4x4").devices == 16
    assert parse_topology("v5p:2x4x4", slices=2).devices == 64
    assert parse_topology("tpu7x:2x2x1").devices == 8  # two devices a chip
    assert parse_topology("v5p:2x4x4").name == "v5p:2x4x4"
    assert parse_topology("h100:8", slices=2).devices == 16


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5e:3x3", "there are 1x1, 2x2, 2x4"),
        ("v5e-16", "no chip 'v5e-16'; there are v5e, v5p, v6e, tpu7x, a100, h100, h200 (v5p:2x4x4); did you mean v5e?"),
        ("v5p", "v5p has no shape ''; there are"),
        ("v5p:2x4", "2x2x1"),
        ("b300:8", "there are v5e, v5p, v6e, tpu7x, a100, h100, h200"),
        ("h100:3", "h100 has no shape '3'; there are 1, 2, 4, 8"),
    ],
)
def test_a_name_that_does_not_exist_shows_those_that_do(name, told):
    with pytest.raises(UserError, match=r"--topology") as raised:
        parse_topology(name)
    assert told in str(raised.value)


def test_every_chip_has_its_peak_in_the_one_table():
    for chip in CHIPS.values():
        assert any(chip.kind.startswith(name) for name in PEAK_FLOPS)
        assert chip.peak == peak_flops(chip.kind)
        assert chip.network < chip.interconnect < chip.hbm_rate
