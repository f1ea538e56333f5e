"""Benchmarks: measured side by side with peers in one run; absolute times drift, ratios stay."""
