"""Tasks of reasoning-gym are a pure function of family and index, and slow families are refused by name."""

import pytest

from lm.data import gym
from lm.data.sources import load_rows
from lm.experiment import UserError
from lm.rollout.environment_check import check_tasks

reasoning_gym = pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")


def test_rows_are_generated_by_index():
    rows = load_rows("gym:chain_sum")
    assert rows.generated and len(rows) == gym.LENGTH
    assert rows[3] == gym.gym_row("chain_sum", 3) and rows[3]["question"] != rows[4]["question"]
    few = load_rows("gym:acre")
    assert len(few) == gym.FEWER["acre"] and not few.generated


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sudoku", "13 ms"),
        ("chainsum", "did you mean chain_sum"),
        ("composite", "no such family"),
        ("", "no such family"),
    ],
)
def test_a_family_that_cannot_be_used_is_told_in_a_line(name, said):
    with pytest.raises(UserError, match=f"^gym:{name}") as told:
        load_rows(f"gym:{name}")
    assert said in str(told.value) and "\n" not in str(told.value)


def test_the_slow_families_exist():
    from reasoning_gym.factory import DATASETS

    assert {*gym.SLOW, *gym.FEWER, gym.MIXTURE} <= set(DATASETS)


@pytest.mark.parametrize("name", ["chain_sum", "count_bits", "spell_backward"])
def test_families_pass_the_check(name):
    findings = list(check_tasks(f"gym:{name}", "", "", 0.1, 5, 5.0))
    assert [one for one in findings if one.problem] == []
