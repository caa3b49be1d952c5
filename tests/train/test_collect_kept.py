"""Rejection-sampled answers: which are kept as rows, hints for prompts without a right answer (STaR), and SFT on what was kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lm.experiment import GRPO, SFT, Collect, Source, Stage, UserError, from_dict
from lm.json_lines import checksums, rewrite_json_lines
from lm.rollout import engine
from lm.train.collect import ANSWERS, make_conversations, make_prompts
from lm.train.collected import ROWS_FILE
from lm.train.loop import Interrupted
from lm.train.signals import Stop
from lm.train.stages import run
from lm.train.trajectory_files import trajectory_files
from tests.train.runs import CONSTANT, experiment, metrics, write_questions

JUDGED = [
    {"prompt": "one", "answers": ["a", "b", "a", "c"], "scores": [1.0, 0.0, 1.0, 0.5]},
    {"prompt": "two", "answers": ["a", "b"], "scores": [0.0, 0.25]},
    {"prompt": "three", "answers": ["d", "e", "f"], "scores": [0.5, 1.0, 1.0]},
]


def written(folder: Path, **fields) -> list[tuple[str, str]]:
    (folder / ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in JUDGED))
    make_conversations(folder, "collect", Collect(verifier="answer", **fields))
    rows = [json.loads(line)["messages"] for line in (folder / ROWS_FILE).read_text().splitlines()]
    return [(asked["content"], said["content"]) for asked, said in rows]


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({"make": "best"}, ["one a", "two b", "three e"]),
        ({"make": "best", "least_score": 0.5}, ["one a", "three e"]),
        ({"make": "all"}, ["one a", "one b", "one c", "two a", "two b", "three d", "three e", "three f"]),
        ({"make": "all", "least_score": 0.5}, ["one a", "one c", "three d", "three e", "three f"]),
        ({"make": "all", "least_score": 0.5, "most_answers": 1}, ["one a", "three d"]),
    ],
)
def test_answers_that_reach_the_least_score_are_written_once_each(tmp_path, fields, kept):
    assert [" ".join(pair) for pair in written(tmp_path, **fields)] == kept


def test_no_right_answer_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"none of the answers in .* reaches collect.objective.least_score 2: .* a hint help"
    ):
        written(tmp_path, make="best", least_score=2.0)


TASKS = [
    {
        "prompt": name,
        "answers": ["x"] * 4,
        "scores": [1.0] * right + [0.5] * (4 - right),
        "task": {"q": name, "a": [right]},
    }
    for name, right in (("never", 0), ("once", 1), ("often", 3), ("always", 4))
]


@pytest.mark.parametrize("fields, kept", [
    ({}, {"never": 1, "once": 1, "often": 1}),
    ({"least_pass": 0.2}, {"once": 1, "often": 1}),
    ({"most_pass": 0.25}, {"never": 1, "once": 1}),
    ({"most_copies": 4}, {"never": 4, "once": 3, "often": 1}),
    ({"least_score": 0.5, "least_pass": 1.0}, None),
])  # fmt: skip
def test_prompts_are_written_by_their_pass_rate(tmp_path, fields, kept):
    (tmp_path / ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in TASKS))
    o = Collect(verifier="answer", make="prompts", **{"least_score": 1.0} | fields)
    if kept is None:
        with pytest.raises(UserError, match=r"none of the 4 prompts .* from 1 to 1 below 1; they are from 1 to 1"):
            make_prompts(tmp_path, "measure", o)
        return
    told = make_prompts(tmp_path, "measure", o)
    low, high = "never" not in kept, 1 + ("often" not in kept)
    least, most = fields.get("least_pass", 0), fields.get("most_pass", 1)
    assert told == (
        f"; of 4 prompts left out: {int(low)} below least_pass {least:g}, {high} above most_pass {most:g}, or always solved"
    )
    rows = [json.loads(line) for line in (tmp_path / ROWS_FILE).read_text().splitlines()]
    assert {name: sum(row["q"] == name for row in rows) for name in kept} == kept and len(rows) == sum(kept.values())
    assert all(row["pass_rate"] == row["a"][0] / 4 for row in rows)


def test_copies_are_rounded_up_without_rounding_errors(tmp_path):
    row = {"prompt": "p", "answers": ["x"] * 10, "scores": [1.0] * 7 + [0.0] * 3, "task": {"q": "p"}}
    (tmp_path / ANSWERS).write_text(json.dumps(row) + "\n")
    make_prompts(tmp_path, "measure", Collect(verifier="answer", make="prompts", least_score=1.0, most_copies=10))
    assert len((tmp_path / ROWS_FILE).read_text().splitlines()) == 3  # 10 * (1 - 0.7) is 3.0000000000000004


VERIFIER = "import zlib\n\ndef score(row, completion):\n    return zlib.crc32(completion.encode()) % 4 / 3\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that is collected from with a hint, and trained on what was kept."""
    root = tmp_path_factory.mktemp("star")
    write_questions(root)
    (root / "judge.py").write_text(VERIFIER)
    asked, few = Source(str(root / "asked.jsonl"), holdout=0.2), {"batch_size": 4, "seq_len": 48}
    collect = Collect(
        verifier=f"{root / 'judge.py'}:score", make="all", least_score=1.0, answers=1, hint="{prompt} {answer}",
        max_new_tokens=4,
    )  # fmt: skip
    whole = experiment(root)
    stages = (
        Stage("base", SFT(), (asked,), CONSTANT, **few, steps=2),
        Stage("collect", collect, (asked,), steps=3, **few),
        Stage("star", SFT(), (Source("collected:collect", holdout=0.0),), CONSTANT, **few, steps=2, start="base"),
    )
    run(type(whole)(**vars(whole) | {"stages": stages, "evals": ()}), root / "run")
    return root


def answers(run_dir: Path, stage: str = "collect") -> list[dict]:
    return [json.loads(line) for line in (run_dir / "stages" / stage / ANSWERS).read_text().splitlines()]


@pytest.mark.slow
def test_prompts_without_a_right_answer_are_asked_again_with_the_hint(folder):
    rows = answers(folder / "run")
    first = [row["scores"][0] for row in rows]
    assert min(first) < 1 <= max(first) or max(first) < 1
    assert [len(row["answers"]) for row in rows] == [1 if score >= 1 else 2 for score in first]
    assert all("no" not in row["prompt"] and row["prompt"].startswith("Tell") for row in rows)
    for number, line in enumerate(metrics(folder / "run", "collect")):
        of_step = rows[4 * number : 4 * number + 4]
        assert line["solved"] == sum(row["scores"][0] >= 1 for row in of_step) / 4
        assert line.get("solved_with_hint", 1.0) == sum(max(row["scores"]) >= 1 for row in of_step) / 4


@pytest.mark.slow
def test_a_resumed_collection_is_the_same(folder):
    copy = folder / "resumed"
    shutil.copytree(folder / "run", copy)
    here = copy / "stages" / "collect"
    (here / "summary.json").unlink()
    shutil.rmtree(copy / "stages" / "star")
    file = here / ANSWERS
    rewrite_json_lines(file, file.read_bytes().splitlines()[:5])  # one step, and one row of the next
    again = from_dict(json.loads((copy / "experiment.json").read_text()))
    kept = [part.rename(f"{part}.kept") for part in (here / "metrics.jsonl", checksums(here / "metrics.jsonl"))]
    with pytest.raises(UserError, match=r"metrics\.jsonl should have a line .* step 1 is missing"):
        run(again, copy)
    for part in kept:
        part.rename(str(part).removesuffix(".kept"))
    run(again, copy)
    assert metrics(copy, "collect") == metrics(folder / "run", "collect")
    assert answers(copy) == answers(folder / "run")
    assert metrics(copy, "star") == metrics(folder / "run", "star")


@pytest.mark.slow
@pytest.mark.parametrize("looks, kept", [(0, 0), (2, 1)])
def test_a_signal_ends_the_sampling_and_a_resume_samples_the_same(folder, monkeypatch, looks, kept):
    where, looked, sample = folder / f"stopped-{looks}", [], engine.sample_tokens
    shutil.copytree(folder / "run", where)
    for stage in ("collect", "star"):
        shutil.rmtree(where / "stages" / stage)

    def sampled(*arguments, **options):
        looked.append(0)
        return sample(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "sample_tokens", sampled)
        patch.setattr(Stop, "now", lambda self: "SIGTERM" if len(looked) > looks else None)
        with pytest.raises(Interrupted, match=f"SIGTERM: kept the answers of {kept} of 3 steps of stage collect"):
            run(from_dict(json.loads((where / "experiment.json").read_text())), where)
    assert len(looked) == looks + 1
    run(from_dict(json.loads((where / "experiment.json").read_text())), where)
    for name in (ANSWERS, ROWS_FILE):
        assert (folder / "run/stages/collect" / name).read_bytes() == (where / "stages/collect" / name).read_bytes()
    assert metrics(folder / "run", "collect") == metrics(where, "collect")
    sampled = [[path.name for path in trajectory_files(root / "stages/collect")] for root in (folder / "run", where)]
    assert sampled[0] == sampled[1]


@pytest.mark.slow
def test_a_policy_trains_on_the_prompts_that_it_neither_always_nor_never_solves(folder):
    measure = Collect(
        verifier=f"{folder / 'judge.py'}:score", make="prompts", least_score=0.5, least_pass=0.1, most_pass=0.9, answers=4,
        max_new_tokens=4, most_copies=2,
    )  # fmt: skip
    whole = from_dict(json.loads((folder / "run" / "experiment.json").read_text()))
    asked, few = whole.stages[1].sources, {"batch_size": 4, "seq_len": 48}
    reason = GRPO(verifier=f"{folder / 'judge.py'}:score", group_size=2, max_new_tokens=4)
    stages = (
        whole.stages[0],
        Stage("measure", measure, asked, steps=2, **few),
        Stage("reason", reason, (Source("collected:measure", holdout=0.0),), CONSTANT, **few, steps=1),
    )
    run(type(whole)(**vars(whole) | {"stages": stages}), folder / "measured")
    rows = [json.loads(line) for line in (folder / "measured/stages/measure" / ROWS_FILE).read_text().splitlines()]
    rates = {row["question"]: row["pass_rate"] for row in rows}
    assert rates and all(0.1 <= rate <= 0.9 for rate in rates.values()) and all("answer" in row for row in rows)
    judged = answers(folder / "measured", "measure")
    mean = {row["prompt"]: sum(score >= 0.5 for score in row["scores"]) / 4 for row in judged}
    assert {prompt for prompt, rate in mean.items() if 0.1 <= rate <= 0.9} == set(rates)
    assert len(metrics(folder / "measured", "reason")) == 1
