"""The TPU compiler on a small model: its memory and its module, by the command too."""

import gzip
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.cli.main import main
from lm.experiment import GRPO, UserError
from lm.plan import analytic, compiled, libtpu
from lm.plan.advise import plan_stage
from lm.plan.chips import parse_topology
from lm.plan.compiled import compile_step
from lm.plan.compiled_sampling import compiled_sampling
from lm.plan.compiler_text import read_module
from lm.plan.plan import by_compiler
from lm.plan.program import resolve
from lm.plan.sampling import sampling
from tests.plan.plan_helpers import experiment
from tests.plan.test_hlo_cost import OTHER, other_estimate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = parse_topology("v5e:2x2")
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler here: the extra plan has it"
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
    assert result["compiler"] == libtpu.find_libtpu(None).name
    state = sum(result["memory_bytes"][name] for name in ("parameters", "optimizer", "batch"))
    assert result["hbm_bytes_per_device"] > state


@needs_compiler
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_command_while_it_compiles_and_removes_the_compilers_files(tmp_path, number, code):
    (tmp_path / "small.py").write_text(EXPERIMENT)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "lm.cli.main", "plan", "small.py", "--topology", "v5e:2x2", "--compile"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
    )  # fmt: skip
    while not list(scratch.glob("*/*/*.before_optimizations.txt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal does, and a scheduler
    began = time.monotonic()
    assert process.communicate() == ("", "") and process.returncode == code
    assert time.monotonic() - began < 10 and not list(scratch.iterdir())  # compiling this takes 15 s


@needs_compiler
def test_the_saved_text_gives_the_same_time(planned):
    result, file = planned
    cost = read_module(gzip.decompress(file.read_bytes()).decode(), None, TOPOLOGY.chip)
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


@needs_compiler
def test_the_engines_programs_are_compiled_in_the_layout_of_sampling():
    value = experiment(GRPO(max_new_tokens=64, group_size=4), rollout=2, vocab_size=8192)
    program = resolve(value, value.stages[0], TOPOLOGY)
    expected = sampling(program)
    found, text = compiled_sampling(program, expected)
    assert "while" in text and found.sizes == expected.sizes
    assert found.compiler == libtpu.find_libtpu(None).name and found.compile_s > 0
    assert found.token_s >= max(found.weights_s, found.cache_s) and found.prompt_s > 0
    assert found.rollout_s == found.reshard_s + found.prompt_s + found.new_tokens * found.token_s


@needs_compiler
def test_where_a_mesh_splits_rows_no_device_gathers_the_residual_stream():
    """Of libtpu 0.0.42 a layout that is asked for outside of shard_map gathers the whole batch in every layer."""
    value = experiment(mesh={"fsdp": 2, "context": 2}, model={"max_len": 512}, seq_len=512)
    text = compile_step(resolve(value, value.stages[0], TOPOLOGY)).facts.text
    gathered = re.findall(r"= \(?\w+\[([\d,]+)\]\S* all-gather", text)
    assert gathered and max(math.prod(map(int, sizes.split(","))) for sizes in gathered) < 16 * 512 * 256


def test_without_the_compiler_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.delenv(libtpu.VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"{sys.executable} -m pip install 'lm[plan]'")):
        by_compiler(plan_stage(experiment(), "train", TOPOLOGY))


def test_a_program_that_is_refused_has_the_memory_that_it_needs(monkeypatch):
    found = compiled.OutOfMemory(int(21.5 * 2**30), "too large")

    def refuse(program, libtpu=None):
        raise found

    monkeypatch.setattr("lm.plan.plan.compile_step", refuse)
    monkeypatch.setattr(
        "lm.plan.plan.find_libtpu", lambda given: libtpu.Libtpu(Path("x"), "0.0.42.1", libtpu.required_by_jax())
    )
    arithmetic = plan_stage(experiment(), "train", TOPOLOGY)
    plan = by_compiler(arithmetic)
    assert not plan.fits and plan.source == "compiled"
    assert plan.bytes == found.needed + arithmetic.memory.state + arithmetic.memory.batch


def test_the_text_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        compiled.save_text("", tmp_path / "nowhere" / "step.txt")
    assert main(["plan", "quickstart", "--topology", "v5e:2x2", "--hlo", "step.txt"]) == 2


def package(folder: Path, version: str) -> Path:
    """What `pip install --no-deps --target FOLDER libtpu==VERSION` leaves, without its library's content."""
    (folder / "libtpu").mkdir(parents=True)
    (folder / "libtpu" / "libtpu.so").touch()
    (folder / f"libtpu-{version}.dist-info").mkdir()
    (folder / f"libtpu-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: libtpu\nVersion: {version}\n"
    )
    return folder


def test_another_compiler_is_named_and_told_from_the_one_that_hosts_run(tmp_path, monkeypatch):
    monkeypatch.delenv(libtpu.VARIABLE, raising=False)
    assert str(libtpu.required_by_jax()) == "==0.0.42.*"
    right, newer = package(tmp_path / "a", "0.0.42.1"), package(tmp_path / "b", "0.0.52")
    assert libtpu.find_libtpu(str(right)).name == "libtpu 0.0.42.1" and libtpu.find_libtpu(str(right)).notes == []
    for place in (newer, newer / "libtpu", newer / "libtpu" / "libtpu.so"):
        found = libtpu.find_libtpu(str(place))
        assert (
            found.name == "libtpu 0.0.52"
            and "hosts with jax" in found.notes[0]
            and "libtpu ==0.0.42.*" in found.notes[0]
        )
    monkeypatch.setenv(libtpu.VARIABLE, str(newer / "libtpu" / "libtpu.so"))  # jax would load this one
    assert libtpu.find_libtpu(None).version == "0.0.52"
    assert libtpu.find_libtpu(str(right)).version == "0.0.42.1"
    alone = tmp_path / "libtpu.so"
    alone.touch()
    assert libtpu.find_libtpu(str(alone)).version is None and len(libtpu.find_libtpu(str(alone)).notes) == 1


def test_a_compiler_that_is_not_there_is_told_in_one_line(tmp_path, capfd):
    words = ["plan", "tiny", "--topology", "v5e:2x2", "--libtpu", str(tmp_path)]
    assert main([*words, "--compile"]) == 2
    assert "--libtpu" in capfd.readouterr().err
    assert main(words) == 2
    assert "needs --compile" in capfd.readouterr().err
