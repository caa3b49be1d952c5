"""The door to the compiler's texts: plain facts of versions that have been tried, one line for others, no silent guess."""

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import lm
from lm.experiment import UserError
from lm.plan import compiler_text
from lm.plan.chips import CHIPS
from lm.plan.compiler_text import TESTED, read_compiled, read_module, refused_bytes, untested
from tests.plan.test_hlo_cost import TEXT

ROOT = Path(lm.__file__).parent
ALLOCATIONS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 x @0> (size=512,offset=0): f32[]
allocation 1: size 4096, parameter 12, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 1000, preallocated-temp:
allocation 3: size 76, color 2, preallocated-temp:
allocation 4: size 77, color 1, page 0, preallocated-temp:
allocation 5: size 10, page 0, constant:
"""
SIZES = {"argument_size_in_bytes": 100, "temp_size_in_bytes": 50, "output_size_in_bytes": 90, "alias_size_in_bytes": 70}


def facts(folder, text=TEXT, libtpu="0.0.42.1"):
    executable = SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: SimpleNamespace(**SIZES))
    return read_compiled(executable, folder, libtpu, CHIPS["v5e"], 1)


def test_facts_are_plain_numbers(tmp_path):
    (tmp_path / "module_0000.jit_step.after_optimizations-buffer-assignment.txt").write_text(ALLOCATIONS)
    found = facts(tmp_path)
    assert found.peak_bytes == 512 + 4096 + 1000 + 10  # what is allocated in HBM, not in memories with a color
    assert found.cost.product_flops == 3 * 2 * 128 * 256 * 512 and found.cost.schedule_s > 0
    assert {item.kind for item in found.cost.collectives} == {"all-gather", "all-reduce"}
    assert found.text == TEXT and found.notes == ()


@pytest.mark.parametrize("written", ["", "nothing that is known"])
def test_where_no_allocation_is_listed_a_line_says_whose_memory_it_is(written, tmp_path):
    (tmp_path / "x-buffer-assignment.txt").write_text(written)
    found = facts(tmp_path)
    assert found.peak_bytes == 100 + 50 + 20
    (note,) = found.notes
    assert "listed no allocations" in note and "memory_analysis()" in note


@pytest.mark.parametrize("libtpu", [*TESTED["libtpu"], "0.0.43", "0.0.42.2", "0.1", None])
@pytest.mark.parametrize("jaxlib", [*TESTED["jaxlib"], "0.11.0"])
def test_another_version_is_one_line_that_names_it_and_the_tested_ones(libtpu, jaxlib, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler_text, "version", {"jaxlib": jaxlib}.get)
    (tmp_path / "x-buffer-assignment.txt").write_text(ALLOCATIONS)
    notes = facts(tmp_path, libtpu=libtpu).notes
    new = [libtpu or "unknown"] * (libtpu not in TESTED["libtpu"]) + [jaxlib] * (jaxlib not in TESTED["jaxlib"])
    assert len(notes) == bool(new)
    for note in notes:
        assert "\n" not in note and all(name in note for name in (*new, *TESTED["libtpu"], *TESTED["jaxlib"]))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text.replace("estimated_cycles", "cycles"),
        lambda text: text.replace("ENTRY ", ""),
        lambda text: text.replace("direction=LT", "way=LT").replace("compare(%i, %limit)", "compare(%none, %limit)"),
        lambda text: text.replace("dim_labels=bf_io->bf", "labels"),
    ],
    ids=["empty", "no cycles", "no entry", "an operand that is not there", "a product without labels"],
)
def test_what_cannot_be_read_gives_no_figures(change):
    """Of an untested version in one line; of a tested one it is a fault of ours, with its traceback."""
    text, chip = change(TEXT), CHIPS["v5e"]
    with pytest.raises(UserError, match=re.escape("the text of libtpu 0.0.99 was read as that of")) as error:
        read_module(text, "0.0.99", chip)
    assert "\n" not in str(error.value)
    with pytest.raises((ValueError, LookupError, AttributeError, AssertionError)):
        read_module(text, "0.0.42.1", chip)


def test_the_versions_that_are_installed_are_tested_ones():
    """By the constraints, from which hosts install; and jaxlib here."""
    pinned = dict(line.split("==") for line in (ROOT.parent / "constraints.txt").read_text().split() if "==" in line)
    assert all(pinned[name] in known for name, known in TESTED.items())
    assert untested(pinned["libtpu"]) == () or importlib.metadata.version("jaxlib") not in TESTED["jaxlib"]


def test_what_the_compiler_says_of_too_large_a_program_is_understood():
    words = "E1000: CompileTimeHbmOom: the total memory required for HLO temporaries (21.50G) exceeds available HBM (15.75G)."
    assert refused_bytes(words + "\nmore") == int(21.5 * 2**30)
    assert refused_bytes("INTERNAL: something else") is None


def test_nothing_else_reads_the_text():
    """The modules that know its form are imported by this one alone."""
    readers = [
        path for path in ROOT.rglob("*.py") if re.search(r"from lm\.plan\.hlo_|lm\.plan import hlo_", path.read_text())
    ]
    assert {path.name for path in readers if not path.name.startswith("hlo_")} == {"compiler_text.py"}
