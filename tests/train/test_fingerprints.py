"""The fingerprints of a run cover what it reads from other places, each under the name that a field gives it."""

import json

import numpy as np
import pytest

from lm.experiment import GRPO, PPO, Distill, Eval, Experiment, Source, Stage
from lm.train.checkpoint import Checkpoints
from lm.train.fingerprints import fingerprints
from lm.train.resume import differences
from lm.train.run_folder import RunFolder


def trained(folder, value):
    """The checkpoints of two stages of another run, a language model and a reward model."""
    for stage, role in (("sft", "policy"), ("reward", "reward")):
        with Checkpoints(RunFolder(folder).checkpoints(stage)) as checkpoints:
            checkpoints.save(2, {role: {"w": np.full(4, value)}, "opt_state": {"m": np.zeros(4)}}, {})


def experiment(root) -> Experiment:
    asked = (Source("gen:instruct"),)
    return Experiment(
        "reads",
        (
            Stage("distill", Distill(teacher=f"{root}/other:sft"), asked),
            Stage("ppo", PPO(reward_models=(f"{root}/other:reward",)), asked),
            Stage("grpo", GRPO(verifier=f"endpoint:{root}/judge.json"), asked),
            Stage("search", GRPO(environment=f"search:{root}/passages.jsonl"), asked),
        ),
        (Eval("form", asked[0], verifier=f"json_schema:{root}/schema.json"),),
        adapter=f"{root}/adapter",
    )


def rows(file, text):
    file.write_text(json.dumps({"text": text}) + "\n")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("{root}/other:sft", lambda root: trained(root / "again", 2.0)),
        ("{root}/other:reward", lambda root: trained(root / "again", 2.0)),
        ("endpoint:{root}/judge.json", lambda root: (root / "judge.json").write_text('{"most": 5}')),
        ("search:{root}/passages.jsonl", lambda root: rows(root / "passages.jsonl", "another passage")),
        ("{root}/adapter", lambda root: (root / "adapter" / "adapter_model.safetensors").write_text("other weights")),
        (
            "{root}/adapter/adapter_config.json",
            lambda root: (root / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 2}'),
        ),
        ("json_schema:{root}/schema.json", lambda root: (root / "schema.json").write_text('{"type": "array"}')),
    ],
)
def test_another_content_is_a_difference(tmp_path, name, change):
    trained(tmp_path / "other", 1.0)
    (tmp_path / "judge.json").write_text('{"most": 10}')
    (tmp_path / "schema.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("weights")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 1}')
    rows(tmp_path / "passages.jsonl", "a passage")
    then, whole = fingerprints(experiment(tmp_path)), name.format(root=tmp_path)
    assert then == fingerprints(experiment(tmp_path))
    change(tmp_path)
    if (tmp_path / "again").exists():
        (tmp_path / "other").rename(tmp_path / "before")
        (tmp_path / "again").rename(tmp_path / "other")
    now = fingerprints(experiment(tmp_path))
    assert {whole} <= {key for key in then if then[key] != now[key]} <= ({whole} if "other" not in name else {*then})
    assert any(whole in line for line in differences({"data": then}, {"data": now}))


def test_the_optimizer_of_another_run_is_no_part_of_its_model(tmp_path):
    trained(tmp_path, 1.0)
    with Checkpoints(RunFolder(tmp_path).checkpoints("sft")) as checkpoints:
        before = checkpoints.fingerprint("policy", 2)
        checkpoints.finish(2, ["policy"])
        assert not checkpoints.has(2, "opt_state") and checkpoints.fingerprint("policy", None) == before
