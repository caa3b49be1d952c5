"""Watching the policy against its judge: what the report shows of it, and when it warns."""

import html
import json
import math
import re
from pathlib import Path

import pytest
from run_folder import DONE, WATCHED, write_lines, write_run, write_watched_run

from lm.cli.main import main
from lm.train.run_files import read_run
from lm.web import charts, watch
from lm.web.report import render, write_report


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    return write_watched_run(tmp_path_factory.mktemp("runs") / "watched")


def judged(*steps: tuple[int, float, float], reward_stderr: float = 0.02, score_stderr: float = 0.1) -> list[dict]:
    return [
        {"step": step, "reward": reward, "score": score, "reward_stderr": reward_stderr, "score_stderr": score_stderr}
        for step, reward, score in steps
    ]


def edit(path: Path, change) -> None:
    write_lines(path, [change(json.loads(line)) for line in path.read_text("utf-8").splitlines()])


# ---- the warning -------------------------------------------------------------------------------------------------


def test_the_warning_compares_the_judges_best_step_with_the_last():
    told = watch.over_optimisation(judged((0, 0.5, -1.0), (40, 0.71, 1.2), (80, 0.6, 2.9), (120, 0.55, 3.4)))
    assert told.startswith("From step 40 to step 120 the reward model's score rises from 1.20 to 3.40")
    assert "(standard error of the difference 0.14)" in told and "(2.8 points)" in told
    assert "falls from 71.0\N{NARROW NO-BREAK SPACE}% to 55.0\N{NARROW NO-BREAK SPACE}%" in told
    assert told.endswith("The checkpoint of step 40 is the better one.")


@pytest.mark.parametrize(
    "lines",
    [
        [],
        judged((0, 0.5, 0.0)),
        judged((0, 0.5, 0.0), (10, 0.6, 1.0)),  # both rise
        judged((0, 0.6, 1.0), (10, 0.5, 0.0)),  # both fall
        judged((0, 0.55, 0.0), (10, 0.50, 1.0)),  # 5 points, where twice the standard error is 5.7
        judged((0, 0.60, 0.0), (10, 0.50, 0.25)),  # 0.25, where twice the standard error is 0.28
        judged((0, 0.6, 0.0), (10, math.nan, 1.0)),
        [{"step": 0, "reward": 0.6}, {"step": 10, "reward": 0.1, "score": 9.0}],  # nothing is known of the noise
    ],
)
def test_there_is_no_warning_within_noise_or_where_a_number_is_missing(lines):
    assert watch.over_optimisation(lines) is None


def test_the_warning_grows_silent_with_the_noise_of_the_measurement():
    steps = ((0, 0.6, 0.0), (10, 0.5, 1.0))
    assert watch.over_optimisation(judged(*steps, reward_stderr=0.035))
    assert watch.over_optimisation(judged(*steps, reward_stderr=0.036)) is None  # 2 √2 0.0354 is 0.1
    assert watch.over_optimisation(judged(*steps, score_stderr=0.36)) is None


def test_the_advice_names_a_checkpoint_only_where_there_is_one():
    steps = judged((0, 0.5, -1.0), (40, 0.7, 1.0), (80, 0.5, 3.0))
    assert watch.over_optimisation(steps, [40, 80]).endswith("The checkpoint of step 40 is the better one.")
    assert "train again for 40 steps" in watch.over_optimisation(steps, [60, 80])
    assert "The model that entered the stage" in watch.over_optimisation(judged((0, 0.7, 0.0), (80, 0.5, 3.0)), [80])


def test_the_report_and_the_terminal_both_warn(watched, capsys):
    found = watch.warnings(read_run(watched))
    assert [stage for stage, _ in found] == ["ppo"]
    assert main(["report", str(watched)]) == 0
    assert f"watched, ppo: {found[0][1]}\n" in capsys.readouterr().out
    page = (watched / "report.html").read_text("utf-8")
    assert page.count('class="notice warning"') == 1 and "In stage ppo the reward model's score rises" in page


def test_a_kept_checkpoint_is_found(tmp_path):
    folder = write_watched_run(tmp_path / "run")
    for step in range(20, 201, 20):
        saved = folder / "stages" / "ppo" / "checkpoints" / f"{step:08d}"
        saved.mkdir(parents=True)
        if step != 200:
            (saved / "manifest.json").write_text("{}")
    run = read_run(folder)
    assert run.stages[2].checkpoints == tuple(range(20, 200, 20))
    assert re.search(r"The checkpoint of step \d+ is the better one", watch.warnings(run)[0][1])


# ---- the section -------------------------------------------------------------------------------------------------


def test_each_stage_with_kl_at_two_steps_is_watched(watched):
    found = watch.watches(read_run(watched))
    assert [(one.stage, one.kind, one.eval, one.verifier) for one in found] == [
        ("ppo", "PPO", "manners", "style"),
        ("dpo", "DPO", "manners", "style"),
    ]
    assert [chart.title for chart in found[0].charts] == ["Judge's reward over KL", "Reward model and judge"]
    titles = [
        "Answer length, tokens",
        "Entropy, nats per token",
        "Distinct bigrams",
        "Answers that ended",
        "curriculum, mean reward",
    ]
    assert [chart.title for chart in found[0].small] == titles
    assert "Held-out reward and KL" in render(read_run(watched))


def test_the_first_the_best_and_the_last_step_are_written_at_their_points(watched):
    run = read_run(watched)
    lines = watch.reward_evals(run.stages[2])["manners"]
    best = max(lines, key=lambda line: line["reward"])["step"]
    svg = watch.watches(run)[0].charts[0].svg
    assert best not in (0, WATCHED["ppo"])
    assert re.findall(r">step ([\d,]+)<", svg) == ["0", str(best), str(WATCHED["ppo"])]


@pytest.mark.slow
def test_a_run_without_kl_has_no_such_section(tmp_path):
    for folder in (
        write_run(tmp_path / "plain"),
        write_watched_run(tmp_path / "old", without=("kl",)),
        write_run(tmp_path / "begun", {}),
    ):
        page = render(read_run(folder))
        assert "Held-out reward and KL" not in page and "#judge" not in page
        assert watch.watches(read_run(folder)) == []


@pytest.mark.parametrize(
    "missing", ["score", "score_stderr", "reward_stderr", "kl_stderr", "entropy", "distinct_2", "length"]
)
def test_a_missing_key_leaves_out_its_part_and_no_more(tmp_path, missing):
    run = read_run(write_watched_run(tmp_path / "run", without=(missing,)))
    first = watch.watches(run)[0]
    assert render(run)
    assert ("Reward model and judge" in [chart.title for chart in first.charts]) == (missing != "score")
    assert len(first.small) == (4 if missing in ("entropy", "distinct_2", "length") else 5)
    assert (first.warning is None) == (missing in ("score", "score_stderr", "reward_stderr"))
    assert all(side.score is None for pair in first.answers for side in pair.sides) == (missing == "score")


def test_a_stage_that_is_under_way_is_watched_up_to_where_it_is(tmp_path):
    folder = write_watched_run(tmp_path / "run")
    path = folder / "stages" / "ppo" / "eval.jsonl"
    kept = [line for line in map(json.loads, path.read_text("utf-8").splitlines()) if line["step"] <= 40]
    write_lines(path, kept)
    (folder / "stages" / "ppo" / "summary.json").unlink()
    first = watch.watches(read_run(folder))[0]
    assert first.stage == "ppo" and first.warning is None


def test_answers_are_those_to_the_same_prompts_before_and_after(watched):
    answers = watch.watches(read_run(watched))[0].answers
    assert [pair.prompt for pair in answers] == [f"What is the capital of country {n}?" for n in range(6)]
    assert [(side.when, side.reward) for side in answers[0].sides] == [("before", 0.75), ("after, step 200", 0.25)]
    page = write_report(watched).read_text("utf-8")
    assert "reward model <b>−1.00</b>" in page and "judge <b>0.250</b>" in page


def test_markup_in_answers_is_shown_and_not_obeyed(tmp_path):
    folder = write_watched_run(tmp_path / "run")
    hostile = "<script>alert(1)</script>\x1b[31m"
    edit(folder / "stages" / "ppo" / "samples.jsonl", lambda line: line | {"answer": hostile, "expected": hostile})
    page = render(read_run(folder))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;␛[31m") >= 12


@pytest.mark.parametrize("name", ['"><b>bold</b>', "a & <i>b</i>", r"back\d\1"])
def test_an_evals_name_is_text_in_the_description_of_its_chart_too(tmp_path, name):
    folder = write_watched_run(tmp_path / "run")
    for path in folder.rglob("*.json*"):
        path.write_text(path.read_text("utf-8").replace('"curriculum"', json.dumps(name)), "utf-8")
    page = render(read_run(folder))
    assert f'aria-label="{html.escape(name)}, mean reward over steps"' in page
    assert "<b>bold" not in page and "<i>b" not in page


# ---- curves of the new stages ------------------------------------------------------------------------------------


def test_ppo_and_reward_models_have_curves_of_their_own_in_their_own_units(watched):
    stages = {stage.name: charts.stage_charts(stage) for stage in read_run(watched).stages}
    main_titles = [chart.title for chart in stages["ppo"] if not chart.small]
    assert main_titles == ["Reward", "Judge", "KL to the start", "Completion length", "Entropy", "Held out"]
    reward, judge = stages["ppo"][:2]
    assert [label.split(",")[0] for _, label, _ in reward.legend] == ["score", "minus KL penalty"]
    assert not any("%" in value for _, _, value in reward.legend) and judge.legend[0][2].endswith("%")
    assert {"Value loss", "Explained variance", "KL coefficient"} <= {c.title for c in stages["ppo"] if c.small}
    assert [c.title for c in stages["reward"] if not c.small] == [
        "Loss",
        "Preference accuracy",
        "Score",
        "Reward margin",
    ]


def test_rewards_outside_0_to_1_are_no_percentages(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "stages" / list(DONE)[-1] / "metrics.jsonl"
    edit(path, lambda line: line | {"reward": 3.25})
    assert charts.stage_charts(read_run(folder).stages[-1])[0].legend[0][2] == "3.250"
