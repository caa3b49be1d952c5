"""The tables of plans: each row can be made, and arithmetic agrees with what the compiler said when it was asked."""

import json

import pytest

from benchmarks import ahead_of_time
from benchmarks.ahead_of_time import RESULTS, TABLES, tables

KEPT = json.loads((RESULTS / "ahead_of_time_memory.json").read_text())


@pytest.mark.parametrize("row", TABLES["memory"], ids=lambda row: row.name)
def test_memory_by_arithmetic_is_within_5_percent_of_the_compilers(row):
    """Of the compilers' numbers kept in benchmarks/results; `ahead_of_time.py memory --compile` asks one again."""
    compilers = {name: found["hbm_bytes_per_device"] for name, found in KEPT[row.name].items() if name != "analytic"}
    assert compilers
    planned = row.plan().bytes
    assert dict.fromkeys(compilers, planned) == pytest.approx(compilers, rel=0.05)


def test_rows_are_made_kept_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead_of_time, "RESULTS", tmp_path)
    text = tables(("scaling",), only="0.6B, v5e:")
    lines = [line for line in text.splitlines() if line.startswith("| 0.6B")]
    assert [line.split(" | ")[0] for line in lines] == [f"| 0.6B, {name}" for name in ahead_of_time.SQUARES]
    assert lines[-1].count("%)") == 1 and lines[0].count("%)") == 0  # growth against the smallest
    kept = json.loads((tmp_path / "ahead_of_time_scaling.json").read_text())
    assert {entry["analytic"]["source"] for entry in kept.values()} == {"analytic"}


@pytest.mark.slow
@pytest.mark.parametrize("table", ["goal", "objectives"])
def test_every_row_fits_its_topology(table):
    for row in TABLES[table]:
        assert row.plan().fits, row.name
