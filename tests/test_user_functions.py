"""Verifiers, losses and callbacks of the user's own, by FILE:FUNCTION: found, checked, used; errors in one line."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from lm.check import check
from lm.experiment import CPO, DPO, GRPO, KTO, Eval, Experiment, Source, Stage, UserError, from_dict, to_dict
from lm.files import load
from lm.objectives import cpo, dpo, kto
from lm.objectives.own_loss import check_own_losses, own_losses
from lm.overrides import override
from lm.rollout.verifiers import find_verifier, needed_columns
from lm.train.callbacks import listener, load_callbacks
from lm.train.metrics import MetricsLog
from lm.user_functions import SEARCH_PATH, check_functions, load_function, search_recorded

JUDGES = """
import jax
from beside import HALF

def score(row, completion):
    return HALF * (row["answer"] in completion)

score.columns = ("answer",)

def logistic(chosen, rejected, knobs):
    return -jax.nn.log_sigmoid(knobs.beta * (chosen - rejected))

def simple(margin, knobs):
    return -jax.nn.log_sigmoid(knobs.beta * margin)

def plain_kto(rewards, sign, baseline):
    return 1 - jax.nn.sigmoid(sign * (rewards - baseline))

def narrow(row):
    return 0

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the user's files that is neither the current one nor on the path, until an experiment of it is read."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "judges.py").write_text(JUDGES, "utf-8")
    (home / "beside.py").write_text("HALF = 0.5\n", "utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv(SEARCH_PATH, str(home))
    return home


def experiment(**changes) -> Experiment:
    prompts = (Source("gen:arithmetic", holdout=0.05),)
    return Experiment(
        name="own",
        stages=(Stage("reason", GRPO(verifier="judges:score"), prompts, steps=20, **changes),),
        evals=(Eval("right", prompts[0], verifier="judges:score"),),
    )


def test_a_verifier_is_found_beside_the_experiment_from_any_folder(folder, monkeypatch):
    monkeypatch.delenv(SEARCH_PATH)
    text = f"from lm.experiment import from_dict\nexperiment = from_dict({to_dict(experiment())!r})\n"
    (folder / "mine.py").write_text(text, "utf-8")
    check_functions(load(str(folder / "mine.py")))
    assert find_verifier("judges:score")({"answer": "7"}, "it is 7") == 0.5
    assert needed_columns("judges:score") == ("answer",)


@pytest.mark.parametrize("name", ["judges:score", "judges.py:score", "home.judges:score", "{home}/judges.py:score"])
def test_a_file_is_named_by_module_or_by_path(folder, name, monkeypatch):
    monkeypatch.setenv(SEARCH_PATH, os.pathsep.join([str(folder), str(folder.parent)]))
    assert find_verifier(name.format(home=folder))({"answer": "7"}, "7") == 0.5


def test_the_users_file_wins_over_a_module_of_the_same_name(folder):
    (folder / "statistics.py").write_text("def mean(row, completion):\n    return 0.25\n", "utf-8")
    assert find_verifier("statistics:mean")({}, "") == 0.25


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody:score", "there is no nobody.py in .*home, .*elsewhere, and no module of that name"),
        ("nobody.py:score", "there is no file nobody.py"),
        ("a b:score", "there is no file a b"),
        ("judges:scoer", "judges.py defines no 'scoer'; did you mean score"),
        ("judges:NUMBER", "NUMBER in .*judges.py is int, and no function"),
        ("judges:narrow", r"it is called as narrow\(row, completion\): too many positional arguments"),
        ("judges:", "should be FILE:FUNCTION"),
        (":score", "should be FILE:FUNCTION"),
        ("raises:score", "raises.py:3: ValueError: two lines$"),
        ("syntax:score", "syntax.py:1: SyntaxError: "),
        ("leaves:score", "leaves.py:1: SystemExit: 0$"),
        ("imports:score", "imports.py:1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("score", "there are .*answer, .* and FILE:FUNCTION of your own"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_field(folder, name, said):
    (folder / "raises.py").write_text("def score(row, completion): ...\n\nraise ValueError('two\\n lines')\n", "utf-8")
    (folder / "syntax.py").write_text("def score(:\n", "utf-8")
    (folder / "leaves.py").write_text("raise SystemExit(0)\n", "utf-8")
    (folder / "imports.py").write_text("import nothing_here\n", "utf-8")
    with pytest.raises(UserError, match=said) as found:
        find_verifier(name, "reason.objective.verifier")
    assert str(found.value).startswith(f"reason.objective.verifier is {name!r}")
    assert "\n" not in str(found.value)


def test_losses_of_ones_own_equal_those_of_the_table():
    rng = np.random.default_rng(0)
    x = {name: jnp.asarray(rng.normal(-2, 1, (6, 5)), jnp.float32) for name in ("logp", "ref_logp")}
    x["weights"] = jnp.asarray(rng.random((6, 5)) < 0.8, jnp.float32)
    pairs = [
        dpo.dpo(x["logp"], x["ref_logp"], x["weights"], DPO(losses=(name,)))[0].value()
        for name in ("sigmoid", "judges:logistic")
    ]
    single = [
        cpo.cpo(x["logp"], x["weights"], CPO(loss=name, nll_coef=0.0))[0].value()
        for name in ("sigmoid", "judges:simple")
    ]
    marks = jnp.asarray(np.arange(len(x["logp"])) % 2, jnp.float32)
    alone = [
        kto.kto(x["logp"], x["ref_logp"], x["weights"], marks, KTO(loss=name), jnp.float32(0.1))[0].value()
        for name in ("kto", "judges:plain_kto")
    ]
    for ours, own in (pairs, single, alone):
        np.testing.assert_allclose(own, ours, rtol=1e-6)


@pytest.mark.parametrize(
    ("objective", "flag", "name"),
    [(DPO(), "losses", "judges:logistic"), (CPO(), "loss", "judges:simple"), (KTO(), "loss", "judges:plain_kto")],
)
def test_a_loss_of_ones_own_is_a_value_like_another(objective, flag, name):
    stage = Stage("tune", objective, (Source("gen:preferences"),))
    found = override(Experiment("own", (stage,)), [f"--tune.objective.{flag}", name])
    check(found)
    assert from_dict(json.loads(json.dumps(to_dict(found)))) == found
    assert [*check_functions(found)] == [name] and own_losses(found.stages[0]) == [(flag, name)]
    with pytest.raises(UserError, match=f"tune.objective.{flag} is 'judges:narrow'; it is called as narrow"):
        check_functions(override(found, [f"--tune.objective.{flag}", "judges:narrow"]))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('two\\nlines')", "own.py:2: ValueError: two lines"),
        ("raise SystemExit(3)", "own.py:2: SystemExit: 3"),
        ("return np.exp(a)", "own.py:2: TracerArrayConversionError"),
        (
            "return None",
            r"loss in .*own.py gives None \(NoneType\); it should give a jax array of floating-point numbers of shape \(2,\)",
        ),
        ("return 'low'", "gives 'low'|gives \"low\""),
        ("return a.mean()", r"gives an array of float32 of shape \(\)"),
        ("return (a > 0).astype(int)", r"gives an array of int32 of shape \(2,\)"),
        ("return np.ones(2)", "ndarray"),
    ],
)
@pytest.mark.parametrize(
    ("objective", "arguments"),
    [(DPO, "a, rejected, knobs"), (CPO, "a, knobs"), (KTO, "a, sign, baseline")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_loss_of_ones_own_that_fails_is_one_line_before_anything_is_trained(folder, objective, arguments, body, said):
    (folder / "own.py").write_text(f"def loss({arguments}):\n    {body}\n\nimport numpy as np\n", "utf-8")
    made = objective(losses=("own:loss",)) if objective is DPO else objective(loss="own:loss")
    with pytest.raises(UserError, match=said) as found:
        check_own_losses([Stage("tune", made, (Source("gen:preferences"),))])
    assert str(found.value).startswith("tune.objective.loss") and "\n" not in str(found.value)


def test_a_run_records_the_file_and_its_hash_and_finds_it_again(folder, tmp_path, monkeypatch):
    found = check_functions(experiment())["judges:score"]
    assert found["file"] == str(folder / "judges.py") and len(found["sha256"]) == 64
    monkeypatch.delenv(SEARCH_PATH)
    sessions = {"runs": [{"functions": {"judges:score": found["file"]}}]}
    (tmp_path / "environment.json").write_text(json.dumps(sessions), "utf-8")
    with pytest.raises(UserError, match=r"there is no judges\.py"):
        find_verifier("judges:score")
    search_recorded(tmp_path)
    assert find_verifier("judges:score")({"answer": "7"}, "7") == 0.5


def test_a_function_that_a_run_found_by_an_absolute_path_is_searched_nowhere_else(folder, tmp_path, monkeypatch):
    monkeypatch.delenv(SEARCH_PATH)
    name = f"{folder / 'judges.py'}:score"
    sessions = {"runs": [{"functions": {name: str(folder / "judges.py")}}]}
    (tmp_path / "environment.json").write_text(json.dumps(sessions), "utf-8")
    search_recorded(tmp_path)
    assert SEARCH_PATH not in os.environ and find_verifier(name)({"answer": "7"}, "7") == 0.5


@pytest.mark.parametrize(
    ("ends", "told"),
    [("assert False, 'too\\nfar'", "AssertionError: too far"), ("raise SystemExit('too far')", "SystemExit: too far")],
)
def test_a_callback_is_told_every_line_and_what_it_raises_is_one_line(folder, tmp_path, ends, told):
    text = f"SEEN = []\n\ndef note(stage, kind, line):\n    SEEN.append((stage, kind, line))\n    if line['step'] > 1: {ends}\n"
    (folder / "notes.py").write_text(text, "utf-8")
    callbacks = load_callbacks(["notes:note"])
    with MetricsLog(tmp_path / "stage", listener(callbacks, "sft")) as log:
        log.metrics({"step": 1, "loss": 2.0})
        log.evaluation({"step": 1, "when": "during", "eval": "docs", "loss": np.float32(1.5)})
        with pytest.raises(
            UserError, match=rf"callback notes:note failed on metrics of stage sft: .*notes.py:5: {told}"
        ):
            log.metrics({"step": 2, "loss": 1.0})
    seen = load_function("notes:note", "--callback").__globals__["SEEN"]
    assert [(stage, kind) for stage, kind, _ in seen] == [("sft", "metrics"), ("sft", "eval"), ("sft", "metrics")]
    assert seen[1][2]["loss"] == 1.5
