"""Former spellings of fields and values are read as the ones of today, and leave digests as they are."""

import dataclasses

import pytest

from lm.changes import normalised
from lm.config import former
from lm.experiment import GRPO, SFT, Collect, Eval, Experiment, Source, Stage, UserError, from_dict, strict, to_dict
from lm.overrides import override, replaced
from lm.sweep.shared import stage_keys
from lm.sweep.trials import key_of


def experiment(verifier="style", start="collected:", **cap) -> Experiment:
    asked = Source("asked.jsonl")
    stages = (
        Stage("collect", Collect(verifier=verifier), (asked,)),
        Stage("sft", SFT(), (Source(f"{start}collect"),)),
        Stage("grpo", GRPO(verifier=verifier, **(cap or {"tis_clip": 2.0})), (asked,)),
    )
    return Experiment("former", stages, (Eval("asked", asked, verifier=verifier),))


TODAY = experiment()


@pytest.fixture(autouse=True)
def told(capsys):
    former._tell.cache_clear()
    return lambda: capsys.readouterr().err.splitlines()


def test_python_values_may_use_them(told):
    assert strict(experiment("manners", "made:", sampler_cap=2.0)) == TODAY
    assert told() == [
        "lm: GRPO.sampler_cap is called tis_clip now",
        "lm: collect.objective.verifier manners is written style now",
        "lm: sft.sources.0.path made:collect is written collected:collect now",
        "lm: grpo.objective.verifier manners is written style now",
        "lm: evals.asked.verifier manners is written style now",
    ]
    assert dataclasses.replace(TODAY.stages[2].objective, sampler_cap=3.0).tis_clip == 3.0


def test_stored_runs_may_use_them(told):
    plain = to_dict(experiment("manners", "made:"))
    plain["stages"][2]["objective"]["sampler_cap"] = plain["stages"][2]["objective"].pop("tis_clip")
    assert from_dict(plain) == TODAY and normalised(plain) == normalised(to_dict(TODAY))
    assert "lm: grpo.objective.sampler_cap is called tis_clip now" in told()


def test_the_command_line_may_use_them(told):
    words = ["--grpo.objective.sampler_cap", "3", "--grpo.objective.verifier", "manners"]
    assert override(TODAY, words).stages[2].objective == GRPO("style", tis_clip=3.0)
    assert replaced(TODAY, "grpo.objective.sampler_cap", 3.0).stages[2].objective.tis_clip == 3.0
    assert len(told()) == 2


def test_both_spellings_at_once_are_refused():
    plain = to_dict(TODAY)
    plain["stages"][2]["objective"]["sampler_cap"] = 1.0
    with pytest.raises(UserError, match=r"grpo\.objective has no field 'sampler_cap'"):
        from_dict(plain)


def test_names_of_today_are_not_told(told):
    assert strict(TODAY) == TODAY and told() == []


def test_trials_and_shared_stages_keep_their_keys():
    """As the lm before the renames computed them, so that sweeps go on."""
    assert key_of(TODAY) == "ff83cfb120cc"
    assert stage_keys(TODAY) == ["27126a40fa24", "d752fa19e098", "426c55a1c93d"]
