"""The table of algorithms: complete, and its steps are the functions that stand side by side."""

import lm.algorithms
from lm.algorithms import ALGORITHMS
from lm.algorithms.algorithm import no_rollout
from lm.experiment import OBJECTIVES


def test_every_objective_that_trains_has_an_algorithm():
    assert {kind for kind in OBJECTIVES.values() if kind.produces != "rows"} == ALGORITHMS.keys()


def test_algorithms_that_read_prompts_sample_and_no_others():
    assert all((row.rollout is not no_rollout) == (kind.data == "prompts") for kind, row in ALGORITHMS.items())


def test_every_step_can_be_imported_by_its_name():
    for row in ALGORITHMS.values():
        assert getattr(lm.algorithms, row.step.__name__) is row.step
