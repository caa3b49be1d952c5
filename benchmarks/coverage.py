"""How often 95 % intervals of a mean of few values cover it: Student's t, and the studentised bootstrap.

python benchmarks/coverage.py
"""

from __future__ import annotations

import math

import numpy as np

from lm.sweep.statistics import _studentised, estimate

TRIES = 1000
NOISES = {
    "normal": lambda random, n: random.normal(size=n),
    "Laplace": lambda random, n: random.laplace(size=n),
    "exponential": lambda random, n: random.exponential(size=n) - 1,
}


def main() -> None:
    random = np.random.default_rng(0)
    print(f"{'noise':<12} {'values':>6} {'t':>7} {'bootstrap':>10}")
    for name, noise in NOISES.items():
        for count in (3, 5, 6, 8, 10, 20):
            covered = np.zeros(2)
            for _ in range(TRIES):
                values = noise(random, count)
                plain = estimate(values.tolist())
                low, high = np.quantile(_studentised(values), [0.025, 0.975])
                t = plain.mean / (values.std(ddof=1) / math.sqrt(count))
                covered += [abs(plain.mean) <= plain.half, low <= t <= high]
            print(f"{name:<12} {count:>6} {covered[0] / TRIES:>7.3f} {covered[1] / TRIES:>10.3f}")


if __name__ == "__main__":
    main()
