"""Reproduction of papers' claims: the `Paper` value, running and judging it, and its stored results."""
