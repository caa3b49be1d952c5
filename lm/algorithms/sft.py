"""Supervised fine-tuning: next-token cross-entropy on the assistant's turns."""

from lm.algorithms.algorithm import Algorithm
from lm.steps import sft_step

ALGORITHM = Algorithm(sft_step)
