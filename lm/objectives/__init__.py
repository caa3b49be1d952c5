"""What is minimised: one file an objective, each a pure function that returns (Mean, metrics)."""
