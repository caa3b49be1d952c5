"""`lm playground`: several models on the same tasks, judged by code that runs, in a table and on a page."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.cli.main import main
from lm.evals.answers import chances_of_full_reward
from lm.train.loaded_run import load_run
from tests.cli.untrained import write_untrained_run

JUDGE = """
def score(row, completion):
    return float(len(completion) % 2 == row["parity"])

score.columns = ("parity",)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of two stages, whose models have learnt nothing."""
    return write_untrained_run(tmp_path_factory.mktemp("play") / "run")


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(JUDGE)
    rows = [{"prompt": f"Say {word}.", "parity": number % 2} for number, word in enumerate(("a", "b", "c", "d", "e"))]
    rows.append({"prompt": "too long " * 100, "parity": 0})
    Path("tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path("tasks.jsonl")


@pytest.mark.slow
def test_rates_cost_and_answers_of_each_model(run, tasks, capsys):
    models = [f"{run}:first", f"{run}:second"]
    asked = ["--verifier", "judge.py:score", "--answers", "4", "--temperature", "1", "--max-new-tokens", "8"]
    assert main(["playground", str(tasks), *models, *asked, "--json", "--page", "play.html"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["tasks"] == 5 and [one["name"] for one in found["models"]] == ["run:first", "run:second"]
    assert "skipped: 1 longer than" in said.err
    page = Path("play.html").read_text()
    for one in found["models"]:
        assert set(one["rates"]) == {"1", "2", "4"}
        passed = [rate for rate, _ in one["rates"].values()]
        assert passed == sorted(passed) and 0 <= passed[0] <= passed[-1] <= 1
        assert one["parameters"] == sum(x.size for x in jax.tree.leaves(load_run(run, "first").model))
        assert one["tokens_per_s"] > 0 and one["flops"] > 0 and 0 < one["length"] <= 8
        assert f">{one['flops'] / 1e9:.2g}<" in page  # a small model's are not shown as 0.0
    assert page.count(">passed") + page.count(">failed") == 2 * 5 * 4
    rate = sum(found["models"][model]["rates"]["1"][0] for model in (0, 1)) / 2
    assert page.count(">passed") == pytest.approx(rate * 40)
    assert main(["playground", str(tasks), models[0], *asked]) == 0
    assert "5 tasks of tasks.jsonl, judged by judge.py:score" in (text := capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= 80


def test_the_chance_of_a_pass_is_that_over_all_choices():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.5]])
    assert chances_of_full_reward(rewards, 1) == [0.5, 0.0]
    assert chances_of_full_reward(rewards, 2) == pytest.approx([5 / 6, 0.0])


@pytest.mark.parametrize("words, said", [
    (["{tasks}", "{run}:first", "{run}:first"], "names a model twice"),
    (["{tasks}", "{run}:third"], "has no stage 'third'; it has first, second"),
    (["{tasks}", "{run}", "--answers", "2"], "--answers is 2 and --temperature 0"),
    (["{tasks}", "{run}"], "needs the column tests"),
    (["{tasks}", "{run}", "--verifier", "python_test"], "error: --verifier is 'python_test'"),
    (["missing.jsonl", "{run}"], "missing.jsonl"),
    (["{tasks}", "{run}", "--verifier", "judge.py:score", "--max-new-tokens", "4096"], "none of the held-out prompts can be measured"),
])  # fmt: skip
def test_bad_input_is_one_line(run, tasks, capsys, words, said):
    assert main(["playground", *(word.format(run=run, tasks=tasks) for word in words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("lm: error: ") and said in error[-1] and "evals." not in error[-1], error
