"""`lm runs`: states, sizes, and what is removed."""

import json
import shutil

import pytest

from lm.cli.main import main
from lm.train.run_folder import RunFolder
from lm.train.stages import run
from tests.train.runs import experiment, write_questions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_questions(root)
    run(experiment(root, keep_last=3, save_every=1), root / "whole")
    return root


@pytest.fixture
def place(made, tmp_path):
    """A finished run `whole`, and `part`, whose last stage has not ended."""
    for name in ("whole", "part"):
        shutil.copytree(made / "whole", tmp_path / name)
    (tmp_path / "part" / "stages" / "sft" / "summary.json").unlink()
    RunFolder(tmp_path / "part").record_finished()
    return tmp_path


def steps(run_dir):
    return sorted(int(path.name) for path in (run_dir / "stages" / "sft" / "checkpoints").glob("[0-9]*"))


def test_runs_are_listed_with_state_and_size(place, capsys):
    assert main(["runs", str(place), "--json"]) == 0
    found = {one["folder"].rsplit("/", 1)[-1]: one for one in json.loads(capsys.readouterr().out)}
    assert found["whole"]["state"] == "finished" and found["part"]["state"] == "sft 4 of 4"
    assert found["whole"]["metrics"].startswith("loss ")
    for one in found.values():
        assert 0 < one["checkpoints"] < one["size"]
    assert main(["runs", str(place)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1].startswith("2 runs, ")


def test_a_run_in_use_says_so_and_is_not_removed(place, capsys):
    with RunFolder(place / "whole").lock():
        assert main(["runs", str(place), "--json"]) == 0
        assert "running: finished" in capsys.readouterr().out
        assert main(["runs", "rm", str(place / "whole"), "--yes"]) == 2
    assert "is in use by a process" in capsys.readouterr().err and (place / "whole").is_dir()


def test_older_checkpoints_go_and_the_run_goes_on(made, place):
    before = steps(place / "part")
    assert len(before) == 3
    for name in ("whole", "part"):
        assert main(["runs", "rm", str(place / name), "--checkpoints", "--yes"]) == 0
    assert steps(place / "part") == before[-2:] and steps(place / "whole") == before[-1:]
    run(experiment(made, keep_last=3, save_every=1), place / "part")
    assert (place / "part" / "stages" / "sft" / "summary.json").is_file()
    assert main(["sample", str(place / "whole"), "--prompt", "x", "--max-new-tokens", "2"]) == 0


def test_a_run_is_removed_whole_but_not_without_a_yes(place, capsys):
    assert main(["runs", "rm", str(place / "part")]) == 2
    assert "say --yes" in capsys.readouterr().err and (place / "part").is_dir()
    assert main(["runs", "rm", str(place / "part"), "--yes"]) == 0
    assert not (place / "part").exists() and not list(place.glob(".part*")) and (place / "whole").is_dir()


def test_a_run_that_another_reads_is_named(place, capsys):
    file = place / "part" / "experiment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher": f"{place / 'whole'}:sft"}))
    shutil.copytree(place / "part", place / "bare")
    (place / "bare" / "experiment.json").unlink()
    main(["runs", "rm", str(place / "whole")])
    assert capsys.readouterr().out.count("its models are named in") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["a", "b"], "lists one folder"),
        (["rm"], "name the runs to remove"),
        (["rm", "nowhere"], "no run 'nowhere'"),
        (["--yes"], "are for lm runs rm"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
