"""The TPU compiler on a small model: its memory and its module, by the command too."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm.cli.main import main
from lm.experiment import UserError
from lm.plan import analytic, compiled
from lm.plan.advise import plan_stage
from lm.plan.chips import parse_topology
from lm.plan.hlo_cost import estimate
from lm.plan.hlo_text import parse, read_text
from lm.plan.plan import by_compiler
from lm.plan.program import resolve
from tests.plan.plan_helpers import experiment
from tests.plan.test_hlo_cost import OTHER, other_estimate

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = parse_topology("v5e:2x2")
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason=f"no TPU compiler here: {compiled.INSTALL}"
)
EXPERIMENT = "from tests.plan.plan_helpers import experiment as make\nexperiment = make()\n"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """What the command prints of a small model, and the text that it saved."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "small.py").write_text(EXPERIMENT)
    words = [
        "plan",
        str(folder / "small.py"),
        "--topology",
        "v5e:2x2",
        "--compile",
        "--json",
        "--hlo",
        "step.hlo.txt.gz",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lm.cli.main", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # the experiment's file imports from the tests
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the compiler's own noise stays away
    return json.loads(done.stdout), folder / "step.hlo.txt.gz"


@needs_compiler
def test_the_command_gives_the_compilers_answer(planned):
    result, _ = planned
    assert result["source"] == "compiled" and result["fits"] and result["devices"] == 4
    assert result["compile_s"] > 0 and result["compiler"].startswith("libtpu")
    assert 0 < result["bound_ms"] <= result["step_ms"] and 0 < result["mfu"] < 1
    state = sum(result["memory_bytes"][name] for name in ("parameters", "optimizer", "batch"))
    assert result["hbm_bytes_per_device"] > state


@needs_compiler
def test_the_saved_text_gives_the_same_time(planned):
    result, file = planned
    cost = estimate(parse(read_text(file)), TOPOLOGY.chip)
    assert 1e3 * cost.schedule_s == pytest.approx(result["step_ms"])
    assert cost.unknown_loops == () and cost.kernel_flops > 0
    program = resolve(experiment(), experiment().stages[0], TOPOLOGY)
    assert cost.product_flops == pytest.approx(analytic.estimate(program).product_flops, rel=0.02)


@needs_compiler
@pytest.mark.skipif(not OTHER.is_file(), reason=f"no other estimator at {OTHER}")
def test_the_other_estimator_agrees_on_the_compiled_text(planned):
    result, file = planned
    other = other_estimate(file)
    assert result["step_ms"] == pytest.approx(1e3 * other["schedule_s"], rel=5e-3)
    assert result["bound_ms"] == pytest.approx(1e3 * other["bound_s"], rel=5e-3)


def test_without_the_compiler_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lm\[plan\]'"):
        by_compiler(plan_stage(experiment(), "train", TOPOLOGY))


def test_what_the_compiler_says_of_too_large_a_program_is_understood(monkeypatch):
    words = "E1000: CompileTimeHbmOom: the total memory required for HLO temporaries (21.50G) exceeds available HBM (15.75G)."
    found = compiled._out_of_memory(words + "\nmore")
    assert found.needed == int(21.5 * 2**30) and str(found) == words
    assert compiled._out_of_memory("INTERNAL: something else") is None

    def refuse(program):
        raise found

    monkeypatch.setattr("lm.plan.plan.compile_step", refuse)
    arithmetic = plan_stage(experiment(), "train", TOPOLOGY)
    plan = by_compiler(arithmetic)
    assert not plan.fits and plan.source == "compiled"
    assert plan.bytes == found.needed + arithmetic.memory.state + arithmetic.memory.batch


def test_the_text_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        compiled.save_text("", tmp_path / "nowhere" / "step.txt")
    assert main(["plan", "quickstart", "--topology", "v5e:2x2", "--hlo", "step.txt"]) == 2
