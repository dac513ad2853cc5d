"""Training sequences of `hf_compress.demo.facts_data`: running text with facts in it, then questions with answers.

The text itself is learnt, too, at a small weight: so attention serves it as in a language model. The first number of a
code, by which the fact is found, weighs most; without that the second and third, which follow easily, hide it.
"""

import random

import torch
from model import vocabulary
from sequences import ASKED, TOKENS, related, size, stretched

from hf_compress.demo.facts_data import NAMES, THINGS, WORDS, Fact, World, draw_codes, owners
from hf_compress.demo.recall_data import scatter

STAGES = (  # until this share of the micro-batches: words of the longest context, most facts
    (0.10, 40, 4),
    (0.25, 80, 8),
    (0.45, 160, 12),
    (0.65, 256, 12),
    (1.00, 512, 12),
)
SKIPPED, FIRST, RECALLED, PLAIN = range(4)  # to the loss: the first number of a code, the others, all the text
WEIGHTS = {"first": (FIRST, 3.0), "recalled": (RECALLED, 1.0), "plain": (PLAIN, 0.15)}
STEPS, ANSWER = 2200, 4  # of training; tokens of an answer with its end
AGAIN = 0.25  # share of the facts that are stated twice
_OWNERS, _NUMBERS = owners("train"), vocabulary(WORDS)


def micro_batch(number, total, seed=0):
    """Micro-batch `number` of `total`: a pure function of its arguments.

    Returns:
        int64 tokens, positions and marks (SKIPPED, FIRST, RECALLED or PLAIN), (sequences, length) each.
    """
    rng = random.Random(f"tiny_facts {seed} {number}")
    words, most = size(STAGES, number / total, rng)
    facts = rng.randint(1, min(most, words // 9))
    length = 1 + words + 9 * min(facts, ASKED)
    rows = [_sequence(words, facts, rng) for _ in range(TOKENS // length)]
    tokens, marks, starts = (torch.tensor(part) for part in zip(*rows))
    return tokens, stretched(starts, rng), marks


def _sequence(words, facts, rng):
    """One sequence: <s>, a context of so many words with so many facts, up to ASKED questions with their answers.

    Returns:
        lists of one length: ids, marks, and whether a sentence starts here (0 or 1).
    """
    pairs = related(_OWNERS, facts, (NAMES, THINGS), lambda few, most: rng.choice((few, few + 1, few + 2, most)), rng)
    known = [Fact(*pair, code) for pair, code in zip(pairs, draw_codes(facts, rng))]
    statements = list(known)
    for fact in known:
        if rng.random() < AGAIN and len(statements) < words // 12:
            statements.append(fact)
    text, marks, starts, stated = ["<s>"], [SKIPPED], [0], set()
    for fact, part in scatter([(fact, (0, 1)) for fact in statements], words, rng, World(rng).sentence):
        text += part
        starts += [1, *[0] * (len(part) - 1)]
        if fact is None:
            marks += [PLAIN] * len(part)
        else:
            code = [FIRST, RECALLED, RECALLED] if fact in stated else [SKIPPED] * 3
            marks += [*[PLAIN] * 5, *code, PLAIN]
            stated.add(fact)
    for fact in rng.sample(known, min(facts, ASKED)):
        text += [*fact.question.split(), *fact.answer.split(), "</s>"]
        marks += [SKIPPED, *[PLAIN] * 4, FIRST, RECALLED, RECALLED, PLAIN]
        starts += [1, *[0] * 8]
    return [_NUMBERS[word] for word in text], marks, starts
