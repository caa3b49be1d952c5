"""What the commands do around the heavy functions, which stand-ins replace here; the smoke test runs the real ones."""

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lm.cli import eval as eval_command
from lm.cli.main import main
from lm.experiment import Experiment, Pretrain, Source, Stage, UserError, to_dict

PLAN = Experiment(
    name="small",
    stages=tuple(
        Stage(name=name, objective=Pretrain(), sources=(Source(path="text.txt"),)) for name in ("pretrain", "sft")
    ),
    prompts=("What is an LLM?",),
)


@dataclass
class Answer:
    text: str
    eos: bool


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """runs/small in the working folder, with a checkpoint of its first stage only."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / "small"
    (folder / "stages" / "pretrain" / "checkpoints" / "100").mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps(to_dict(PLAN)), "utf-8")
    return folder


@pytest.fixture
def asked(monkeypatch) -> list:
    """Stand-ins for what loads a model and samples from it; gives the calls that they got."""
    calls: list = []
    loaded = types.SimpleNamespace(experiment=PLAN, tokenizer=None, model=None, mesh=None, stage="pretrain")

    def load_run(run_dir, stage=None, longest=None):
        calls.append((str(run_dir), stage))
        return loaded

    def load_adapters(loaded, run_dir, folders):
        return {Path(folder).name: loaded for folder in folders} or {"": loaded}

    def generate_text(model, tokenizer, prompts, **options):
        calls.append((prompts, options))
        return [Answer(f"about {prompt}\x1b[2J", prompt.endswith("?")) for prompt in prompts]

    def stream(model, tokenizer, messages, **options):
        calls.append(([dict(message) for message in messages], options["seed"]))
        if len(messages) > 3:
            raise UserError("the conversation has 600 tokens; model.max_len is 512")
        yield "so "
        if messages[-1]["content"] == "slowly":
            raise KeyboardInterrupt
        yield "it is"

    def render(messages, tokenizer, generation_prompt=False):
        return types.SimpleNamespace(tokens=[0] * (len(messages) * 10))

    models = types.SimpleNamespace(load_run=load_run, load_adapters=load_adapters)
    monkeypatch.setitem(sys.modules, "lm.train.loaded_run", models)
    monkeypatch.setitem(sys.modules, "lm.rollout.engine", types.SimpleNamespace(generate_text=generate_text))
    sampler = types.SimpleNamespace(stream=stream, compile_stream=lambda model, tokenizer, top_k, top_p: None)
    monkeypatch.setitem(sys.modules, "lm.rollout.sampler", sampler)
    monkeypatch.setitem(sys.modules, "lm.data.chat", types.SimpleNamespace(render=render))
    return calls


@pytest.mark.parametrize("name", ["small", "runs/small"])
def test_a_run_is_found_by_name_and_by_folder(run_dir, asked, capsys, name):
    assert main(["sample", name]) == 0
    assert asked[0] == ("runs/small", "pretrain")
    assert "runs/small, after stage pretrain" in capsys.readouterr().out


def test_sample_asks_the_experiments_prompts_or_yours(run_dir, asked, capsys):
    assert main(["sample", "small"]) == 0
    assert (
        main(["sample", "small", "--prompt", "One", "Two?", "--prompt", "3", "--raw", "--top-k", "5", "--seed", "2"])
        == 0
    )
    assert asked[1][0] == ["What is an LLM?"]
    prompts, options = asked[3]
    assert prompts == ["One", "Two?", "3"]
    expected = {"max_new_tokens": 128, "temperature": 0.0, "top_k": 5, "top_p": 1.0, "seed": 2, "raw": True}
    assert options == expected
    out = capsys.readouterr().out
    assert "\n> One\nabout One␛[2J\n[cut at 128 tokens]\n" in out
    assert "\n> Two?\nabout Two?␛[2J\n\n> 3" in out


def test_every_adapter_answers_under_its_name(run_dir, asked, capsys):
    assert main(["sample", "small", "--adapter", "out/one", "--adapter", "out/two"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n> What is an LLM?\n") == 2
    assert out.index("after stage pretrain, adapter one") < out.index("after stage pretrain, adapter two")


def test_stages_are_checked_before_anything_is_loaded(run_dir, asked, capsys):
    assert main(["sample", "small", "--stage", "pretrian"]) == 2
    assert main(["sample", "small", "--stage", "sft"]) == 2
    (run_dir / "stages" / "pretrain" / "checkpoints" / "100").rmdir()
    assert main(["sample", "small"]) == 2
    misspelt, untrained, empty = capsys.readouterr().err.splitlines()
    assert "did you mean pretrain?" in misspelt
    assert "no checkpoint of stage sft yet; it has pretrain" in untrained
    assert "no checkpoint yet" in empty and "lm run" in empty
    assert asked == []


def chat(monkeypatch, *lines: str) -> int:
    said = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    return main(["chat", "small", "--seed", "4"])


def test_chat_keeps_the_conversation_until_an_empty_line(run_dir, asked, capsys, monkeypatch):
    assert chat(monkeypatch, "hello", "and?", "", "never") == 0
    assert asked[1] == ([{"role": "user", "content": "hello"}], 4)
    assert [message["content"] for message in asked[2][0]] == ["hello", "so it is", "and?"]
    assert [message["role"] for message in asked[2][0]] == ["user", "assistant", "user"]
    assert len(asked) == 3
    assert capsys.readouterr().out.count("so it is\n") == 2


def test_ctrl_c_stops_the_answer_alone_and_clear_begins_anew(run_dir, asked, capsys, monkeypatch):
    assert chat(monkeypatch, "slowly", "more", "/clear", "/help", "/nothing", "hello", "") == 0
    said = capsys.readouterr().out
    assert "so  [stopped]\n" in said and "[no command /nothing; " in said and said.count("Ctrl-C stops an answer") == 3
    assert [message["content"] for message in asked[2][0]] == ["slowly", "so ", "more"]
    assert asked[3][0] == [{"role": "user", "content": "hello"}]


def test_ctrl_c_at_the_prompt_ends_the_conversation(run_dir, asked, monkeypatch):
    def interrupted(prompt: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["chat", "small"]) == 130


def test_chat_says_when_the_context_is_full_and_begins_anew(run_dir, asked, capsys, monkeypatch):
    assert chat(monkeypatch, "one", "two", "three", "four") == 0
    assert len(asked[3][0]) == 5 and len(asked[4][0]) == 1
    assert capsys.readouterr().out.count("the context is full") == 1


@pytest.fixture
def trained(tmp_path, monkeypatch) -> types.SimpleNamespace:
    """A stand-in for training: keeps its arguments, and is interrupted where `interrupt` says so."""
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    stage = "Stage(name='sft', objective=SFT(), sources=(Source(path='x'),))"
    text = f"from lm.experiment import *\nexperiment = Experiment(name='small', stages=({stage},))\n"
    Path("experiments/small.py").write_text(text, "utf-8")
    seen = types.SimpleNamespace(interrupt=False, calls=[])

    class Interrupted(Exception):
        pass

    def run(experiment, run_dir, fresh, until, profile, watchdog, after_stage, callbacks, accept):
        seen.calls.append((experiment, run_dir, fresh, until, profile, watchdog))
        run_dir.mkdir(parents=True)
        (run_dir / "experiment.json").write_text(json.dumps(to_dict(experiment)), "utf-8")
        if seen.interrupt:
            raise Interrupted("SIGINT at step 3 of stage sft: saved")
        after_stage(run_dir)

    monkeypatch.setitem(sys.modules, "lm.train.stages", types.SimpleNamespace(run=run))
    monkeypatch.setitem(sys.modules, "lm.train.loop", types.SimpleNamespace(Interrupted=Interrupted))
    return seen


def test_run_trains_in_the_folder_of_its_name_and_writes_the_report(trained, capsys):
    assert main(["run", "small", "--sft.steps", "70", "--name", "other", "--fresh", "--profile", "2:4"]) == 0
    experiment, *given = trained.calls[0]
    assert experiment.stages[0].steps == 70 and given == [Path("runs/other"), True, None, (2, 4), None]
    assert "report: runs/other/report.html" in capsys.readouterr().out
    assert Path("runs/other/report.html").is_file()


def test_a_run_may_leave_its_report_to_later(trained, capsys):
    assert main(["run", "small", "--no-report"]) == 0
    assert Path("runs/small/experiment.json").is_file() and not Path("runs/small/report.html").exists()
    assert "report" not in capsys.readouterr().out


def test_steps_to_profile_that_are_no_slice_are_refused_before_anything_is_trained(trained, capsys):
    assert main(["run", "small", "--profile", "4:2"]) == 2
    assert "--profile is '4:2'; it should be FIRST:END" in capsys.readouterr().err and not trained.calls


def test_an_interrupted_run_says_how_to_go_on(trained, capsys):
    trained.interrupt = True
    assert main(["run", "small", "--fresh", "--run-dir", "my run", "--sft.steps=70", "--until", "sft"]) == 130
    error = capsys.readouterr().err
    assert "SIGINT at step 3 of stage sft: saved" in error and error.count("\n") == 1
    assert error.endswith("lm run small --run-dir 'my run' --until sft --sft.steps=70\n")


def test_eval_says_where_numbers_differ():
    def line(name: str, value: float, step: int = 100) -> dict:
        return {"step": step, "when": "after", "eval": name, "metric": "reward", "count": 200, "reward": value}

    own = [line("a", 0.5), line("b", 0.25), line("b", 0.75, step=50)]
    text = eval_command.table([line("a", 0.5), line("b", 0.3), line("c", 0.1)], own)
    _, first, second, third, _, verdict = text.splitlines()
    assert first.split() == ["a", "reward", "200", "0.5000", "0.5000", "same"]
    assert second.split() == ["b", "reward", "200", "0.3000", "0.2500", "+0.05"]
    assert third.split() == ["c", "reward", "200", "0.1000", "–"]
    assert verdict == "differs from the run's own: b"
    assert eval_command.table([line("a", 0.5)], own).endswith("\nthe same as the run's own")
    assert "no measurements of its own" in eval_command.table([line("a", 0.5, step=7)], own)


def test_pairs_are_told_in_80_columns(capsys):
    from lm.cli.eval import pairs_text
    from lm.evals.pairs import Scored
    from lm.evals.preferences import worth
    from lm.train.judging import PairScores

    gaps, longer = np.array([1.0, -0.5, 2.0, 0.3]), np.array([3.0, 2.0, -4.0, 1.0])
    scored = Scored([{}] * 4, gaps, longer, cut=3, left_out=2, ties=1)
    judged = PairScores(
        "runs/x, reward",
        "pairs.jsonl",
        scored,
        worth(gaps, longer, False, ["a", "a", "b", "c"]),
        [0.75, 0.5],
        "these pairs themselves",
        "seen " * 20,
    )
    text = pairs_text(judged)
    assert max(map(len, text.splitlines())) <= 80
    assert "4 pairs of pairs.jsonl, 3 cut, 2 left out, 1 ties" in text and "75.0 %, 50.0 %" in text
    assert json.loads(json.dumps(judged.to_json()))["accuracy"]["mean"] == 0.75


@pytest.mark.parametrize("words", [["--json"], ["--heldout", "0.1"], ["--page", "x.html"]])
def test_what_is_for_pairs_is_refused_without_them(run_dir, words, capsys):
    assert main(["eval", "small", *words]) == 2
    assert "are for --pairs FILE" in capsys.readouterr().err


def test_a_page_of_another_kind_is_refused_before_anything_is_scored(run_dir, capsys):
    assert main(["eval", "small", "--pairs", "pairs.jsonl", "--page", "page.txt"]) == 2
    assert "should end in .html" in capsys.readouterr().err
