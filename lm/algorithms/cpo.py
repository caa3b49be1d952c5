"""The CPO family: pairs of answers without a reference."""

from lm.algorithms.algorithm import Algorithm
from lm.steps import cpo_step

ALGORITHM = Algorithm(cpo_step)
