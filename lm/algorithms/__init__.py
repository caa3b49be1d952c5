"""Algorithms, one file each: `step(state, batch) -> (state, metrics)`, its models, its rollouts and what it costs."""
