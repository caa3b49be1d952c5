"""Pretraining: next-token cross-entropy on every token of the text."""

from lm.algorithms.algorithm import Algorithm
from lm.steps import pretrain_step

ALGORITHM = Algorithm(pretrain_step)
