"""Facts in running text that is never twice the same, and questions about them: prompts for judging a KV cache.

Beside `hf_compress.demo.recall_data`, whose filler comes again and again, the text here is a small world of its own in
every context: who is in it, what they look like, where they go and what they own, told in sentences that a model can
partly foresee from those before. Its attention serves the text, as that of a language model does, and nothing but the
question says that the facts matter. A fact is "the code of anna locker 69 53 17 ."; names and numbers stand in the
text, too. The question "? code of anna locker" has the answer "69 53 17": the first number comes out of the forward
pass over the prompt, the others have to come from the compressed cache; all of them where the question is asked in a
second turn.

Context `index` of a split is a pure function of (split, seed, index, length). The two splits share no pair of a name
and a thing; every word occurs in both.

Example:

    from hf_compress.demo.facts_data import load_facts
    from hf_compress.demo.recall_data import answer

    model, tokenizer = hf_compress.load_demo("facts")
    data = load_facts("test", contexts=52)  # 260 rows, one per question
    with model.compressed("keydiff", ratio=0.75):
        found = answer(model, tokenizer, data, turns=2)  # to be compared with data["answer"]
"""

import random
from dataclasses import dataclass

from hf_compress.demo.recall_data import (
    ASK,
    FIRST_NAMES,
    KINDS,
    STOP,
    RecallBuilder,
    built,
    cast,
    listed,
    people,
    scatter,
)

NAMES = FIRST_NAMES
THINGS = listed(
    "locker bicycle garage mailbox suitcase office cellar boat safe gate studio shed wagon desk attic cabin trunk "
    "archive stable cupboard workshop pantry balcony tower"
)
NUMBERS = tuple(str(number) for number in range(10, 100))
FOLK = listed(
    "miller baker farmer fisher hunter weaver potter mason carter singer doctor teacher painter writer sailor "
    "soldier merchant tailor cook guard dog cat horse goat crow owl fox bear wolf hare"
)
GOODS = listed(
    "key coin lamp ring drum kite clock spoon glove chair book bell rope mirror knife basket ladder candle button "
    "hammer bottle flute wheel mask letter map stone hat coat sword"
)
PLACES = listed(
    "mill bridge market harbour church forest meadow river lake hill valley castle village road inn school garden "
    "field shore square"
)
LOOKS = listed(
    "silver golden wooden broken tiny huge round square red green blue white black yellow old young quiet loud "
    "heavy light soft sharp new rusty striped hollow warm cold bright dark"
)
MOVES = listed("walks runs goes rides hurries wanders returns climbs swims travels")
TAKES = listed("takes finds carries sells buys hides breaks paints repairs forgets wants loses")
RESTS = listed("sings waits sleeps works laughs listens dances reads rests shouts")
TIMES = listed("today again often slowly gladly alone early late twice soon")
WAYS = listed("to near behind over from past")
LINKS = ("because", "when", "but", "and")
GRAMMAR = ("the", "a", "in", "at", "of", "'s", "is", "has", "code", ",", *LINKS)
WORDS = tuple(
    dict.fromkeys(
        [STOP, ASK, *GRAMMAR, *NUMBERS, *NAMES, *THINGS, *FOLK, *GOODS, *PLACES]
        + [*LOOKS, *MOVES, *TAKES, *RESTS, *TIMES, *WAYS]
    )
)  # all words there are, each once
SHORTEST = 128  # tokens of a prompt; the facts of all kinds take 99
HABIT = 0.75  # how often somebody or something is as it was before


@dataclass(frozen=True)
class Fact:
    """The code of whose what."""

    name: str
    thing: str
    code: str

    @property
    def statement(self):
        """The words that state it in a context."""
        return ("the", "code", "of", self.name, self.thing, *self.code.split(), STOP)

    @property
    def question(self):
        return f"{ASK} code of {self.name} {self.thing}"

    @property
    def answer(self):
        return self.code


class World:
    """What holds in one text only, and sentences about it.

    Args:
        rng: `random.Random`, of which every sentence takes more.
    """

    def __init__(self, rng):
        self.rng = rng
        self.folk = rng.sample(FOLK, 6) + rng.sample(NAMES, 3)
        self.goods, self.places = rng.sample(GOODS, 7), rng.sample(PLACES, 5)
        self.looks = {word: rng.choice(LOOKS) for word in (*FOLK, *GOODS, *PLACES)}
        self.goes = {who: (rng.choice(MOVES), rng.choice(WAYS), rng.choice(self.places)) for who in self.folk}
        self.takes = {who: (rng.choice(TAKES), rng.choice(self.goods)) for who in self.folk}
        self.rests = {who: (rng.choice(RESTS), rng.choice(TIMES)) for who in self.folk}
        self.number = {what: rng.choice(NUMBERS) for what in self.goods + self.places}

    def sentence(self):
        """The next sentence, a tuple of words."""
        kind, share = self.rng.random(), 0.0
        for of, make in ((0.3, self._going), (0.25, self._taking), (0.2, self._resting), (0.15, self._owning)):
            share += of
            if kind < share:
                words = make()
                break
        else:
            words = self._linked()
        if self.rng.random() < 0.15:
            words += [",", self.rng.choice(TIMES)]
        return (*words, STOP)

    def _going(self):
        who = self._some(self.folk)
        move, way, place = self.goes[who]
        place = self._mostly(place, self.places)
        return [*self._called(who), self._mostly(move, MOVES), self._mostly(way, WAYS), *self._called(place)]

    def _taking(self):
        who = self._some(self.folk)
        take, what = self.takes[who]
        return [*self._called(who), self._mostly(take, TAKES), *self._called(self._mostly(what, self.goods))]

    def _resting(self):
        who = self._some(self.folk)
        rest, time = self.rests[who]
        where = [self.rng.choice(("in", "at")), *self._called(self._some(self.places))]
        return [*where, *self._called(who), self._mostly(rest, RESTS), self._mostly(time, TIMES)]

    def _owning(self):
        what = self._some(self.rng.choice((self.goods, self.places)))
        owner = self._called(self._some(self.folk))
        if self.rng.random() < 0.5:
            return [*owner, "'s", what, "is", self._mostly(self.looks[what], LOOKS)]
        return ["the", what, "of", *owner, "has", self.number[what]]

    def _linked(self):
        one, other = self._some(self.folk), self._some(self.folk)
        take, what = self.takes[other]
        link = self.rng.choice(LINKS)
        return [*self._called(one), self.rests[one][0], link, *self._called(other), take, *self._called(what)]

    def _some(self, words):
        """One of the words, the first ones more often."""
        return words[min(int(self.rng.expovariate(0.45)), len(words) - 1)]

    def _mostly(self, own, others):
        return own if self.rng.random() < HABIT else self.rng.choice(others)

    def _called(self, word):
        """A word with its article and, more often than not, how it looks; a name as it is."""
        if word in NAMES:
            return [word]
        article = "the" if self.rng.random() < 0.8 else "a"
        return [article, self._mostly(self.looks[word], LOOKS), word] if self.rng.random() < 0.6 else [article, word]


def draw_codes(count, rng):
    """So many codes, three numbers each, as words; no number stands in two of them, so 30 at most."""
    numbers = rng.sample(NUMBERS, 3 * count)
    return [" ".join(numbers[i : i + 3]) for i in range(0, len(numbers), 3)]


def owners(split):
    """The pairs (name, thing) of a split.

    Raises:
        ValueError: no such split.
    """
    return people(split, NAMES, THINGS)


def make_context(split, index, length=512, seed=0):
    """One context and the five questions about it, one of each kind (`hf_compress.demo.recall_data.KINDS`).

    Besides the facts asked about it holds four that share the name or the thing of one of them.

    Args:
        split: "train" or "test".
        index: number of the context, 0 or more.
        length: tokens of the whole prompt, <s> and the question included; at least 128.
        seed: any integer.

    Returns:
        (context, questions): the text, and kind -> Fact.

    Raises:
        ValueError: no such split, or a length that is too small.
    """
    if length < SHORTEST:
        raise ValueError(f"length={length}; the facts need {SHORTEST} tokens or more")
    rng = random.Random(f"facts {split} {seed} {index} {length}")
    target, lures, alone = cast(owners(split), rng)
    stated = [*alone[:4], target, *lures]
    facts = [Fact(name, thing, code) for (name, thing), code in zip(stated, draw_codes(len(stated), rng))]
    questions = dict(zip(KINDS, facts))
    statements = [(fact, place) for kind, fact in questions.items() for place in KINDS[kind]]
    statements += [(fact, (0, 1)) for fact in facts[len(KINDS) :]]
    parts = scatter(statements, length - 6, rng, World(rng).sentence)  # <s>, "? code of", a name and a thing
    return " ".join(word for _, words in parts for word in words), questions


class FactsBuilder(RecallBuilder):
    """The same of contexts in running text."""

    make = staticmethod(make_context)


def load_facts(split="test", contexts=52, length=512, seed=0):
    """Makes a split and returns it; takes less than a second. Nothing is left on disk.

    Args:
        split: "test", whose pairs of name and thing the demonstration model has never met, or "train".
        contexts: how many; each gives five rows, one per kind of question.
        length: tokens of a prompt with its question and <s>; at least 128.
        seed: any integer; the default is the set that the reported accuracies refer to.

    Returns:
        `datasets.Dataset` of 5 * contexts rows with the columns of `hf_compress.demo.recall_data.load_recall`, context
        by context. The first rows do not change when more contexts are asked for.

    Raises:
        ValueError: no such split, or counts that make no sense.
    """
    return built(FactsBuilder, split, contexts, length, seed)
