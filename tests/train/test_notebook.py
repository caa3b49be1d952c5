"""In a notebook progress is one line that is written over, and lines that are said stay below it."""

import sys
from types import SimpleNamespace

import pytest

from lm.data.workers import BuildProgress
from lm.train.metrics import Progress

CELL = """
from lm.train.metrics import Progress
progress = Progress("sft", total=3000)
for step in range(1, 3001):
    progress.update(step, {"loss": 1 / step}, 100)
    if step == 1500:
        progress.say("sft: a warning")
progress.close()
"""


@pytest.fixture
def shown(monkeypatch):
    """What a kernel displays: a list of outputs, each the list of its texts."""
    outputs = []

    def display(content, raw, display_id):
        assert raw and display_id
        texts = [content["text/plain"]]
        outputs.append(texts)
        return SimpleNamespace(update=lambda content, raw: texts.append(content["text/plain"]))

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return outputs


def test_thousands_of_steps_are_one_output_that_ends_with_the_last(shown, capsys):
    exec(CELL)
    (texts,) = shown
    assert len(texts) < 20 and texts[-1].startswith("sft  step 3000/3000  loss 0.0003333  ")
    assert capsys.readouterr().out == "sft: a warning\n"


def test_an_activity_between_steps_is_in_the_same_line(shown, monkeypatch):
    monkeypatch.setattr("lm.notebook.EVERY_SECONDS", 0.0)
    progress = Progress("sft", total=4)
    progress.show_activity("compiling")
    progress.update(1, {"loss": 1.0}, 100)
    assert [text.split("  ")[1] for text in shown[0]] == ["compiling", "step 1/4"] and len(shown) == 1


def test_the_build_of_data_is_one_output_too(shown, monkeypatch, capsys):
    progress = BuildProgress("sft", "tokens", 1000, 1)
    progress._printed -= 1
    progress.advance(500, 60)
    assert shown[0][0].startswith("sft  50%  60 tokens") and capsys.readouterr().err == ""


def test_without_a_kernel_lines_are_printed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    exec(CELL)
    assert capsys.readouterr().out.count("sft  step ") == 2


def test_a_notebook_has_one_output_for_progress():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert [one["output_type"] for one in outputs] == ["display_data", "stream"]
    assert outputs[0]["data"]["text/plain"].startswith("sft  step 3000/3000")
