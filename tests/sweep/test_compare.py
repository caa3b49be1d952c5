"""Comparisons of run folders that were written by hand, so that what they should say is known."""

import copy
import json
import math
import shutil
import time

import numpy as np
import pyarrow.parquet
import pytest

from lm.cli.main import main
from lm.experiment import UserError, to_dict
from lm.sweep import table
from lm.sweep.compare import Metric, compare, conclusion
from lm.sweep.explain import importance, scalings, varied
from lm.sweep.results import read_result, read_sweep
from lm.web.compare import render
from tests.sweep.tiny import base

BITS = Metric("text", "bits_per_byte")
PLAIN = json.loads(json.dumps(to_dict(base)))
SESSION = {
    "versions": {"jax": "1"},
    "git": {"commit": "c0ffee" * 6, "dirty": False},
    "devices": {"platform": "cpu", "kind": "cpu", "count": 1},
    "data_fingerprint": {"gen:drills": "abc"},
    "started": "2026-01-01",
}


def written(folder, value, seed=0, session=SESSION, steps=(2, 4, 6), finished=True, **changes):
    """The folder of a run that ended at `value` bits per byte; `changes` by dotted name, __ for a dot."""
    plain = copy.deepcopy(PLAIN) | {"seed": seed}
    for name, new in changes.items():
        where = plain
        *path, last = name.split("__")
        for part in path:
            where = where[int(part)] if part.isdigit() else where[part]
        where[last] = new
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps(plain))
    (folder / "environment.json").write_text(json.dumps({"runs": [session]}))
    for stage in plain["stages"]:
        here = folder / "stages" / stage["name"]
        here.mkdir(parents=True)
        lines = [
            {"step": s, "when": "during", "eval": "text", "metric": "bits_per_byte", "count": 4, "bits_per_byte": 9 - s}
            for s in steps
        ]
        lines.append(lines[-1] | {"when": "after", "bits_per_byte": value})
        (here / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if value is not None))
        (here / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 5 / s}) + "\n" for s in range(1, 7)))
        if finished:
            (here / "summary.json").write_text(
                json.dumps({"steps": 6, "tokens": 100, "num_params": 1000, "seconds": 1})
            )
    return read_result(folder)


def runs(tmp_path, effect, seeds=5, noise=0.01):
    random = np.random.default_rng(0)
    found = []
    for name, shift, norm in (("a", 0.0, True), ("b", effect, False)):
        for seed in range(seeds):
            value = 2 + 0.5 * seed + shift + noise * random.normal()  # seeds differ more than the settings
            found.append(written(tmp_path / f"{name}{seed}", value, seed, model__qk_norm=norm))
    return found


def test_a_difference_is_found_within_each_seed(tmp_path):
    found = compare(runs(tmp_path, effect=-0.1))
    assert [group.label for group in found.groups] == ["qk_norm true", "qk_norm false"]
    assert found.changed == ("model.qk_norm",)
    cell = found.cells["qk_norm false", BITS]
    assert cell.differs and cell.difference.low < -0.1 < cell.difference.high
    assert conclusion(cell, BITS).endswith("better")
    assert cell.final.count == 5 and cell.final.half > 0.5, "over seeds alone it would not have been found"


def test_no_difference_is_said_with_what_could_have_been_seen(tmp_path):
    found = compare(runs(tmp_path, effect=0.0))
    said = conclusion(found.cells["qk_norm false", BITS], BITS)
    assert "no significant difference" in said and "was detectable" in said


def test_one_seed_has_no_interval(tmp_path):
    found = compare(runs(tmp_path, effect=-0.1, seeds=1))
    cell = found.cells["qk_norm false", BITS]
    assert math.isnan(cell.final.half) and math.isnan(cell.corrected) and not cell.differs
    assert "in the one common seed" in conclusion(cell, BITS)
    assert any("one seed each: no interval" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "session", "why"),
    [
        ({"evals__0__source__holdout": 0.2}, SESSION, "source.holdout 0.1 and 0.2"),
        ({"evals__0__count": 8}, SESSION, "count 4 and 8"),
        ({"model__max_len": 128}, SESSION, "model.max_len 64 and 128"),
        ({"model__qk_norm": False}, SESSION | {"data_fingerprint": {"gen:drills": "xyz"}}, "content abc and xyz"),
    ],
)
def test_what_was_measured_on_other_data_is_not_compared(tmp_path, changes, session, why):
    results = [written(tmp_path / f"a{seed}", 2.0 + seed, seed) for seed in range(3)]
    results += [written(tmp_path / f"b{seed}", 1.0 + seed, seed, session, **changes) for seed in range(3)]
    found = compare(results)
    cell = found.cells[found.groups[1].label, BITS]
    assert cell.difference is None and not cell.differs
    assert any(f"since its held-out data differ ({why})" in note for note in found.notes)


def test_a_run_that_has_not_begun_hides_no_comparison_of_the_others(tmp_path):
    results = runs(tmp_path, effect=-0.1, seeds=3)
    (results[0].folder / "environment.json").unlink()
    shutil.rmtree(results[0].folder / "stages")
    found = compare([read_result(result.folder) for result in results])
    assert found.baseline.note == "1 not finished"
    assert found.cells["qk_norm false", BITS].difference.count == 2


def test_the_seeds_of_a_group_that_were_measured_on_other_data_are_left_out_and_counted(tmp_path):
    other = SESSION | {"data_fingerprint": {"gen:drills": "xyz"}}
    results = [written(tmp_path / f"a{seed}", 2.0 + seed, seed) for seed in range(3)]
    results += [
        written(tmp_path / f"b{seed}", 1.0 + seed, seed, other if seed == 2 else SESSION, model__qk_norm=False)
        for seed in range(3)
    ]
    found = compare(results)
    cell = found.cells["qk_norm false", BITS]
    assert cell.difference.count == cell.final.count == cell.best.count == 2
    assert any("1 of 3 runs of qk_norm false are not compared" in note for note in found.notes)


def test_equal_data_in_another_place_are_the_same_data(tmp_path):
    def at(name, path, seed, **changes):
        session = SESSION | {"data_fingerprint": {path: "abc"}}
        return written(tmp_path / f"{name}{seed}", 2.0 + seed, seed, session, evals__0__source__path=path, **changes)

    results = [at("a", "/here/asked.jsonl", seed) for seed in range(2)]
    results += [at("b", "/there/asked.jsonl", seed, model__qk_norm=False) for seed in range(2)]
    found = compare(results)
    assert found.cells[found.groups[1].label, BITS].difference.count == 2


def test_runs_without_evals_are_told_so(tmp_path):
    results = [written(tmp_path / name, 2.0, evals=[], model__qk_norm=name == "a") for name in "ab"]
    found = compare(results)
    assert not found.metrics and any("no evals" in note for note in found.notes)
    render(found)


def test_what_is_missing_or_failed_is_counted_and_not_averaged(tmp_path):
    results = [written(tmp_path / f"a{seed}", 2.0, seed) for seed in range(2)]
    results.append(written(tmp_path / "a2", None, 2))
    failed = written(tmp_path / "a3", 9.0, 3, finished=False)
    object.__setattr__(failed, "failed", "step 3: the loss is not finite")
    found = compare([*results, failed])
    (group,) = found.groups
    assert group.note == "1 failed" and found.cells[group.label, BITS].final.count == 2
    assert any("missing in 1 of 3 runs" in note for note in found.notes)
    with pytest.raises(UserError, match="no run has finished"):
        compare([failed])


def test_a_baseline_is_chosen_by_its_settings(tmp_path):
    results = runs(tmp_path, effect=-0.1)
    assert compare(results, {"model.qk_norm": "false"}).baseline.label == "qk_norm false"
    with pytest.raises(UserError, match="there are"):
        compare(results, {"model.qk_norm": "maybe"})
    with pytest.raises(UserError, match=r"'qk_norm' does not differ between the runs; did you mean model.qk_norm\?"):
        compare(results, {"qk_norm": "false"})
    with pytest.raises(UserError, match="no run has an eval 'txt'; did you mean text"):
        compare(results, only=["txt"])


def test_rows_tell_where_each_number_is_from(tmp_path):
    found = compare(runs(tmp_path, effect=-0.1))
    path = table.write(found, tmp_path / "rows.parquet")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len(rows) == 10
    one = rows[0]
    assert one["commit"] == SESSION["git"]["commit"] and one["versions"] == "jax 1" and one["seed"] == 0
    assert one["folder"] == str(tmp_path / "a0") and one["text.bits_per_byte"] == pytest.approx(2, abs=0.05)
    assert one["data"] and one["experiment"] != rows[-1]["experiment"]
    with pytest.raises(UserError, match=r"\.csv or \.parquet"):
        table.write(found, tmp_path / "rows.xlsx")


def test_a_stage_that_some_runs_lack_is_named_once(tmp_path):
    more = [*copy.deepcopy(PLAIN["stages"]), copy.deepcopy(PLAIN["stages"][-1]) | {"name": "again", "steps": 3}]
    longer = copy.deepcopy(more)
    longer[-1]["steps"] = 5
    of = {"short": PLAIN["stages"], "more": more, "longer": longer}
    found = compare([written(tmp_path / name, 2.0, stages=stages) for name, stages in of.items()])
    assert found.changed == ("again", "again.steps")
    assert [one.settings["again"] for one in found.groups] == ["–", "present", "present"]
    one, other = compare([read_result(tmp_path / name) for name in ("short", "more")]).groups
    assert (one.label, other.label) == ("again –", "again present")
    page = render(found)
    assert '<td>again</td><td class="words">– → present</td>' in page and "again.objective" not in page


def grid(tmp_path, count=8):
    """Settings of which the learning rate matters and the warmup does not."""
    results = []
    for i in range(count):
        rate, warmup = 10.0 ** (i // 2 - 4), i % 2
        settings = {"rate": f"{rate:g}", "warmup": str(warmup)}
        one = written(
            tmp_path / f"r{i}",
            2 + abs(i // 2 - 1) + 0.001 * warmup,
            0,
            model__rope_theta=rate,
            model__norm_eps=float(warmup),
        )
        object.__setattr__(one, "settings", settings)
        results.append(one)
    return results


def test_the_axis_that_matters_is_called_important(tmp_path):
    found = compare(grid(tmp_path))
    assert varied(found) == ["rate", "warmup"]
    shares = importance(found, BITS)
    assert shares["rate"] > shares["warmup"] and sum(shares.values()) == pytest.approx(1)


def test_a_law_is_fitted_where_only_size_or_only_tokens_differ(tmp_path):
    results = []
    for i, size in enumerate((10_000, 100_000, 1_000_000)):
        one = written(tmp_path / f"s{i}", 5 * size**-0.1, 0, model__num_layers=i + 1)
        for file in one.folder.glob("stages/*/summary.json"):
            file.write_text(json.dumps({"steps": 6, "tokens": 100, "num_params": size, "seconds": 1}))
        results.append(one)
    (law,) = scalings(compare(results), BITS)
    assert law.what == "parameters" and law.fit.exponent == pytest.approx(-0.1)


def test_a_page_escapes_what_it_shows(tmp_path):
    results = [written(tmp_path / f"r{i}", 2.0 + i, 0, model__norm_eps=1e-5 * i) for i in range(2)]
    object.__setattr__(results[1], "settings", {"what": "<script>alert(1)</script>"})
    page = render(compare(results))
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.slow
def test_a_thousand_runs_are_compared_within_seconds(tmp_path, capsys):
    for i in range(1000):
        written(tmp_path / f"r{i}", 2 + 0.001 * i, i % 5, model__norm_eps=1e-6 * (1 + i // 5), steps=range(1, 6))
    began = time.monotonic()
    names = [str(tmp_path / f"r{i}") for i in range(1000)]
    assert main(["compare", *names, "--page", str(tmp_path / "page.html")]) == 0
    assert time.monotonic() - began < 60, "it takes four seconds on one quiet core; the limit is for noisy ones"
    assert "200 settings, 1000 runs" in (tmp_path / "page.html").read_text()
    capsys.readouterr()


def test_all_that_lies_in_a_folder_is_compared_again_beside_the_page(tmp_path, capsys):
    """`lm compare runs/*` the second time: the shell then gives the page, too."""
    for i in range(2):
        written(tmp_path / f"r{i}", 2.0, seed=i)
    for _ in range(2):
        names = sorted(map(str, tmp_path.iterdir()))
        assert main(["compare", *names]) == 0, capsys.readouterr().err
    assert [name for name in names if name.endswith("compare.html")]
    assert main(["compare", names[0]]) == 2 and "no run among" in capsys.readouterr().err


def test_folders_that_are_no_runs_are_refused_in_a_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "empty")]) == 2
    assert "is not a run" in capsys.readouterr().err
    with pytest.raises(UserError, match="not the folder of a sweep"):
        read_sweep(tmp_path / "empty")
    written(tmp_path / "one", 2.0)
    assert main(["compare", str(tmp_path / "one"), "--baseline", "norm"]) == 2
    assert "no group or run is called 'norm'; use one of all runs, or NAME=VALUE" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "one"), "--baseline", "norm", "--baseline", "a=b"]) == 2
    assert "should be one name, or several NAME=VALUE" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "one"), "--csv", "rows.txt"]) == 2
    assert "should end in .csv" in capsys.readouterr().err
    assert main(["compare", "nowhere"]) == 2
    assert "sweeps/ here has: nothing" in capsys.readouterr().err


# ---- what is no evidence -------------------------------------------------------------------------------------------


def test_the_same_run_named_twice_by_a_link_or_copied_counts_once(tmp_path, capsys):
    found = runs(tmp_path, effect=-0.1, seeds=3)
    once = compare(found)
    (tmp_path / "link").symlink_to(tmp_path / "a0")
    shutil.copytree(tmp_path / "b1", tmp_path / "copy")
    again = [
        *found,
        found[0],
        read_result(tmp_path / "link"),
        read_result(tmp_path / "a1" / ".." / "b2"),
        read_result(tmp_path / "copy"),
    ]
    twice = compare(again)
    assert {key: cell.final for key, cell in twice.cells.items()} == {
        key: cell.final for key, cell in once.cells.items()
    }
    assert twice.cells["qk_norm false", BITS].best.count == 3
    assert compare([*found, found[0]]).baseline.label == once.baseline.label, "the first stays the first"
    assert "3 runs are named again, and counted once" in twice.notes
    assert any("copy is the same experiment with the same seed as" in note for note in twice.notes)
    assert main(["compare", str(tmp_path / "a0"), f"{tmp_path}/./a0", "--page", str(tmp_path / "p.html")]) == 0
    said = capsys.readouterr().out
    assert "1 run is named again, and counted once" in said and "1 settings, 1 runs" not in said


def test_of_copies_the_one_that_has_finished_counts(tmp_path):
    half = written(tmp_path / "half", 2.0, finished=False)
    (group,) = compare([half, written(tmp_path / "whole", 3.0)]).groups
    assert [result.folder.name for result in group.results] == ["whole"]


@pytest.mark.parametrize(("value", "other"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_where_all_runs_are_equal_no_power_is_claimed(tmp_path, value, other):
    results = [written(tmp_path / f"a{seed}", value, seed) for seed in range(3)]
    results += [written(tmp_path / f"b{seed}", other, seed, model__qk_norm=False) for seed in range(3)]
    found = compare(results)
    cell = found.cells[found.groups[1].label, BITS]
    said = conclusion(cell, BITS)
    assert math.isnan(cell.corrected) and not cell.differs and "detectable" not in said
    if value == other:
        assert said == "all equal to the baseline in 3 seeds: no spread, so no interval and no power"
        assert any("all equal" in note and "has no power" in note for note in found.notes)
    else:
        assert said == "+1.000 in each of 3 seeds: no spread, so no interval and no p-value"
    assert table.number(cell.final).endswith("(all equal)") and importance(found, BITS) == {}
    render(found)


def test_the_baseline_is_explained_and_chosen_by_name(tmp_path, capsys):
    results = runs(tmp_path, effect=-0.1, seeds=2)
    assert table.baseline(compare(results)) == (
        "Baseline: qk_norm true (the first of those named); --baseline NAME chooses another"
    )
    for name in ("qk_norm false", "b1", str(tmp_path / "b0")):
        assert compare(results, name).baseline.label == "qk_norm false"
    with pytest.raises(UserError, match="no group or run is called 'qk_norm fals'; did you mean qk_norm false"):
        compare(results, "qk_norm fals")
    folders = [str(result.folder) for result in results]
    assert main(["compare", *folders, "--baseline", "b0"]) == 0
    said = capsys.readouterr().out
    assert "Baseline: qk_norm false (asked for with --baseline)" in said


def test_the_first_that_has_finished_is_the_baseline(tmp_path):
    failed = written(tmp_path / "a", 9.0, model__qk_norm=False, finished=False)
    object.__setattr__(failed, "failed", "diverged")
    found = compare([failed, written(tmp_path / "b", 2.0)])
    assert found.baseline.label == "qk_norm true" and found.why_baseline == "the first that has finished"
    assert "qk_norm false, seed 0 failed: diverged" in found.notes


def test_runs_with_little_in_common_have_short_labels_and_a_count_of_fields(tmp_path, capsys):
    written(tmp_path / "one", 2.0)
    other = {
        f"model__{name}": value
        for name, value in (("num_layers", 3), ("embed_dim", 8), ("mlp_dim", 9), ("max_len", 99))
    }
    other |= {
        f"stages__{i}__{name}": 7
        for i in range(2)
        for name in ("steps", "batch_size", "seq_len", "save_every", "eval_every")
    }
    written(tmp_path / "two", 3.0, **other)
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert "What differs: 14 fields" in said and "pretrain (" in said and "num_layers" not in said
    assert "Baseline: one (" in said and len(said.splitlines()) < 20
