"""Training sequences: a context, then many questions with their answers; and what each token is to the loss."""

import math
import random

import torch
from model import vocabulary

from hf_compress.demo.recall_data import ASK, FIRST_NAMES, LAST_NAMES, LOOKS, THINGS, WORDS, Fact, people, scatter

TOKENS = 4096  # of a micro-batch, about
ASKED = 16  # questions at the end of a sequence, at most
SPAN = 1100  # positions that the longest stretched sequence covers
JUMPS = 8  # sentences before which the positions of a stretched sequence jump
STRETCHED = 0.5  # share of the micro-batches
STAGES = (  # until this share of the micro-batches: words of the longest context, most facts
    (0.10, 32, 4),
    (0.25, 64, 8),
    (0.45, 128, 12),
    (0.65, 256, 16),
    (1.00, 512, 20),
)
SKIPPED, RECALLED, PLAIN = range(3)  # to the loss; a recalled token can be known from what stands before it
WEIGHTS = {"recalled": (RECALLED, 1.0), "plain": (PLAIN, 0.1)}  # of the means over the tokens of a mark
STEPS, ANSWER = 1300, 3  # of training; tokens of an answer with its end
_PEOPLE, _NUMBERS = people("train"), vocabulary(WORDS)


def micro_batch(number, total, seed=0):
    """Micro-batch `number` of `total`: a pure function of its arguments.

    Returns:
        int64 tokens, positions and marks (SKIPPED, RECALLED or PLAIN), (sequences, length) each.
    """
    rng = random.Random(f"tiny_recall {seed} {number}")
    words, most = size(STAGES, number / total, rng)
    facts = rng.randint(2, max(2, min(most, words // 7)))
    length = 1 + words + 6 * min(facts, ASKED)
    rows = [_sequence(words, facts, rng) for _ in range(TOKENS // length)]
    tokens, marks, starts = (torch.tensor(part) for part in zip(*rows))
    return tokens, stretched(starts, rng), marks


def size(stages, share, rng):
    """Words of a context and most facts in it, where this share of the training is done."""
    _, longest, most = next(stage for stage in stages if share < stage[0])
    return rng.choice((longest, longest, 3 * longest // 4, longest // 2)), most


def _sequence(words, facts, rng):
    """One sequence: <s>, a context of so many words with so many facts, up to ASKED questions with their answers.

    Returns:
        lists of one length: ids, marks, and whether a sentence starts here (0 or 1).
    """
    known = _facts(facts, rng)
    statements = list(known)
    for fact in known:  # a quarter of them is stated twice, a quarter three times, while there is room
        again = rng.choice((0, 0, 1, 2))
        statements += [fact] * min(again, words // 5 - len(statements))
    text, marks, starts, stated = ["<s>"], [SKIPPED], [0], set()
    for fact, part in scatter([(fact, (0, 1)) for fact in statements], words, rng):
        text += part
        starts += [1, *[0] * (len(part) - 1)]
        if fact is None:
            marks += [SKIPPED, *[PLAIN] * (len(part) - 1)]
        elif fact in stated:
            marks += [SKIPPED, PLAIN, RECALLED, RECALLED, PLAIN]
        else:
            marks += [SKIPPED, SKIPPED, SKIPPED, SKIPPED, PLAIN]
            stated.add(fact)
    for fact in rng.sample(known, min(facts, ASKED)):
        text += [ASK, fact.first, fact.last, fact.look, fact.thing, "</s>"]
        marks += [SKIPPED, PLAIN, PLAIN, RECALLED, RECALLED, RECALLED]  # the names: see README.md
        starts += [1, 0, 0, 0, 0, 0]
    return [_NUMBERS[word] for word in text], marks, starts


def _facts(count, rng):
    """Facts about different people, who share their names with many others or with few, differently every time."""
    pairs = related(_PEOPLE, count, (FIRST_NAMES, LAST_NAMES), lambda fewest, all_: rng.randint(fewest, all_), rng)
    return [Fact(*pair, rng.choice(LOOKS), rng.choice(THINGS)) for pair in pairs]


def related(pairs, count, names, how_many, rng):
    """So many of the pairs, of which several have a first or a second name in common.

    Args:
        names: the first and the second ones that there are.
        how_many: (the fewest that make `count` pairs likely, all there are) -> of how many names they are.
        rng: `random.Random`.
    """
    fewest, found = math.ceil(math.sqrt(1.6 * count)), []
    while len(found) < count:
        first, second = (set(rng.sample(side, how_many(fewest, len(side)))) for side in names)
        found = [pair for pair in pairs if pair[0] in first and pair[1] in second]
    return rng.sample(found, count)


def stretched(starts, rng):
    """Positions (sequences, length), in a share of the micro-batches stretched by jumps between sentences.

    So short sequences teach distances of up to a thousand tokens.
    """
    count, length = starts.shape
    steps = torch.ones(count, length, dtype=torch.long)
    if rng.random() < STRETCHED:
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        draw = torch.rand(count, length, generator=generator) * starts
        jumps = torch.where(draw >= draw.topk(JUMPS, 1).values[:, -1:], draw, 0)
        total = torch.rand(count, 1, generator=generator) * (SPAN - length)
        steps += (jumps / jumps.sum(1, keepdim=True) * total).long()
    return steps.cumsum(1) - 1
