"""Sweeps: axes, trials, the workers that run them, and the statistical comparison of their results."""
