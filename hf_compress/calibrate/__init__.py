"""Measurements that some methods need once per model, saved as JSON beside its checkpoint.

hf_compress.calibrate.retrieval_heads(model)            # for model.compress("razor", ...): no data needed
hf_compress.calibrate.semantic_heads(model, samples)    # for model.compress("compresskv", ...): prompts with a needle
hf_compress.calibrate.merge_thresholds(model, batches, ratio=.9)  # for model.compress("dymu", "adaptive"): images
hf_compress.calibrate.row_schedule(model, batches)      # for model.compress("gsearch", schedule=...): prompts
hf_compress.calibrate.fitted_schedule(model, batches, ratio=.6)  # for model.compress("fitprune", schedule=...): prompts
"""

from hf_compress.calibrate.merging import merge_thresholds
from hf_compress.calibrate.retrieval import retrieval_heads
from hf_compress.calibrate.rows import fitted_schedule, row_schedule
from hf_compress.calibrate.semantic import semantic_heads

__all__ = ["fitted_schedule", "merge_thresholds", "retrieval_heads", "row_schedule", "semantic_heads"]
