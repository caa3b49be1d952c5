"""Sweeps: axes, trials, the workers that run them, and what may be concluded from their results."""
