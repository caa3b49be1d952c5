"""The record of a session: complete, appended, and without secrets."""

import json
import subprocess

import jax
import pytest

from lm.stored import read_json
from lm.train.provenance import LONGEST_DIFF, environment, git_state, record_environment, without_secrets
from lm.train.run_folder import RunFolder


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    (folder / "package").mkdir(parents=True)
    git(folder, "init")
    (folder / "package" / "code.py").write_text("x = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "one")
    return folder


def test_it_says_what_ran_where_and_from_what():
    entry = environment({"data.txt": "abc"})
    assert entry["versions"]["jax"] == jax.__version__ and entry["versions"]["orbax-checkpoint"]
    assert entry["devices"] == {
        "platform": "cpu", "kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": 1
    }  # fmt: skip
    assert entry["data_fingerprint"] == {"data.txt": "abc"}
    assert entry["cores"] >= 1 and entry["cpu"] and entry["command"]
    json.dumps(entry, allow_nan=False)


def test_a_resumed_run_adds_a_session(tmp_path):
    folder = RunFolder(tmp_path)
    first, second = {"data.txt": "abc"}, {"data.txt": "xyz"}
    record_environment(folder, first)
    record_environment(folder, second)
    assert [entry["data_fingerprint"] for entry in read_json(folder.environment)["runs"]] == [first, second]


SECRETS = {
    "lm run x.py --hf-token abc --seed 1": "lm run x.py --hf-token *** --seed 1",
    "lm run x.py --wandb.api_key=abc": "lm run x.py --wandb.api_key=***",
    "WANDB_API_KEY=abc SECRET=-x lm run": "WANDB_API_KEY=*** SECRET=*** lm run",
    "lm --Password -abc": "lm --Password ***",
    "lm --auth-token --verbose": "lm --auth-token --verbose",
    "lm run --data https://me:abc@example.org/x": "lm run --data https://***@example.org/x",
    "lm run --sft.max_new_tokens 64 --tokenizer.vocab_size 99": "lm run --sft.max_new_tokens 64 --tokenizer.vocab_size 99",
}


@pytest.mark.parametrize("command", SECRETS)
def test_secrets_of_the_command_line_are_starred_and_nothing_else(command):
    assert " ".join(without_secrets(command.split())) == SECRETS[command]


def test_git_state_of_a_clean_repository(repository):
    state = git_state(repository / "package")
    assert len(state["commit"]) == 40 and state["branch"] == "main"
    assert (state["dirty"], state["diff"], state["untracked"]) == (False, "", [])


def test_uncommitted_changes_staged_or_not_can_be_put_back(repository):
    (repository / "package" / "code.py").write_text("x = 2\n")
    (repository / "package" / "new.py").write_text("y = 1\n")
    (repository / "loose.txt").write_text("z")
    git(repository, "add", "package/new.py")
    state = git_state(repository / "package")
    assert state["dirty"] and state["untracked"] == ["loose.txt"]
    git(repository, "reset", "--hard", state["commit"])
    subprocess.run(["git", "apply"], input=state["diff"] + "\n", text=True, cwd=repository, check=True)
    assert (repository / "package" / "code.py").read_text() == "x = 2\n"
    assert (repository / "package" / "new.py").read_text() == "y = 1\n"


def test_a_repository_without_a_commit_still_gives_its_difference(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", "code.py")
    state = git_state(tmp_path)
    assert state["commit"] is None and "+x = 1" in state["diff"] and state["dirty"]


def test_a_long_difference_is_cut_and_says_so(repository):
    (repository / "package" / "code.py").write_text("x = 1\n" * (LONGEST_DIFF // 4))
    state = git_state(repository)
    assert len(state["diff"]) == LONGEST_DIFF and state["diff_cut"]


def test_no_repository_and_no_git_are_none(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "loose").mkdir()
    assert git_state(tmp_path / "loose") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(repository) is None
