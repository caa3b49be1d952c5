"""ORPO: pairs of answers, odds ratio and likelihood together, without a reference."""

from lm.algorithms.algorithm import Algorithm
from lm.steps import orpo_step

ALGORITHM = Algorithm(orpo_step)
