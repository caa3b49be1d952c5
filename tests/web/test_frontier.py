"""Gold reward against KL over seeds: the numbers against numpy, what may be pooled, and the page and its drawing."""

import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_folder import BEST_OF, write_json, write_lines, write_watched_run

from lm.cli.main import main
from lm.experiment import UserError
from lm.sweep.statistics import estimate
from lm.train.run_files import read_run
from lm.web import frontier, frontier_charts

T_975 = {1: 12.706205, 2: 4.302653, 9: 2.262157}  # quantiles of Student's t by degrees of freedom, from printed tables


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_watched_run(folder / f"seed-{seed}", seed) for seed in range(3)]


def evals(folder: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "stages" / stage / "eval.jsonl").read_text("utf-8").splitlines()]


def curves(folders: list[Path]) -> dict[str, frontier.FrontierCurve]:
    (panel,) = frontier.frontier([read_run(folder) for folder in folders])
    assert (panel.verifier, panel.path) == ("style", "gen:preferences")
    return {curve.name: curve for curve in panel.curves}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_an_interval_is_students_t(count):
    values = np.random.default_rng(count).normal(size=count)
    found = estimate(values.tolist())
    assert found.mean == pytest.approx(values.mean())
    assert found.half == pytest.approx(values.std(ddof=1) / math.sqrt(count) * T_975[count - 1], rel=1e-6)
    assert found.count == count


def test_one_seed_has_a_mean_and_no_interval():
    found = estimate([0.5])
    assert (
        found.mean == 0.5 and math.isnan(found.half) and frontier_charts.told(found) == "50.0\N{NARROW NO-BREAK SPACE}%"
    )


def test_points_are_means_over_seeds_of_each_measured_step(seeds):
    found = curves(seeds)
    assert list(found) == ["ppo", "dpo", "best of n by reward"]
    assert [point.label for point in found["ppo"].points] == [f"step {step}" for step in range(0, 201, 20)]
    for key in ("kl", "reward", "score"):
        lines = [[line[key] for line in evals(run, "ppo") if line["eval"] == "manners"] for run in seeds]
        means = [getattr(point, key).mean for point in found["ppo"].points]
        halves = [getattr(point, key).half for point in found["ppo"].points]
        np.testing.assert_allclose(means, np.mean(lines, 0))
        np.testing.assert_allclose(halves, np.std(lines, 0, ddof=1) / math.sqrt(3) * T_975[2], rtol=1e-6)


def test_best_of_n_stands_at_its_bound(seeds):
    curve = curves(seeds)["best of n by reward"]
    assert [point.label for point in curve.points] == [f"n = {n}" for n in BEST_OF]
    assert [point.kl.mean for point in curve.points] == pytest.approx([math.log(n) - (n - 1) / n for n in BEST_OF])
    assert not curve.joined and all(math.isnan(point.kl.half) for point in curve.points)


def test_the_peak_and_the_fall_after_it_are_of_the_mean_and_within_seeds(seeds):
    curve = curves(seeds)["ppo"]
    rewards = np.array([[line["reward"] for line in evals(run, "ppo") if line["eval"] == "manners"] for run in seeds])
    assert curve.peak == rewards.mean(0).argmax()
    falls = rewards[:, curve.peak] - rewards[:, -1]
    assert curve.below_peak(-1).mean == pytest.approx(falls.mean())
    assert curve.below_peak(-1).half == pytest.approx(falls.std(ddof=1) / math.sqrt(3) * T_975[2], rel=1e-6)
    told = frontier.ending(curve)
    assert f"highest at step {20 * curve.peak}," in told and f"falls by {100 * falls.mean():.1f} ±" in told
    rises = rewards[:, curve.peak] - rewards[:, 0]
    assert (f"{100 * rises.mean():.1f} ±" in told) == bool(curve.peak)
    assert "its last point" in frontier.ending(curves(seeds)["dpo"])


def test_a_step_that_one_seed_has_not_reached_is_of_the_others(seeds, tmp_path):
    folders = [seeds[0], Path(shutil.copytree(seeds[1], tmp_path / "short"))]
    kept = [line for line in evals(folders[1], "ppo") if line["step"] <= 100]
    write_lines(folders[1] / "stages" / "ppo" / "eval.jsonl", kept)
    points = curves(folders)["ppo"].points
    assert [point.reward.count for point in points] == [2] * 6 + [1] * 5
    assert math.isnan(points[-1].reward.half)


def test_the_command_writes_one_page_that_fetches_nothing_and_a_png(seeds, tmp_path, capsys):
    out = tmp_path / "new" / "gold.html"
    assert main(["report", *map(str, seeds), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    page = out.read_text("utf-8")
    assert not re.search(r"<(script|link|img|iframe)|https?://(?!www\.w3\.org)|@import", page)
    assert page.count("<svg") == 1 and 'class="peak"' in page and "seeds 0, 1, 2" in page
    assert all(f">{n}<" in page for n in BEST_OF[1:]) and ">n = 1<" in page
    html.parser.HTMLParser().feed(page)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["gold.html", "gold.png"]


def test_the_page_stands_beside_the_runs_where_no_place_is_named(seeds, capsys):
    assert main(["report", *map(str, seeds)]) == 0
    assert (seeds[0].parent / "frontier.html").is_file() and (seeds[0].parent / "frontier.png").is_file()
    assert not list(seeds[0].parent.glob("*.tmp"))


def changed(folder: Path, to: Path, **values) -> Path:
    shutil.copytree(folder, to)
    plan = json.loads((to / "experiment.json").read_text("utf-8"))
    write_json(to / "experiment.json", plan | values)
    return to


def test_seeds_that_were_measured_on_other_data_are_not_pooled(seeds, tmp_path):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in seeds[:2]]
    for folder, content in zip(folders, ("ab" * 32, "cd" * 32), strict=True):
        file = folder / "environment.json"
        recorded = json.loads(file.read_text("utf-8"))
        recorded["runs"][-1]["data_fingerprint"]["gen:preferences"] = content
        write_json(file, recorded)
    with pytest.raises(UserError, match=r"measured .* on other data: its source had SHA-256 abab.* and cdcd"):
        frontier.write_frontier(folders, tmp_path / "page.html")


def test_only_seeds_of_one_experiment_are_pooled(seeds, tmp_path):
    other = changed(seeds[1], tmp_path / "other", prompts=["Another one?"])
    with pytest.raises(UserError, match=r"not seeds of one experiment: prompts is \['What is an LLM\?'\] and"):
        frontier.write_frontier([seeds[0], other], tmp_path / "page.html")
    with pytest.raises(UserError, match="both have seed 0"):
        frontier.write_frontier([seeds[0], seeds[0]], tmp_path / "page.html")
    mesh = changed(seeds[1], tmp_path / "mesh", mesh={"data": 8})
    runs = [read_run(seeds[0]), read_run(mesh)]
    frontier.check_seeds(runs)
    assert all(name.startswith("mesh") for name in frontier.differences(runs))


def test_runs_without_kl_are_refused_in_one_line(tmp_path):
    old = [write_watched_run(tmp_path / str(seed), seed, without=("kl",)) for seed in (0, 1)]
    with pytest.raises(UserError, match="no held-out reward with its KL"):
        frontier.write_frontier(old, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("missing", ["score", "kl_bound", "best_of", "reward_stderr"])
def test_a_missing_key_leaves_out_its_part(tmp_path, missing):
    runs = [write_watched_run(tmp_path / str(seed), seed, without=(missing,)) for seed in (0, 1)]
    page, _ = frontier.write_frontier(runs, tmp_path / "page.html")
    assert ("best of n by" in page.read_text("utf-8")) == (missing not in ("kl_bound", "best_of"))
    assert all(point.score is None for point in curves(runs)["ppo"].points) == (missing == "score")


def test_out_belongs_to_several_runs(seeds, capsys):
    assert main(["report", str(seeds[0]), "--out", "page.html"]) == 2
    assert "--out is for the page over several runs" in capsys.readouterr().err
    assert main(["report", *map(str, seeds), "--out", "page.pdf"]) == 2
    assert "should end in .html" in capsys.readouterr().err


@pytest.mark.parametrize("high", [0.0, 0.3, 1.4, 6.0, 40.0])
def test_ticks_of_the_kl_axis_ascend_from_zero(high):
    ticks = frontier_charts.ticks_of(high)
    assert ticks[0] == 0 and ticks == sorted(set(ticks))
    assert len(ticks) >= (4 if high else 1) and ticks[-1] <= 1.5 * high**2 + 1e-9
