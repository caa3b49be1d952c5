"""The DPO family: pairs of answers, against the model as it was before the stage."""

from __future__ import annotations

from lm.algorithms.algorithm import Algorithm
from lm.experiment import DPO
from lm.steps import preference_step


def reads_reference(o: DPO) -> bool:
    """Not where its log-probabilities are in the batches."""
    return not o.caches_reference


ALGORITHM = Algorithm(preference_step, reads_reference=reads_reference, extra_forward_passes=reads_reference)
