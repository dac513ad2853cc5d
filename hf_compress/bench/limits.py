"""What share of a full prefill a decision may cost.

Judged on the subjects whose layers are as wide, or as many, as those of models in use; on smaller ones the figure is
printed and nothing is said about it.
"""

from __future__ import annotations

JUDGED = ("mid", "wide")
SCORING = {"vision": 0.02, "decoder": 0.02, "cache": 0.03}
# Methods whose algorithm is more than a ranking, at 2048 tokens and ratio .5 of `wide` (pyramiddrop and atp: of `mid`).
OWN = {
    "pyramiddrop": 0.03,  # ranks at three boundaries
    "atp": 0.05,  # reads the attention of all visual rows at three cuts
    "lookm": 0.05,  # merges what goes
    "gear": 0.12,  # sorts every number for its outliers
    "ems": 0.20,  # compares all entries with all centres, twice
    "xkv": 0.60,  # a singular value decomposition
    "kvzip": 1.50,  # feeds the prompt again
}


def scoring_limit(model: str, method: str, stage: str) -> float | None:
    """The largest share of the full prefill of a subject that is no failure; None: nothing is asked of this subject."""
    return OWN.get(method, SCORING[stage]) if model in JUDGED else None
