"""Measurements that some methods need once per model, saved as JSON beside its checkpoint.

hf_compress.calibrate.retrieval_heads(model)            # for model.compress("razor", ...): no data needed
hf_compress.calibrate.semantic_heads(model, samples)    # for model.compress("compresskv", ...): prompts with a needle
"""

from hf_compress.calibrate.retrieval import retrieval_heads
from hf_compress.calibrate.semantic import semantic_heads

__all__ = ["retrieval_heads", "semantic_heads"]
