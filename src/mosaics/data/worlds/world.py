"""Synthetic worlds: English-like text whose knowledge lies in the corpus, in the document, or in the prompt."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mosaics.data.worlds.vocabulary import (
    ADJECTIVES,
    ADVERBS,
    ATTRIBUTES,
    FILLERS,
    FIRST_NAMES,
    KEYS,
    LABELS,
    NAME_WORDS,
    NOUNS,
    PLAIN_WORDS,
    SECOND_NAMES,
    VALUES,
    VERBS,
    WORD_IDS,
)

TASKS = ("persistent-knowledge", "new-knowledge", "in-context-learning", "recall")
MIXED = "mixed"
SPLITS = ("train", "test")
CLASSES, CLASS_WORDS, EXAMPLE_WORDS, NOISE, MOST_TRAINING_SHOTS = 8, 12, 8, 0.4, 3
_KNOWN_NAMES, _ASKED_SHARE, _MOST_NAMES, _ATTRIBUTES_ASKED = 32, 0.75, 4000, 3

_STATEMENTS = (
    "the {attribute} of {first} {second} is {value} .",
    "for {first} {second} the {attribute} is {value} .",
)
# They end as the statements do; where a question ended in another word, a small model took several times as long to
# find what they have in common.
_QUESTIONS = (
    "so the {attribute} of {first} {second} is",
    "so for {first} {second} the {attribute} is",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question of an episode, in words.

    Attributes:
        prompt: the words up to where the answer belongs.
        answer: the answer, one word.
        choices: the words that can be answers.
        end: the words after the answer, before the next question.
        fact: the place in the episode's context of the word to be given back; None where the context has none.
        difficulty: see `World.episode`.
    """

    prompt: tuple[str, ...]
    answer: str
    choices: tuple[str, ...]
    end: tuple[str, ...]
    fact: int | None
    difficulty: float


@dataclass(frozen=True, slots=True)
class WorldExample:
    """One question asked alone after its context; the context is shared by the questions of an episode.

    Attributes:
        id: stable name: task, split, seeds, number and settings.
        context: text before the question; may be empty.
        question: text up to where the answer belongs.
        answer: the answer, one word.
        choices: the words that can be answers.
        distance: tokens from the (last) place of the answer in the context to where it is asked; None where the
            context does not hold it.
        shots: examples of every class in the context; None for other tasks.
        difficulty: see `World.episode`.
    """

    id: str
    context: str
    question: str
    answer: str
    choices: tuple[str, ...]
    distance: int | None
    shots: int | None
    difficulty: float

    @property
    def prompt(self) -> str:
        """Context and question."""
        return f"{self.context} {self.question}".lstrip()

    @property
    def prompt_ids(self) -> list[int]:
        """Begin-of-text and the prompt as ids of `world_tokenizer`."""
        return [0, *(WORD_IDS[word] for word in self.prompt.split())]

    @property
    def answer_id(self) -> int:
        """The answer as an id of `world_tokenizer`."""
        return WORD_IDS[self.answer]


@dataclass(frozen=True, slots=True)
class Episode:
    """A context and questions about it: a document of its own.

    Attributes:
        id: stable name.
        context: words that are stated before the questions.
        questions: in order. Read one after the other, no question repeats what an earlier one asked (but for
            in-context learning, where an answered question is a further example).
        shots: examples of every class in the context; None for other tasks.
    """

    id: str
    context: tuple[str, ...]
    questions: tuple[Question, ...]
    shots: int | None

    def words(self) -> list[str]:
        """Context, then every question with its answer."""
        asked = (word for q in self.questions for word in (*q.prompt, q.answer, *q.end))
        return [*self.context, *asked]

    def answer_places(self) -> list[int]:
        """Where in `words` the answers are."""
        places, place = [], len(self.context)
        for question in self.questions:
            place += len(question.prompt)
            places.append(place)
            place += 1 + len(question.end)
        return places

    def text(self) -> str:
        """`words` with a space between them."""
        return " ".join(self.words())

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Begin-of-text and `words` as ids of `world_tokenizer`, int64 (tokens,), and where answers are, bool."""
        ids = np.array([0, *(WORD_IDS[word] for word in self.words())], dtype=np.int64)
        answers = np.zeros(len(ids), dtype=bool)
        answers[np.asarray(self.answer_places(), dtype=np.int64) + 1] = True
        return ids, answers

    def examples(self) -> Iterator[WorldExample]:
        """Every question alone after the context."""
        context = " ".join(self.context)
        for number, q in enumerate(self.questions):
            distance = None if q.fact is None else len(self.context) + len(q.prompt) - q.fact
            yield WorldExample(
                f"{self.id}/{number}", context, " ".join(q.prompt), q.answer, q.choices, distance, self.shots,
                q.difficulty,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Classes:
    """What an episode of in-context-learning is made of, as `World.episode` says."""

    shots: int | None = None
    most_shots: int = MOST_TRAINING_SHOTS
    noise: float = NOISE
    classes: int = CLASSES
    meaning: bool = False
    words: int = EXAMPLE_WORDS


class World:
    """One world: which names exist where, and which facts hold everywhere, drawn from a seed.

    Every made-up name and every pair of words that a class begins with belongs to one split, half of them to each, so
    that no name and no class of the test split occurs in training. Single words occur in both, and so do the pairs of
    recall, which are drawn freely: a key then says nothing of its value, and half-learnt models are not worse than
    chance. The test split has other episodes.

    Args:
        seed: of everything.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, seed: int = 0) -> None:
        _check(seed >= 0, f"the world's seed {seed} is negative; choose 0 or more")
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        self._names = rng.integers(0, 2, (NAME_WORDS, NAME_WORDS))
        self._classes = rng.integers(0, 2, (len(PLAIN_WORDS), len(PLAIN_WORDS)))
        known = rng.choice(NAME_WORDS**2, _KNOWN_NAMES, replace=False)
        self._names.flat[known] = -1
        self._known = [
            (divmod(int(name), NAME_WORDS), attribute, str(rng.choice(values)), bool(rng.random() < _ASKED_SHARE))
            for name in known
            for attribute, values in ATTRIBUTES.items()
        ]
        meanings = np.random.default_rng([seed, 2]).permutation(len(PLAIN_WORDS))
        self._meanings = meanings[: len(LABELS) * CLASS_WORDS // 2].reshape(len(LABELS), -1)  # no word of two labels

    def episode(
        self,
        task: str,
        number: int,
        length: int | None = None,
        *,
        split: str = "train",
        stream: int = 0,
        facts: int | None = None,
        questions: int | None = None,
        shots: int | None = None,
        noise: float | None = None,
        classes: int | None = None,
        meaning: bool = False,
        most_shots: int | None = None,
        words: int | None = None,
    ) -> Episode:
        """Episode `number` of an endless stream; it depends on the arguments and the world's seed alone.

        - `persistent-knowledge`: facts of the world are stated, and others of them asked. A quarter of them is never
          asked in training (difficulty 1 in the test split, the others 0).
        - `new-knowledge`: facts about made-up people, of 3 of the attributes, are stated, and asked in the same or in
          another order of words. Difficulty: how many other facts of the context are about the same person or the same
          attribute.
        - `in-context-learning`: words are shown with a label. An example has 8 words, each of them from the 12 words of
          its class or, by chance, any word (difficulty: this chance). What the classes are, and which label belongs to
          which, is drawn for each episode; with `meaning`, half of the words of a label's class are always the same.
        - `recall`: keys with their values, then keys alone. Each key is stored once and asked once at most, keys and
          values occur nowhere else. Difficulty: the number of pairs.
        - `mixed`: one of the four.

        Args:
            task: one of `TASKS`, or `mixed`.
            number: 0 or more.
            length: tokens, begin-of-text included; by default 256. Other sentences (for recall, words) fill it up, at
                random places before the questions. Not with `shots`, which decide on the length.
            split: `train` or `test`.
            stream: seed of this stream of episodes.
            facts: how many are stated. By default one in 16 tokens (at most 128 persistent ones; for recall one in 8,
                at most 90), in training a random number from half of that on.
            questions: how many are asked. By default as many as fit and facts there are; with `shots`, 8.
            shots: examples of every class before the questions. By default the episode is a row of examples, each a
                question itself; in training there are `most_shots` times as many as classes at most.
            noise: the chance that a word of an example is any word; by default 0.4.
            classes: how many there are, by default 8, at most 16.
            meaning: whether labels mean something that training can teach.
            most_shots: see `shots`; by default 3.
            words: of an example, by default 8.

        Raises:
            ValueError: an unknown task or split, or numbers that are out of range or do not fit into the length.
        """
        _check(task in (*TASKS, MIXED), f"there is no task {task!r} in a world; choose from {', '.join(TASKS)}, mixed")
        _check(split in SPLITS, f"split is {split!r}; choose train or test")
        _check(number >= 0 and stream >= 0, f"episode {number} of stream {stream}: both must be 0 or more")
        numbers = {"facts": facts, "questions": questions, "shots": shots, "most_shots": most_shots, "words": words}
        for name, value in numbers.items():
            _check(value is None or value >= 0, f"{name} is {value}; give 0 or more")
        labelled = task == "in-context-learning"
        own = {"noise": noise, "classes": classes, "meaning": meaning or None}
        own |= {name: numbers[name] for name in ("shots", "most_shots", "words")}
        for option, value in own.items():
            _check(labelled or value is None, f"{task} has no {option}; leave it out")
        _check(not labelled or facts is None, "in-context-learning has no facts; leave them out")
        of = _Classes(**{option: value for option, value in own.items() if value is not None})
        _check(2 <= of.classes <= len(LABELS), f"{of.classes} classes are not possible; choose from 2 to {len(LABELS)}")
        _check(shots is None or length is None, "shots decide on the length; give one of the two")
        _check(of.words > 0, "an example has no words; give words as 1 or more")
        _check(0 <= of.noise <= 1, f"noise is {of.noise}; choose from 0 to 1")
        length = 256 if length is None else length
        _check(length >= 32, f"an episode of {length} tokens is too short; choose 32 or more")
        name = f"{task}/{split}/{self.seed}-{stream}-{number}"
        rng = np.random.default_rng([self.seed, 1, (*TASKS, MIXED).index(task), SPLITS.index(split), stream, number])
        if task == MIXED:
            task = str(rng.choice(TASKS))
            labelled = task == "in-context-learning"
        if labelled:
            return self._classification(rng, name, split, length, questions, of)
        if facts is None:
            facts = {"recall": min(length // 8, 90), "new-knowledge": length // 16}.get(task, min(length // 16, 128))
            if split == "train":
                facts = int(rng.integers((facts + 1) // 2, facts + 1))
        draw = {"persistent-knowledge": self._persistent, "new-knowledge": self._new, "recall": self._recall}[task]
        return _assemble(rng, f"{name}/{length}-{facts}", length, questions, *draw(rng, split, facts), task == "recall")

    def examples(self, task: str, count: int, length: int | None = None, **settings) -> Iterator[WorldExample]:
        """The first `count` questions of the test split, each asked alone; `settings` are those of `episode`."""
        settings = {"split": "test", **settings}
        number = 0
        while count > 0:
            for example in list(self.episode(task, number, length, **settings).examples())[:count]:
                count -= 1
                yield example
            number += 1

    def _persistent(self, rng: np.random.Generator, split: str, facts: int):
        """Statements and questions as `_assemble` takes them; so do the two below."""
        _check(facts <= len(self._known) // 2, f"{facts} persistent facts can't be stated in one episode; at most 128")
        order = rng.permutation(len(self._known))
        stated = [self._known[index] for index in order[:facts]]
        asked = [self._known[index] for index in order[facts:]]
        statements = [_say(rng, _STATEMENTS, *fact[:3]) for fact in stated]
        questions = [
            (None, _say(rng, _QUESTIONS, *fact[:3]), fact[2], ATTRIBUTES[fact[1]], float(not fact[3]))
            for fact in asked
            if fact[3] or split == "test"
        ]
        return statements, questions

    def _new(self, rng: np.random.Generator, split: str, facts: int):
        names = self._draw_names(rng, split, min(-(-facts // 2), _MOST_NAMES))
        attributes = rng.choice(list(ATTRIBUTES), _ATTRIBUTES_ASKED, replace=False).tolist()
        most = len(names) * len(attributes)
        _check(facts <= most, f"{facts} new facts are more than an episode can have; state fewer")
        drawn = [divmod(int(index), len(attributes)) for index in rng.choice(most, facts, replace=False)]
        people = np.bincount([person for person, _ in drawn], minlength=1)
        topics = np.bincount([topic for _, topic in drawn], minlength=1)
        statements, questions = [], []
        for number, (person, topic) in enumerate(drawn):
            name, attribute = names[person], attributes[topic]
            values = ATTRIBUTES[attribute]
            value = values[rng.integers(len(values))]
            statements.append(_say(rng, _STATEMENTS, name, attribute, value))
            competing = float(people[person] + topics[topic] - 2)
            questions.append((number, _say(rng, _QUESTIONS, name, attribute, value), value, values, competing))
        return statements, [questions[index] for index in rng.permutation(facts)]

    def _recall(self, rng: np.random.Generator, split: str, facts: int):
        _check(facts <= len(KEYS), f"{facts} pairs are more than the {len(KEYS)} keys; store fewer")
        keys = rng.choice(len(KEYS), facts, replace=False)
        statements, questions = [], []
        for number, key in enumerate(keys):
            value = VALUES[rng.integers(len(VALUES))]
            statements.append([KEYS[key], value])
            questions.append((number, [KEYS[key]], value, VALUES, float(facts)))
        return statements, [questions[index] for index in rng.permutation(facts)]

    def _classification(
        self, rng: np.random.Generator, name: str, split: str, length: int, questions: int | None, of: _Classes
    ) -> Episode:
        labels = rng.choice(LABELS, of.classes, replace=False).tolist()
        firsts = rng.permutation(len(PLAIN_WORDS))[: of.classes]
        words = []
        for label, first in zip(labels, firsts, strict=True):
            seconds = np.flatnonzero(self._classes[first] == SPLITS.index(split))
            others = rng.choice(len(PLAIN_WORDS), CLASS_WORDS - 2, replace=False)
            if of.meaning:
                others[: CLASS_WORDS // 2] = self._meanings[LABELS.index(label)]
            words.append(np.array([first, rng.choice(seconds), *others]))
        choices = tuple(sorted(labels))

        def example(label: int) -> list[str]:
            own = words[label][rng.integers(0, CLASS_WORDS, of.words)]
            drawn = np.where(rng.random(of.words) < of.noise, rng.integers(0, len(PLAIN_WORDS), of.words), own)
            return [*(PLAIN_WORDS[index] for index in drawn), "means"]

        each = of.words + 3
        context: list[str] = []
        last: dict[str, int] = {}
        if of.shots is not None:
            for label in rng.permuted(np.tile(np.arange(of.classes), (of.shots, 1)), axis=1).flat:
                context += example(label)
                last[labels[label]] = len(context)
                context += [labels[label], "."]
            asked = rng.integers(0, of.classes, 8 if questions is None else questions).tolist()
        else:
            fit = (length - 1) // each
            most = min(fit, of.classes * of.most_shots) if split == "train" else fit
            wanted = most if questions is None else questions
            _check(
                wanted <= most, f"{wanted} questions are more than the {most} that an episode of {length} tokens has"
            )
            context += (word for sentence in _sentences(rng, length - 1 - wanted * each) for word in sentence)
            asked = [int(rng.integers(of.classes)) for _ in range(wanted)]
        made = tuple(
            Question(tuple(example(label)), labels[label], choices, (".",), last.get(labels[label]), of.noise)
            for label in asked
        )
        unusual = (f"-{of.classes}" if of.classes != CLASSES else "") + ("-meaning" if of.meaning else "")
        unusual += f"-most-{of.most_shots}" if of.most_shots != MOST_TRAINING_SHOTS else ""
        unusual += f"-{of.words}-words" if of.words != EXAMPLE_WORDS else ""
        name = f"{name}/{length if of.shots is None else of.shots}-{of.noise}{unusual}"
        return Episode(name, tuple(context), made, of.shots)

    def _draw_names(self, rng: np.random.Generator, split: str, count: int) -> list[tuple[int, int]]:
        """Names of a split, from few first and few second words, so that one of the two is not enough to tell them."""
        side = self._names == SPLITS.index(split)
        firsts, seconds = rng.permutation(NAME_WORDS), rng.permutation(NAME_WORDS)
        size = min(NAME_WORDS, max(2, int((2 * count) ** 0.5)))
        while True:
            rows, columns = np.nonzero(side[np.ix_(firsts[:size], seconds[:size])])
            if len(rows) >= count:
                break
            size += 1
        chosen = rng.choice(len(rows), count, replace=False)
        return [(int(firsts[rows[index]]), int(seconds[columns[index]])) for index in chosen]


def _say(rng: np.random.Generator, wordings: tuple[str, ...], name: tuple[int, int], attribute: str, value: str):
    wording = wordings[rng.integers(len(wordings))]
    first, second = FIRST_NAMES[name[0]], SECOND_NAMES[name[1]]
    return wording.format(attribute=attribute, first=first, second=second, value=value).split()


def _assemble(rng, name, length, wanted, statements, questions, bare) -> Episode:
    """Statements, what fills the length between them, and as many questions as fit; `bare`: words, not sentences.

    Args:
        statements: lists of words; the value is the last one, but for the full stop.
        questions: (number of the statement or None, words, answer, choices, difficulty), in the order of asking.
    """
    end = () if bare else (".",)
    room = length - 1 - sum(map(len, statements))
    asked = []
    for question in questions[:wanted]:
        size = len(question[1]) + 1 + len(end)
        if size > room:
            break
        room -= size
        asked.append(question)
    _check(
        room >= 0 and (wanted is None or len(asked) == wanted),
        f"{len(statements)} facts and {'the' if wanted is None else wanted} questions do not fit into {length} tokens; "
        "choose a greater length or fewer",
    )
    fillers = (
        [[FILLERS[index]] for index in rng.integers(0, len(FILLERS), room)] if bare else list(_sentences(rng, room))
    )
    pieces = statements + fillers
    context: list[str] = []
    places = {}
    for index in rng.permutation(len(pieces)):
        context += pieces[index]
        places[int(index)] = len(context) - 1 - len(end)
    made = tuple(
        Question(tuple(words), answer, choices, end, None if fact is None else places[fact], difficulty)
        for fact, words, answer, choices, difficulty in asked
    )
    return Episode(name, tuple(context), made, None)


def _sentences(rng: np.random.Generator, room: int) -> Iterator[list[str]]:
    """Sentences about nothing, of `room` words in all."""
    while room > 0:
        size = min(room, int(rng.integers(4, 11)))
        if 0 < room - size < 4:  # too little for another sentence
            size = room if room <= 10 else room - 4
        room -= size
        draws = rng.random(8)
        noun, near, verb, adverb, *adjectives = (
            words[int(draw * len(words))]
            for words, draw in zip([NOUNS, NOUNS, VERBS, ADVERBS, *[ADJECTIVES] * 4], draws, strict=True)
        )
        words = {
            1: [],
            2: [adverb],
            3: ["someone", verb],
            4: ["the", noun, verb],
            5: ["the", noun, verb, adverb],
            6: ["the", adjectives[0], noun, verb, adverb],
        }.get(size)
        if words is None:
            kinds = adjectives[: size - 7]
            words = ["the", *kinds[:1], noun, verb, "near", "the", *kinds[1:], near]
        yield [*words, "."]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
