"""Timings: compressed against native runs, as ratios."""
