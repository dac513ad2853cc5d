"""Facts scattered in filler text, and questions about them: prompts for judging the compression of a KV cache.

A context is mostly filler: sixteen sentences that come again and again and that nobody asks about. Between them stand
facts, such as "anna stone silver key .", which gives the person "anna stone" the value "silver key". The question
"? anna stone" has the answer "silver key". The first word of an answer comes out of the forward pass over the prompt,
which saw everything; the second one has to come from the compressed cache, and so has every word of the answer where
the question is asked in a second turn.

Context `index` of a split is a pure function of (split, seed, index, length). The two splits share no person, that is
no pair of names; every name and every value occurs in both.

Example:

    from hf_compress.demo.recall_data import answer, load_recall

    model, tokenizer = hf_compress.load_demo("recall")
    data = load_recall("test", contexts=52)  # 260 rows, one per question
    with model.compressed("snapkv", ratio=0.9):
        found = answer(model, tokenizer, data)  # to be compared with data["answer"]
"""

import random
import tempfile
from dataclasses import dataclass

import datasets


def listed(words):
    """The words of a line, as a tuple."""
    return tuple(words.split())


FIRST_NAMES = listed(
    "anna mark lucy paul emma john rosa karl nina hugo vera ivan sara noah olga adam ruth leon mona felix clara "
    "simon irene oscar"
)
LAST_NAMES = listed(
    "stone hill brook wood field rivers marsh forest banks snow frost storm baker mason cooper fisher miller "
    "weaver potter turner archer hunter carter farmer"
)
LOOKS = listed(
    "silver golden wooden broken tiny huge round square red green blue white black yellow purple orange heavy "
    "light soft sharp new rusty striped hollow"
)
THINGS = listed(
    "key coin lamp ring drum kite clock spoon glove chair book bell rope mirror knife basket ladder candle button "
    "hammer bottle flute wheel mask"
)
FILLER = (
    "the wind moves over the quiet lake .",
    "a cloud drifts over the old town .",
    "the rain falls on the empty street .",
    "birds sing in the tall trees .",
    "the sun rises behind the far mountains .",
    "a dog sleeps in front of the house .",
    "the river runs slowly to the sea .",
    "children play in the warm grass .",
    "the train leaves the station on time .",
    "a boat waits at the end of the pier .",
    "leaves fall from the tall trees .",
    "the moon shines on the quiet town .",
    "people walk along the empty beach .",
    "the owner closes the shop at night .",
    "a cat looks out of the window .",
    "the road leads to the old mill .",
)
STOP, ASK = ".", "?"
WORDS = tuple(
    dict.fromkeys((STOP, ASK, *FIRST_NAMES, *LAST_NAMES, *LOOKS, *THINGS, *" ".join(FILLER).split()))
)  # all words there are, each once
SPLITS = ("train", "test")
KINDS = {  # of questions -> where in the context the fact stands, as shares of the filler before it
    "early": ((0, 1 / 3),),
    "middle": ((1 / 3, 2 / 3),),
    "late": ((2 / 3, 1),),
    "repeated": ((0, 1),) * 3,  # stated three times; all others once
    "similar": ((0, 1),),  # two other people share the first name, two the last name
}
SHORTEST = 96  # tokens of a prompt; the facts of all kinds take 59
_FILLER = tuple(tuple(sentence.split()) for sentence in FILLER)


@dataclass(frozen=True)
class Fact:
    """Who has what."""

    first: str
    last: str
    look: str
    thing: str

    @property
    def statement(self):
        """The words that state it in a context."""
        return (self.first, self.last, self.look, self.thing, STOP)

    @property
    def question(self):
        return f"{ASK} {self.first} {self.last}"

    @property
    def answer(self):
        return f"{self.look} {self.thing}"


def people(split, firsts=FIRST_NAMES, lasts=LAST_NAMES):
    """The pairs (first name, last name) of a split: three quarters of all are for training.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    pairs = [(i, j) for i in range(len(firsts)) for j in range(len(lasts))]
    return [(firsts[i], lasts[j]) for i, j in pairs if ((i + j) % 4 == 0) == (split == "test")]


def scatter(statements, words, rng, sentence=None):
    """Puts facts between sentences of filler.

    Args:
        statements: list of (fact, (low, high)): it stands where this share of the filler lies before it, 0..1. Its
            place among statements that come to lie between the same two sentences is random.
        words: length of the result. The first sentence of filler lacks its beginning where that makes it fit.
        rng: `random.Random`.
        sentence: gives the next sentence of filler, a tuple of words; by default one of FILLER.

    Returns:
        list of (fact or None, words of it): the parts in order, filler as None.
    """
    missing = words - sum(len(fact.statement) for fact, _ in statements)
    filler = []
    while missing > 0:
        filler.append(sentence() if sentence else rng.choice(_FILLER))
        missing -= len(filler[-1])
    if missing < 0:
        filler = [filler[-1][-missing:], *filler[:-1]]
    slots: list[list] = [[] for _ in range(len(filler) + 1)]
    for fact, (low, high) in rng.sample(statements, len(statements)):
        slots[int(rng.uniform(low, high) * len(filler) + 0.5)].append((fact, fact.statement))
    parts = list(slots[0])
    for sentence, slot in zip(filler, slots[1:]):
        parts += [(None, sentence), *slot]
    return parts


def cast(pairs, rng):
    """Who is in a context.

    Args:
        pairs: the pairs of names that there are, in any order; shuffled in place.
        rng: `random.Random`.

    Returns:
        (target, lures, alone): a pair; two that share its first name and two that share its second; pairs that share
            no name with anyone in this context.
    """
    rng.shuffle(pairs)
    target = pairs.pop()
    lures = [p for p in pairs if p[0] == target[0]][:2] + [p for p in pairs if p[1] == target[1]][:2]
    taken, alone = {name for pair in (target, *lures) for name in pair}, []
    for pair in pairs:
        if not taken.intersection(pair):
            alone.append(pair)
            taken.update(pair)
    return target, lures, alone


def make_context(split, index, length=512, seed=0):
    """One context and the five questions about it, one of each kind.

    Besides the facts asked about and the four similar ones it holds others, stated once and not asked about, so that
    there is a statement for every 32 tokens, but no more than 20 and no less than 11 of them.

    Args:
        split: "train" or "test".
        index: number of the context, 0 or more.
        length: tokens of the whole prompt, <s> and the question included; at least 96.
        seed: any integer.

    Returns:
        (context, questions): the text, and kind -> Fact.

    Raises:
        ValueError: no such split, or a length that is too small.
    """
    if length < SHORTEST:
        raise ValueError(f"length={length}; the facts need {SHORTEST} tokens or more")
    rng = random.Random(f"{split} {seed} {index} {length}")
    target, lures, alone = cast(people(split), rng)
    looks = rng.sample(LOOKS, 5)  # the similar people differ in both words of their values
    things = rng.sample(THINGS, 5)
    similar, *others = (Fact(a, b, look, thing) for (a, b), look, thing in zip((target, *lures), looks, things))
    single = [Fact(a, b, rng.choice(LOOKS), rng.choice(THINGS)) for a, b in alone]
    questions = dict(zip(KINDS, (*single[:4], similar)))
    statements = [(fact, place) for kind, fact in questions.items() for place in KINDS[kind]]
    others += single[4 : 4 + max(0, min(20, length // 32) - len(statements) - len(others))]
    statements += [(fact, (0, 1)) for fact in others]
    parts = scatter(statements, length - 4, rng)  # <s>, "?" and two names
    return " ".join(word for _, words in parts for word in words), questions


def prompt(context, question):
    """The text of a prompt that has its question inside."""
    return f"{context} {question}"


def answer(model, tokenizer, dataset, batch_size=15, turns=1):
    """Answers one question per row with `model.generate`, greedily; the model may be compressed or not.

    Args:
        model, tokenizer: as `hf_compress.load_demo("recall")` or `load_demo("facts")` returns them.
        dataset: rows of `load_recall` or of `hf_compress.demo.facts_data.load_facts`.
        batch_size: rows per call.
        turns: 1 asks inside the prompt, so that a method knows what is asked (query-aware). 2 lets the model read the
            context, which compresses the cache, and asks in a second turn on that cache (query-agnostic).

    Returns:
        the answers, in the order of the rows, stripped.

    Raises:
        ValueError: neither one turn nor two.
    """
    from hf_compress.evaluate.prompts import PROTOCOLS, encode_rows, reply

    if turns not in (1, 2):
        raise ValueError(f"turns={turns}; choose 1 (the question inside the prompt) or 2 (in a second turn)")
    found = []
    for start in range(0, len(dataset), batch_size):
        rows = dataset[start : start + batch_size]
        numbers = list(range(start, start + len(rows["question"])))
        batch = encode_rows(tokenizer, numbers, rows["question"], rows["context"], PROTOCOLS[turns - 1])
        found += [said["answer"] for said in reply(model, tokenizer, batch)]
    return found


FEATURES = datasets.Features(
    {
        "context": datasets.Value("string"),
        "question": datasets.Value("string"),  # "? anna stone"
        "answer": datasets.Value("string"),  # "silver key"
        "kind": datasets.Value("string"),  # one of KINDS
        "context_id": datasets.Value("int32"),  # number of the context in its split
    }
)


@dataclass
class RecallConfig(datasets.BuilderConfig):
    """How much to make.

    Args:
        contexts: per split; five questions each.
        length: tokens of a prompt.
        seed: any integer.
        splits: which splits to make.
    """

    contexts: int = 52
    length: int = 512
    seed: int = 0
    splits: tuple = SPLITS


class RecallBuilder(datasets.GeneratorBasedBuilder):
    """One row per question; rows of one context follow each other and repeat it.

    Attributes:
        make: (split, index, length, seed) -> a context, and kind -> the fact that is asked for.
    """

    make = staticmethod(make_context)
    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = RecallConfig
    BUILDER_CONFIGS = [RecallConfig(name="default", version=VERSION)]

    def _info(self):
        return datasets.DatasetInfo(description=__doc__, features=FEATURES)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(split, gen_kwargs={"split": split}) for split in self.config.splits]

    def _generate_examples(self, split):
        for index in range(self.config.contexts):
            context, questions = self.make(split, index, self.config.length, self.config.seed)
            for kind, fact in questions.items():
                row = {"context": context, "question": fact.question, "answer": fact.answer, "kind": kind}
                yield (index, kind), row | {"context_id": index}


def load_recall(split="test", contexts=52, length=512, seed=0):
    """Makes a split and returns it; takes less than a second. Nothing is left on disk.

    Args:
        split: "test", whose people the demonstration model has never met, or "train".
        contexts: how many; each gives five rows, one per kind of question.
        length: tokens of a prompt with its question and <s>; at least 96.
        seed: any integer; the default is the set that the reported accuracies refer to.

    Returns:
        `datasets.Dataset` of 5 * contexts rows with FEATURES, context by context. The first rows do not change when
        more contexts are asked for.

    Raises:
        ValueError: no such split, or counts that make no sense.
    """
    return built(RecallBuilder, split, contexts, length, seed)


def built(builder_type, split, contexts, length, seed):
    """What a `RecallBuilder` or one of its kind makes, in memory; see `load_recall`.

    Raises:
        ValueError: no such split, or counts that make no sense.
    """
    if contexts < 1:
        raise ValueError(f"contexts={contexts}; choose 1 or more")
    builder_type.make(split, 0, length, seed)  # a wrong argument is reported here as itself, not wrapped by the builder
    quiet = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            builder = builder_type(cache_dir=folder, contexts=contexts, length=length, seed=seed, splits=(split,))
            builder.download_and_prepare()
            return builder.as_dataset(split, in_memory=True)
    finally:
        if quiet:
            datasets.enable_progress_bars()
