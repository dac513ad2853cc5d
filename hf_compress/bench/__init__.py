"""Timings: compressed runs against native runs of equal length, as ratios. `python -m hf_compress.bench --help`."""
