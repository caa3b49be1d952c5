"""What a sweep's axes make of its base, and what is refused before anything runs."""

import dataclasses

import pytest

from lm.experiment import GRPO, UserError
from lm.overrides import leaf
from lm.sweep.shared import pieces, stage_keys
from lm.sweep.sweep import TPE, LogUniform, Random, Sweep, Uniform, Zip, load
from lm.sweep.trials import apply, base_point, check_sweep, key_of, settings_text, trial_at, trials
from tests.sweep.tiny import base

RATES = (1e-3, 3e-3)


def values(sweep, name):
    return [leaf(trial.experiment, name)[1] for trial in trials(sweep)]


def test_a_grid_has_every_combination_with_every_seed_the_bases_own_first():
    sweep = Sweep("s", base, {"sft.steps": (3, 6), "sft.optimizer.peak_lr": (3e-3, 1e-3)}, seeds=(0, 1))
    found = trials(sweep)
    assert len(found) == 8 and len({trial.key for trial in found}) == 8
    assert [trial.key for trial in found[:2]] == [key_of(dataclasses.replace(base, seed=seed)) for seed in (0, 1)]
    assert {(t.settings["sft.steps"], t.settings["sft.optimizer.peak_lr"], t.experiment.seed) for t in found} == {
        (steps, rate, seed) for steps in "36" for rate in ("0.001", "0.003") for seed in (0, 1)
    }


def test_a_zip_goes_along_all_axes_at_once():
    sweep = Sweep("s", base, {"sft.steps": (3, 4), "pretrain.steps": (5, 8)}, search=Zip())
    assert list(zip(values(sweep, "sft.steps"), values(sweep, "pretrain.steps"), strict=True)) == [(3, 5), (4, 8)]


def test_variants_have_names_and_are_functions_fields_or_the_base():
    def longer(e):
        return dataclasses.replace(e, stages=tuple(dataclasses.replace(s, steps=2 * s.steps) for s in e.stages))

    variants = {"baseline": None, "no QK-norm": {"model.qk_norm": False}, "longer": longer}
    found = {t.settings["what"]: t.experiment for t in trials(Sweep("s", base, {"what": variants}))}
    assert found["baseline"].model.qk_norm and not found["no QK-norm"].model.qk_norm
    assert [stage.steps for stage in found["longer"].stages] == [12, 12]


def test_a_value_may_be_a_function_of_the_experiment_as_earlier_axes_left_it():
    axes = {"pretrain.steps": (3, 4), "sft.steps": (lambda e: 10 * e.stages[0].steps,)}
    assert values(Sweep("s", base, axes), "sft.steps") == [30, 40]


def test_an_axis_with_a_condition_applies_only_where_it_holds():
    axes = {"model.qk_norm": (True, False), "model.softcap": (0.0, 30.0)}
    sweep = Sweep("s", base, axes, conditions={"model.softcap": lambda e: not e.model.qk_norm})
    found = trials(sweep)
    assert len(found) == 3, "with QK-norm both values are the same experiment"
    assert [t.settings for t in found if t.experiment.model.qk_norm] == [{"model.qk_norm": "true"}]


def test_keep_leaves_experiments_out():
    sweep = Sweep("s", base, {"sft.steps": (3, 4, 5)}, keep=lambda e: e.stages[1].steps != 4)
    assert values(sweep, "sft.steps") == [3, 5]
    with pytest.raises(UserError, match="has no trial"):
        trials(dataclasses.replace(sweep, keep=lambda e: False))


def test_an_experiment_is_told_from_others_by_all_but_its_name():
    assert key_of(base) == key_of(dataclasses.replace(base, name="other"))
    assert key_of(base) != key_of(dataclasses.replace(base, seed=5))


REFUSED = {
    "names no field": ({"sft.optimizer.peek_lr": RATES}, {}, "no field .*did you mean sft.optimizer.peak_lr"),
    "of the wrong type": ({"sft.steps": (3, "many")}, {}, "sft.steps is 'many'; it should be an integer"),
    "no number": ({"model.qk_norm": Uniform(0, 1)}, {}, "a distribution is for a number"),
    "upside down": ({"sft.optimizer.peak_lr": LogUniform(1e-2, 1e-3)}, {"search": Random(3)}, "low to a larger high"),
    "the seed": ({"seed": (1, 2)}, {}, "seed cannot be an axis"),
    "empty": ({"sft.steps": ()}, {}, "should be a tuple of values"),
    "twice the same": ({"sft.steps": (3, 3)}, {}, "has a value twice: 3, 3"),
    "no list": ({"sft.steps": 3}, {}, "should be a tuple of values"),
    "uneven": ({"sft.steps": (3, 4), "pretrain.steps": (3,)}, {"search": Zip()}, "as many values on every axis"),
    "a distribution in a grid": ({"sft.optimizer.peak_lr": Uniform(0, 1)}, {}, "Grid needs values"),
    "a condition of nothing": ({"sft.steps": (3,)}, {"conditions": {"sft.step": bool}}, "did you mean sft.steps"),
    "seeds twice": ({"sft.steps": (3,)}, {"seeds": (0, 0)}, "distinct"),
    "no seed": ({"sft.steps": (3,)}, {"seeds": ()}, "at least one"),
    "too many": (
        {name: tuple(range(1, 51)) for name in ("sft.steps", "pretrain.steps", "sft.eval_every")},
        {},
        "125,000 trials",
    ),
    "a metric of nothing": ({"sft.steps": (3,)}, {"metric": "txt.loss"}, "names no eval of .*did you mean text"),
    "a search over nothing": ({}, {"search": TPE(3)}, "a search needs an axis"),
    "a function that gives nothing": ({"what": {"a": lambda e: 3}}, {}, "returns int; it should return an Experiment"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_work_is_refused_in_a_line(case):
    axes, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        check_sweep(Sweep("s", base, axes, **options))
    assert "\n" not in str(refused.value)


def test_a_trial_that_cannot_run_says_why_and_the_others_stay():
    found = trials(Sweep("s", base, {"model.num_heads": (2, 3), "model.num_kv_heads": (2,)}))
    assert [trial.impossible for trial in found if trial.settings["model.num_heads"] == "2"] == [""]
    (impossible,) = (trial for trial in found if trial.settings["model.num_heads"] == "3")
    assert impossible.impossible.startswith("model.num_heads is 3; it should be a multiple")
    with pytest.raises(UserError, match=r"its trial, num_heads 3, num_kv_heads 2: model.num_heads is 3; it should be"):
        trials(Sweep("s", base, {"model.num_heads": (3,), "model.num_kv_heads": (2,)}))


def fails_of_three(experiment):
    return 3 // (experiment.stages[1].steps - 3)


def test_a_function_that_fails_at_one_point_fails_that_point_only():
    variants = {"plain": None, "broken": lambda e: 1 // 0}
    found = trials(Sweep("s", base, {"what": variants, "sft.steps": (3, 4)}))
    assert sorted(bool(trial.impossible) for trial in found) == [False, False, True, True]
    assert {t.impossible for t in found} == {"", "ZeroDivisionError: integer division or modulo by zero"}
    assert len({trial.key for trial in found}) == 4
    of_others = Sweep("s", base, {"sft.steps": (3, 4), "pretrain.steps": (fails_of_three,)})
    assert [(t.settings["pretrain.steps"], bool(t.impossible)) for t in trials(of_others)] == [
        ("value 1", True),
        ("3", False),
    ]
    kept = Sweep("s", base, {"sft.steps": (3, 4)}, keep=fails_of_three)
    assert sorted(bool(trial.impossible) for trial in trials(kept)) == [False, True]


def test_a_searchs_own_point_is_the_base_where_it_lies_within():
    axes = {
        "sft.optimizer.peak_lr": LogUniform(1e-4, 1e-2),
        "norm": {"with": None, "without": {"model.qk_norm": False}},
    }
    sweep = Sweep("s", base, axes, search=TPE(3))
    point = base_point(sweep)
    assert point == {"sft.optimizer.peak_lr": 1e-3, "norm": 0}
    assert trial_at(sweep, point, 0).key == key_of(base)
    assert base_point(dataclasses.replace(sweep, axes={"sft.optimizer.peak_lr": Uniform(1e-2, 1)})) is None


def test_a_distribution_over_whole_numbers_gives_whole_numbers():
    experiment, shown = apply(base, "sft.steps", Uniform(2, 9), 4.6)
    assert experiment.stages[1].steps == 5 and shown == "5"


def test_settings_are_told_by_the_last_part_of_their_names_where_that_says_which():
    assert settings_text({"sft.optimizer.peak_lr": "0.1", "model.qk_norm": "true"}) == "peak_lr 0.1, qk_norm true"
    assert settings_text({"sft.steps": "1", "pretrain.steps": "2"}) == "sft.steps 1, pretrain.steps 2"


def test_a_sweep_is_found_by_name_and_a_file_may_have_several(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from tests.sweep.tiny import sweep\nother = sweep\n")
    assert load(str(file)).name == load(f"{file}:other").name == "tiny"
    with pytest.raises(UserError, match="defines no `third`"):
        load(f"{file}:third")


# ---- shared stages -----------------------------------------------------------------------------------------------


def keys(**changes):
    return stage_keys(dataclasses.replace(base, **changes))


def with_stage(index, **changes):
    return tuple(dataclasses.replace(s, **changes) if i == index else s for i, s in enumerate(base.stages))


def test_a_stage_is_shared_by_all_whose_experiments_agree_up_to_it():
    first, second = keys()
    assert keys(stages=with_stage(1, steps=9))[0] == first, "what comes later does not matter"
    assert keys(stages=with_stage(1, steps=9))[1] != second
    assert keys(name="other") == [first, second]
    for other in (keys(seed=1), keys(evals=()), keys(model=dataclasses.replace(base.model, qk_norm=False))):
        assert other[0] != first
    grpo = dataclasses.replace(base.stages[1], objective=GRPO())
    assert keys(stages=(base.stages[0], grpo))[0] == first


def test_a_vocabulary_that_is_learnt_from_other_texts_shares_nothing():
    other = dataclasses.replace(base.stages[1].sources[0], path="gen:instruct")
    assert keys(stages=with_stage(1, sources=(other,)))[0] != keys()[0]
    given = dataclasses.replace(base.tokenizer, path="x.model")
    shared = [keys(tokenizer=given, stages=with_stage(1, sources=(s,)))[0] for s in (other, base.stages[1].sources[0])]
    assert shared[0] == shared[1], "one that is given is the same for both"


def test_a_trial_is_cut_where_others_leave_it():
    all_keys = [["a", "b", "x"], ["a", "b", "y"], ["a", "c", "z"]]
    assert pieces(all_keys[0], all_keys) == [range(0, 1), range(1, 2), range(2, 3)]
    assert pieces(all_keys[2], all_keys) == [range(0, 1), range(1, 3)]
    assert pieces(["p", "q"], [["p", "q"]]) == [range(0, 2)]


def test_a_trial_without_the_eval_that_the_sweep_asks_for_fails_before_it_trains():
    def renamed(experiment):
        first, last = experiment.stages
        other = dataclasses.replace(experiment.evals[0], name="other")
        return dataclasses.replace(experiment, stages=(first, dataclasses.replace(last, evals=())), evals=(other,))

    found = trials(Sweep("s", base, {"what": {"base": None, "other": renamed}}, metric="text"))
    assert [trial.impossible for trial in found if trial.settings["what"] == "base"] == [""]
    (impossible,) = (trial for trial in found if trial.settings["what"] == "other")
    assert impossible.impossible.startswith("metric 'text' names no eval of tiny")
