"""`lm label`: answers are rows, or sampled from real checkpoints and kept; what cannot be is one line."""

import json
import types
from pathlib import Path

import pytest

from lm.choices.log import open_log
from lm.cli import label
from lm.cli.main import main
from tests.cli.untrained import write_untrained_run
from tests.label.label_rows import questions, write_rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of two stages, whose models have learnt nothing."""
    return write_untrained_run(tmp_path_factory.mktemp("label") / "run", prompts=("Hello?", "Who?"))


@pytest.fixture
def served(monkeypatch) -> list:
    """What would be served, instead of serving it."""
    calls: list = []

    def serve(desk, arguments, token):
        calls.append(types.SimpleNamespace(pairs=list(desk._pairs.values()), path=desk.log.path, token=token))

    monkeypatch.setattr(label, "serve", serve)
    return calls


def refused(capsys, *words: str) -> str:
    assert main(["label", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("lm: error: ") and len(said.splitlines()) == 1, said
    return said


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_answers_of_one_model_differ_by_seed_and_are_kept(trained, served, tmp_path, capsys):
    answers = tmp_path / "new" / "answers.jsonl"
    command = ["label", str(trained), "--max-new-tokens", "12", "--answers-file", str(answers)]
    assert main([*command, "--answers", "3"]) == 0
    sampled = rows(answers)
    assert [row["prompt"] for row in sampled] == ["Hello?", "Who?"]
    assert all(len(set(row["answers"])) == 3 and row["sources"] == ["second"] * 3 for row in sampled)
    assert served[0].path == tmp_path / "new" / "answers.labels.jsonl" and served[0].token is None
    assert len(served[0].pairs) == 6

    before = answers.read_bytes()
    assert main([*command, "--answers", "3"]) == 0 and "kept: the answers in" in capsys.readouterr().out
    assert answers.read_bytes() == before
    said = refused(capsys, *command[1:], "--answers", "3", "--seed", "1")
    assert "was sampled with other settings (seed)" in said and f"lm label {answers}" in said
    assert main([*command[:-1], str(tmp_path / "again.jsonl"), "--answers", "3"]) == 0
    assert rows(tmp_path / "again.jsonl") == sampled, "the same seed gives the same answers"


def test_two_stages_compete_blindly_on_prompts_of_a_file(trained, served, tmp_path):
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Who?"},
    ]
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": talk}, {"question": "Why?"}, {"prompt": "never"}])
    answers = tmp_path / "answers.jsonl"
    command = ["label", str(trained), "--stage", "first", "second", "--prompts", str(prompts), "--limit", "2"]
    assert main([*command, "--answers-file", str(answers), "--max-new-tokens", "8"]) == 0
    assert [row["prompt"] for row in rows(answers)] == [talk, "Why?"]
    assert all(row["sources"] == ["first", "second"] for row in rows(answers))
    assert {(pair.first.source, pair.second.source) for pair in served[0].pairs} == {("first", "second")}


def test_temperatures_are_taken_in_turn_and_compete(trained, served, tmp_path):
    answers = tmp_path / "answers.jsonl"
    options = ("--temperature", "0", "1.5", "--answers", "4", "--max-new-tokens", "8", "--answers-file", str(answers))
    assert main(["label", str(trained), "--against", f"{trained}:first", *options]) == 0
    for row in rows(answers):
        assert row["sources"] == [
            f"{s}, temperature {t}" for s in ("second", "first") for t in ("0", "1.5", "0", "1.5")
        ]
        assert row["answers"][0] == row["answers"][2] and row["answers"][1] != row["answers"][3]


def test_rows_are_taken_as_they_are_and_choices_go_beside_them(served, tmp_path):
    answers = write_rows(tmp_path / "mine.jsonl", questions(3))
    assert main(["label", str(answers)]) == 0
    assert served[0].path == tmp_path / "mine.labels.jsonl" and len(served[0].pairs) == 3


@pytest.mark.parametrize(
    "words, expected",
    [
        (["none.jsonl"], ["none.jsonl"]),
        (["nothing"], ["no run 'nothing'"]),
        (["mine.jsonl", "--prompts", "mine.jsonl"], ["--prompts is for answers that are sampled from a run"]),
        (["mine.jsonl", "--stage", "sft"], ["--stage is for answers that are sampled"]),
        (["mine.jsonl", "--answers-file", "x"], ["--answers-file is for answers that are sampled"]),
        (["mine.jsonl", "--annotators-per-pair", "0"], ["--annotators-per-pair", "from 1 to"]),
        (["mine.jsonl", "--token-file", "none"], ["--token-file none: there is no such file"]),
        (["mine.jsonl", "--token-file", "short"], ["--token-file short must hold 16 or more letters"]),
        (["wrong.jsonl"], ["wrong.jsonl line 2", "prompt and answers", "the columns found are text, id"]),
    ],
)
def test_what_cannot_be_is_one_line(served, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "mine.jsonl", questions(1))
    write_rows(tmp_path / "wrong.jsonl", [*questions(1), {"text": "a", "id": 1}])
    (tmp_path / "short").write_text("secret")
    said = refused(capsys, *words)
    assert all(word in said for word in expected) and not served and not list(tmp_path.glob("*.labels.jsonl"))


def test_a_run_cannot_be_compared_with_nothing(trained, capsys):
    assert "--answers 1 leaves nothing to compare" in refused(capsys, str(trained), "--answers", "1")
    assert "did you mean second?" in refused(capsys, str(trained), "--stage", "secnd")


def test_a_second_server_on_the_same_file_is_refused(served, tmp_path, capsys):
    answers = write_rows(tmp_path / "mine.jsonl", questions(1))
    with open_log(tmp_path / "mine.labels.jsonl"):
        said = refused(capsys, str(answers))
    assert "mine.labels.jsonl is in use by another `lm label`" in said and not served


def test_only_other_machines_are_asked_for_a_token_and_one_is_made(served, tmp_path, capsys):
    answers = write_rows(tmp_path / "mine.jsonl", questions(1))
    (tmp_path / "token").write_text("abcdefgh-01234567\n")
    for options in ([], ["--host", "127.0.0.1"], ["--host", "0.0.0.0"], ["--host", "0.0.0.0"],
                    ["--token-file", str(tmp_path / "token")]):  # fmt: skip
        assert main(["label", str(answers), *options]) == 0
    none, local, made, another, given = (call.token for call in served)
    assert none is None and local is None and given == "abcdefgh-01234567"
    assert len(made) >= 32 and made != another
    assert given not in capsys.readouterr().out
