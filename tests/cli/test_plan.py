"""`lm plan`: what it prints, and its exit codes."""

import json

import pytest

from lm.cli.main import main

EXPERIMENT = "from tests.plan.plan_helpers import experiment as make\nexperiment = make()\n"
KEYS = {
    "fits", "devices", "hbm_bytes_per_device", "update_ms", "rollout_ms", "rollout_tokens_per_s_per_device", "step_ms", "bound_ms", "mfu", "tokens_per_s_per_device", "compile_s", "source",
}  # fmt: skip
HUGE = ["--train.batch_size", "8192", "--model.remat", "none", "--tokenizer.vocab_size", "32768"]


@pytest.fixture
def small(tmp_path) -> list[str]:
    (tmp_path / "small.py").write_text(EXPERIMENT)
    return ["plan", str(tmp_path / "small.py"), "--topology", "v5e:2x2"]


@pytest.mark.slow
def test_json_is_one_object_with_what_others_read(small, capsys):
    assert main([*small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= KEYS
    assert result["source"] == "analytic" and result["devices"] == 4 and result["compile_s"] == 0
    assert result["stages"][0]["stage"] == "train" and result["largest_batch_size"] >= 16


@pytest.mark.slow
def test_the_text_fits_the_terminal(small, capsys):
    assert main([*small, "--search"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("layout") and any(line.startswith("fsdp 4") for line in lines)


@pytest.mark.slow
def test_what_does_not_fit_exits_with_1_and_says_what_would(small, capsys):
    assert main([*small, *HUGE]) == 1
    shown = capsys.readouterr().out
    assert "fits: no" in shown and "changes that make it fit" in shown and "--train.microbatches" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.slow
def test_gpus_are_planned_by_arithmetic_alone(small, capfd):
    words = [*small[:-1], "h100:4"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["devices"] == 4 and found["fits"] and 70e9 < found["hbm_limit_bytes"] < 80e9
    assert main([*words, "--compile"]) == 2
    assert "h100:4 is of GPUs: plan it without" in capfd.readouterr().err


@pytest.mark.slow
def test_without_a_stage_the_one_that_needs_the_most_is_planned(capsys):
    assert main(["plan", "tiny", "--topology", "v5e:2x2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in result["stages"]] == ["pretrain", "sft", "preference", "reason"]
    assert result["hbm_bytes_per_device"] == max(stage["hbm_bytes_per_device"] for stage in result["stages"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--topology", "v5e:3x3"], "there are 1x1, 2x2"),
        (["--stage", "sft"], "has no stage 'sft'; it has train"),
        (["--slices", "0"], "from 1 to"),
        (["--hlo", "x.txt"], "needs --compile"),
        (["--mesh.fsdp", "3"], "3 of the 4 devices"),
        (["--train.batch_size", "6"], "6 rows"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(small, capsys, words, told):
    assert main([*small, *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
