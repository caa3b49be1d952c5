"""The contestant `lm` of the CPU contests runs with today's steps and sampler."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from lm.experiment import Mesh
from lm.parallel.mesh import make_mesh

FILE = Path(__file__).parents[2] / "benchmarks" / "contest_lm.py"
MODEL = {"layers": 1, "d_model": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 32, "vocab": 64, "rope_theta": 1e4, "norm_eps": 1e-6, "tied": True}  # fmt: skip
SIZES = {
    "A": {"batch": 8, "seq": 16},
    "B": {"batch": 2, "prompt": 8, "new": 8, "temperature": 1.0},
    "C": {"pairs": 8, "seq": 16, "prompt": 8, "beta": 0.1},
    "lora": {"batch": 8, "seq": 16},
    "D": {"prompts": 4, "group": 2, "prompt": 8, "new": 8, "temperature": 1.0, "beta": 0.0, "warmup": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("contest", SIZES)
def test_each_contest_takes_a_step(contest):
    spec = importlib.util.spec_from_file_location("contest_lm", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def timed(step, name):
        assert name == ("A" if contest == "lora" else contest)
        step()
        return {"times": [1.0]}

    kit = SimpleNamespace(MODEL=MODEL, OPT={"lr": 1e-3, "b2": 0.99, "weight_decay": 0.0, "clip": 1.0}, timed=timed)
    with jax.set_mesh(make_mesh(Mesh())):  # a contestant sets it for the whole process
        model = module.model_of(kit, contest, "float32")
        result = module.CONTESTS[contest](kit, SIZES[contest], model)
    assert jax.sharding.get_abstract_mesh().empty
    assert result["times"] == [1.0]
    assert ("rollout_ms" in result) == (contest == "D")
