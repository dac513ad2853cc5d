"""Fine-tuning compressed models with `Trainer`: ratios that follow a schedule, and batches from conversations."""

from hf_compress.engine.distill import Distill
from hf_compress.train.callback import CompressionCallback
from hf_compress.train.collator import VisionTextCollator
from hf_compress.train.schedules import Every, Fixed, Linear, RatioSchedule, Sampled, Stages

__all__ = [
    "CompressionCallback",
    "Distill",
    "Every",
    "Fixed",
    "Linear",
    "RatioSchedule",
    "Sampled",
    "Stages",
    "VisionTextCollator",
]
