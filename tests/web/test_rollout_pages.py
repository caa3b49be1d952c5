"""Pages of rollouts: every trajectory of every step that is kept, on pages of bounded size, and nothing but text."""

import itertools
import re

import pytest
from rollout_files import HOSTILE, write_trajectories
from run_folder import write_run

from lm.cli.main import main
from lm.experiment import UserError
from lm.train.trajectory_files import FOLDER, KEPT, trajectory_files
from lm.web import rollout_pages
from lm.web.report import write_report


def pages(folder):
    return {path.name: path.read_text("utf-8") for path in sorted((folder / "rollouts" / "reason").iterdir())}


def shown(folder):
    return sorted(set(re.findall(r"step (\d+), answer (\d)", "".join(pages(folder).values()))))


@pytest.fixture
def folder(tmp_path):
    made = write_run(tmp_path / "run")
    write_trajectories(made / "stages" / "reason", 9)
    return made


def test_the_report_links_to_pages_with_every_trajectory(folder, monkeypatch):
    monkeypatch.setattr(rollout_pages, "PAGE_CHARACTERS", 2000)
    report = write_report(folder).read_text("utf-8")
    found = pages(folder)
    assert re.findall(r'href="rollouts/reason/(\d+\.html)"', report) == list(found) and len(found) > 2
    assert shown(folder) == [(str(step), str(number)) for step in range(1, 10) for number in range(4)]
    assert all(len(page) < 40_000 for page in found.values())
    assert "near 0.500" in found["0001.html"] and "not trained on" in found["0001.html"]


def test_steps_beyond_the_limit_are_left_out_evenly_unless_they_are_asked_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(rollout_pages, "STAGE_CHARACTERS", 3000)
    report = write_report(folder).read_text("utf-8")
    steps = sorted({int(step) for step, _ in shown(folder)})
    assert 1 < len(steps) < 9 and steps[-1] == 9 and len({b - a for a, b in itertools.pairwise(steps)}) == 1
    assert "Evenly spread over the 9 steps" in report
    assert main(["report", str(folder), "--rollouts", "3-5"]) == 0
    assert sorted({int(step) for step, _ in shown(folder)}) == [3, 4, 5]
    for wrong in ("0", "5-3", "x", "1-", "-1", "3-y", "90-91"):
        capsys.readouterr()
        assert main(["report", str(folder), f"--rollouts={wrong}"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_was_sampled_is_text_and_no_markup(folder):
    write_trajectories(folder / "stages" / "reason", 1, HOSTILE)
    write_report(folder)
    page = "".join(pages(folder).values())
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;␛[31m" in page


def test_a_damaged_file_is_told(folder):
    trajectory_files(folder / "stages" / "reason")[0].write_bytes(b"PAR1")
    with pytest.raises(UserError, match="damaged"):
        write_report(folder)


def test_no_pages_are_left_of_another_choice(folder):
    write_report(folder)
    half = folder / "rollouts" / "reason" / "0007.html.tmp"
    half.write_text("half")
    write_report(folder, range(1, 2))
    assert {int(step) for step, _ in shown(folder)} == {1} and not half.exists()


def test_a_step_whose_file_is_gone_from_the_middle_is_told(folder):
    assert "Trajectory files are missing" not in write_report(folder).read_text("utf-8")
    for path in trajectory_files(folder / "stages" / "reason")[3:5]:
        path.unlink()
    with pytest.raises(UserError, match="has 7 of the 9 trajectory files that the stage kept"):
        write_report(folder)
    (folder / "stages" / "reason" / FOLDER / KEPT).unlink()  # as a run of an older lm has none
    told = "Trajectory files are missing: of 2 steps between those kept, the first of them step 4."
    assert told in write_report(folder).read_text("utf-8")
