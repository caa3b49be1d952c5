"""Every claim still works: its small sweeps run, it is judged, and its words and drawings come out."""

import dataclasses
from pathlib import Path

import pytest

from lm.experiment import Mesh
from lm.papers.kept import claims
from lm.papers.paper import load
from lm.papers.reproduce import BEGIN, END, changed, markdown, reproduce, write
from lm.sweep.worker import Worker
from lm.train.stages import run
from lm.web.papers import write_papers

HOME = Path(__file__).parent.parent.parent / "experiments" / "papers"
CLAIMS = sorted(page.stem for page in HOME.glob("*.md"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("papers")


def run_here(worker, claimed, experiment, run_dir, until):
    """Train in this process, since a start of Python and jax takes longer than these stages (tests/sweep starts processes)."""
    run(dataclasses.replace(experiment, mesh=Mesh(data=1)), run_dir, until=until)
    return 0, False


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_runs_is_judged_and_told(name, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Worker, "_process", run_here)
    file = str(HOME / f"{name}.py")
    outcome = reproduce(file, load(file), place / name, quick=True)
    assert "**Verdict: " in markdown(outcome)
    page = place / f"{outcome.name.rsplit('/', 1)[-1].removesuffix('.py')}.md"
    assert outcome.provenance["versions"]["jax"] and not page.exists()


def test_the_kept_results_are_drawn_into_one_page(tmp_path):
    page = write_papers(HOME, tmp_path / "papers.html").read_text()
    kept = [claim for claim in claims(HOME) if claim.result]
    assert len(kept) >= 10 and all(claim.title in page or claim.title.replace("'", "&#39;") in page for claim in kept)


@pytest.mark.parametrize(
    ("diff", "untracked", "expected"),
    [
        ("", [], False),
        ("diff --git a/experiments/papers/muon.md b/experiments/papers/muon.md\n+**Verdict", [], False),
        ("", ["experiments/papers/results/muon.json"], False),
        ("diff --git a/experiments/papers/muon.py b/experiments/papers/muon.py\n+lr", [], True),
        ("", ["experiments/papers/mine.py"], True),
    ],
)
def test_what_an_earlier_claim_wrote_is_no_change_of_the_code(diff, untracked, expected):
    git = {"commit": "1" * 40, "dirty": bool(diff or untracked), "diff": diff, "untracked": untracked}
    assert changed(git | {"diff_cut": False}) is expected
    assert changed(git | {"dirty": True, "diff_cut": True})


def test_a_verdict_is_written_between_its_marks(tmp_path):

    file = str(HOME / "kl_estimators.py")
    outcome = dataclasses.replace(reproduce(file, load(file), tmp_path / "kl"), name="kl")
    (tmp_path / "kl.md").write_text(f"# KL\n\n{BEGIN}\nnot run yet\n{END}\nafter\n")
    data, page = write(outcome, tmp_path)
    text = page.read_text()
    assert data.is_file() and "not run yet" not in text and "**Verdict: holds.**" in text and text.endswith("after\n")
