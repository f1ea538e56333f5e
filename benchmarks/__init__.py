"""Benchmarks side by side with peers in one run, since absolute times drift but ratios don't."""
