"""KTO: answers labelled good or bad, against the model as it was before the stage."""

from __future__ import annotations

from lm.algorithms.algorithm import Algorithm
from lm.experiment import KTO
from lm.objectives.kto import reads_baseline
from lm.steps import kto_step


def extra_forward_passes(o: KTO) -> int:
    """The reference's, and for the baseline both models' on the mismatched rows."""
    return 3 if reads_baseline(o.loss) else 1


ALGORITHM = Algorithm(kto_step, reads_reference=lambda o: True, extra_forward_passes=extra_forward_passes)
