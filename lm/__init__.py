"""lm: train a language model from random weights to a reasoner, on one core or a pod."""

__version__ = "0.1.0"
