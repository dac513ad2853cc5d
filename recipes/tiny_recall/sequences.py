"""Training sequences: a context, then questions with their answers, many of them; and which tokens are to be learned."""

import math
import random

import torch
from model import BOS, EOS, VOCABULARY

from hf_compress.demo.recall_data import ASK, FIRST_NAMES, LAST_NAMES, LOOKS, THINGS, Fact, people, scatter

TOKENS = 4096  # of a micro-batch, about
SPAN = 1100  # positions that the longest stretched sequence covers
STAGES = (  # until this share of the micro-batches: longest context, most facts
    (0.10, 32, 4),
    (0.25, 64, 8),
    (0.45, 128, 12),
    (0.65, 256, 16),
    (1.00, 512, 20),
)
SKIPPED, KNOWN, FILLER = 0, 1, 2  # what a token is to the loss; KNOWN can be answered from what stands before it
_PEOPLE = people("train")


def micro_batch(number, total, seed=0):
    """Micro-batch `number` of `total`: a pure function of its arguments.

    Returns:
        int64 tokens, positions and marks, (sequences, length) each; a mark says what the token is to the loss.
    """
    rng = random.Random(f"tiny_recall {seed} {number}")
    _, longest, most = next(stage for stage in STAGES if number < stage[0] * total)
    words = rng.choice((longest, longest, 3 * longest // 4, longest // 2))
    facts = rng.randint(2, max(2, min(most, words // 7)))
    asked = min(facts, 16)
    length = 1 + words + 6 * asked
    rows = [_sequence(words, facts, asked, rng) for _ in range(max(1, TOKENS // length))]
    tokens, marks, starts = (torch.tensor(part) for part in zip(*rows))
    return tokens, _positions(starts, rng), marks


def _sequence(words, facts, asked, rng):
    """One sequence of 1 + words + 6 * asked tokens: ids, marks, and where a new sentence starts (0 or 1)."""
    known = _facts(facts, rng)
    room = words // 5 - facts  # statements that still fit
    statements = [(fact, (0, 1)) for fact in known]
    for fact in known:
        for _ in range(min(room, rng.choice((0, 0, 0, 1, 2)))):
            statements.append((fact, (0, 1)))
            room -= 1
    text, marks, starts, seen = ["<s>"], [SKIPPED], [0], set()
    for fact, part in scatter(statements, words, rng):
        text += part
        starts += [1, *[0] * (len(part) - 1)]
        if fact is None:
            marks += [SKIPPED, *[FILLER] * (len(part) - 1)]
        else:
            value = KNOWN if fact in seen else SKIPPED
            marks += [SKIPPED, FILLER if fact in seen else SKIPPED, value, value, FILLER]
            seen.add(fact)
    for fact in rng.sample(known, asked):
        text += [ASK, fact.first, fact.last, fact.look, fact.thing, "</s>"]
        marks += [SKIPPED, FILLER, FILLER, KNOWN, KNOWN, KNOWN]
        starts += [1, 0, 0, 0, 0, 0]
    return [VOCABULARY[word] for word in text], marks, starts


def _facts(count, rng):
    """Facts about different people, who share their names with many others or with few, differently every time."""
    fewest, pairs = math.ceil(math.sqrt(1.6 * count)), []
    while len(pairs) < count:
        first, last = (set(rng.sample(names, rng.randint(fewest, len(names)))) for names in (FIRST_NAMES, LAST_NAMES))
        pairs = [pair for pair in _PEOPLE if pair[0] in first and pair[1] in last]
    return [Fact(*pair, rng.choice(LOOKS), rng.choice(THINGS)) for pair in rng.sample(pairs, count)]


def _positions(starts, rng):
    """Positions (sequences, length), for half of the micro-batches stretched by jumps between sentences.

    So short sequences teach distances of up to a thousand tokens.
    """
    count, length = starts.shape
    steps = torch.ones(count, length, dtype=torch.long)
    if rng.random() < 0.5:
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        draw = torch.rand(count, length, generator=generator) * starts
        jumps = torch.where(draw >= draw.topk(min(8, length), 1).values[:, -1:], draw, 0)
        spare = torch.rand(count, 1, generator=generator) * (SPAN - length)
        steps += (jumps / jumps.sum(1, keepdim=True) * spare).long()
    return steps.cumsum(1) - 1
