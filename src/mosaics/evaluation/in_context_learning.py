"""In-context learning: many-shot classification, with labels that mean something and with labels that do not.

One shot is one example of every class. All demonstrations come before the query, and are the same for all queries, so
that they are encoded once.
"""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from mosaics.data.worlds.baselines import naive_bayes
from mosaics.evaluation.example import Example, Prompts, Record
from mosaics.evaluation.files import fields, known_form, read_csv, read_json, read_text, texts
from mosaics.evaluation.results import Suite, accuracy_row, curve, grouped, mean

_FORMAT = "The predict answer must come from the demonstration examples with the exact format."
_FOLLOW = "The examples are as follows:"
STRATEGIES = ("newline", "newline-shuffled", "space", "space-shuffled")
LABELS = ("semantic", "anonymous")


@dataclass(frozen=True)
class Task:
    """How a classification task is put into words (Appendix I of the paper).

    Attributes:
        instruction: what comes before the demonstrations.
        head: what comes before a text.
        tail: what comes before its label; a relation's is part of the text.
    """

    instruction: str
    head: str
    tail: str


_RELATION = Task(
    "Given a sentence and a pair of subject and object entities within the sentence, please predict the relation "
    f"between the given entities. {_FORMAT} {_FOLLOW}",
    "sentence:",
    "is:",
)
TASKS = {
    "banking77": Task(
        f"Given a customer service query, please predict the intent of the query. {_FORMAT} {_FOLLOW}",
        "service query:",
        "intent category:",
    ),
    "goemotions": Task(
        f"Given a comment, please predict the emotion category of this comment. {_FORMAT} {_FOLLOW}",
        "comment:",
        "emotion category:",
    ),
    "fewrel": _RELATION,
    "tacred": _RELATION,
    "babi": Task(
        f"Given a story and a question about it, please predict the answer. {_FORMAT} {_FOLLOW}", "story:", "answer:"
    ),
    "synthetic": Task(
        f"Given a text of made-up words, please predict its class. {_FORMAT} {_FOLLOW}", "text:", "class:"
    ),
}


@dataclass(frozen=True)
class Item:
    """A text, what stands between it and its label beside the separator (for relations), and the label."""

    text: str
    label: str
    between: str = ""


class InContextLearning(Suite):
    """Many-shot classification (the paper's Figures 3, 4, 13 and 14).

    The answer is the label with the greatest likelihood, followed by the beginning of what comes next in the
    demonstrations: so every answer is a class, chance is known, a model is not punished for going on writing, and it
    works for models too small to follow an instruction. `scoring="generation"` is the published way instead: the model
    writes, and what it writes up to the separator must be the label exactly. Beside the model's answers stands what
    counting words in the same demonstrations reaches (`CountedWords`).

    Attributes:
        data: files: `banking77_train`, `banking77_test` (CSV with text, category); `goemotions_train`,
            `goemotions_test`, `goemotions_labels` (TSV with text, label numbers, id; texts with several labels are left
            out); `fewrel` (JSON by relation; a fifth of each relation's instances are asked), perhaps `fewrel_names`;
            `tacred_train`, `tacred_test` (its JSON, for those who have its licence); `babi_train`, `babi_test` (of one
            task; the answers are the classes).
        tasks: `banking77`, `goemotions`, `fewrel`, `tacred`, `babi`, `synthetic`; by default all for which there is
            data, or `synthetic` if there is none.
        shots: numbers of shots, each one example of every class.
        labels: `semantic`, `anonymous` (`class_00`, `class_01`, ..., dealt out by the seed).
        strategies: separators (newline, space), and whether the classes are shuffled within each shot.
        samples: queries, the same for all shots, labels and strategies.
        scoring: `likelihood` or `generation`.
        classes: of the synthetic task.
        noise: share of words that tell nothing, in the synthetic task.
        seed: of every draw.
    """

    data: dict[str, str] = Field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    labels: tuple[Literal["semantic", "anonymous"], ...] = LABELS
    strategies: tuple[Literal["newline", "newline-shuffled", "space", "space-shuffled"], ...] = STRATEGIES
    samples: int = Field(100, ge=1)
    scoring: Literal["likelihood", "generation"] = "likelihood"
    classes: int = Field(8, ge=2, le=100)
    noise: float = Field(0.5, ge=0, lt=1)
    seed: int = 0

    name: ClassVar[str] = "in-context-learning"

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for task in tasks or ():
            if task not in TASKS:
                raise ValueError(f"there is no task {task}; choose from {', '.join(TASKS)}")
        return tasks

    @field_validator("data")
    @classmethod
    def _known_data(cls, data: dict[str, str]) -> dict[str, str]:
        known = [name for names, _ in READERS.values() for name in names]
        for key in data:
            if key not in (*known, "fewrel_names"):
                raise ValueError(f"{key} is no data set of this suite; it takes {', '.join(known)}, fewrel_names")
        return data

    def sources(self) -> list[str]:
        return list(self.data.values())

    def _chosen(self) -> list[str]:
        if self.tasks is not None:
            return list(self.tasks)
        return [task for task, (names, _) in READERS.items() if set(names) <= self.data.keys()] or ["synthetic"]

    def examples(self, scorer) -> Prompts:
        chosen = self._chosen()
        for task in chosen:
            for name in READERS.get(task, ((), None))[0]:
                if name not in self.data:
                    raise ValueError(f"the task {task} needs --data {name}=PATH")
        if min(self.shots) < 1:
            raise ValueError(f"shots is {min(self.shots)}; choose 1 or more")
        count = len(chosen) * len(self.labels) * len(self.strategies) * len(self.shots) * self.samples
        return Prompts(count, lambda: self._prompts(chosen))

    def _prompts(self, chosen: list[str]) -> Iterator[Example]:
        for task in chosen:
            train, test = self._items(task)
            for labels in self.labels:
                names = self._names(task, labels, train)
                for strategy in self.strategies:
                    for shots in self.shots:
                        yield from self._asked(task, labels, names, strategy, shots, train, test)

    def _items(self, task: str) -> tuple[dict[str, list[Item]], list[Item]]:
        """Demonstrations of each class in a drawn order, and the queries."""
        draw = random.Random(f"{task}/{self.seed}")
        if task == "synthetic":
            train, test = synthetic(draw, self.classes, max(self.shots), self.samples, self.noise)
        else:
            names, read = READERS[task]
            with known_form(*(self.data[name] for name in names)):
                train, test = read(self.data, draw)
                for item in (*train, *test):
                    texts(item.text, item.label)
        by_class: dict[str, list[Item]] = defaultdict(list)
        for item in train:
            by_class[item.label].append(item)
        by_class = {label: draw.sample(items, len(items)) for label, items in sorted(by_class.items())}
        for label, items in by_class.items():
            if len(items) < max(self.shots):
                raise ValueError(
                    f"class {label!r} of {task} has {len(items)} demonstrations and {max(self.shots)} shots need as "
                    "many; ask for fewer --shots"
                )
        test = [item for item in test if item.label in by_class]
        return by_class, draw.sample(test, min(self.samples, len(test)))

    def _names(self, task: str, labels: str, train: dict[str, list[Item]]) -> dict[str, str]:
        """What each class is called."""
        if labels == "semantic":
            return {label: label for label in train}
        numbers = random.Random(f"names/{task}/{self.seed}").sample(range(len(train)), len(train))
        return {label: f"class_{number:02d}" for label, number in zip(train, numbers, strict=True)}

    def _asked(self, task, labels, names, strategy, shots, train, test) -> Iterator[Example]:
        words, separator = TASKS[task], " " if strategy.startswith("space") else "\n"
        shuffled = strategy.endswith("shuffled")
        parts = [words.instruction]
        for shot in range(shots):
            order = list(train)
            if shuffled:
                random.Random(f"order/{task}/{self.seed}/{shot}").shuffle(order)
            for label in order:
                parts.append(f"{_query(words, train[label][shot], separator)} {names[label]}")
        choices = [f" {name}" for name in sorted(names.values())]
        ending = separator + words.head.split()[0]
        # The separator belongs to the query: a space at the end would be a token that the demonstrations do not have.
        prefix = separator.join(parts)
        counted = CountedWords({label: [item.text for item in items[:shots]] for label, items in train.items()})
        for number, item in enumerate(test):
            meta = {"task": task, "labels": labels, "strategy": strategy, "shots": shots, "classes": len(names)}
            meta |= {name: label == item.label for name, label in counted.answers(item.text).items()}
            yield Example(
                f"{task}/{labels}/{strategy}/{shots}/{number}",
                separator + _query(words, item, separator),
                [names[item.label]],
                choices=choices,
                prefix=prefix,
                ending=ending,
                meta=meta,
            )

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        if self.scoring == "likelihood":
            said = [choice.strip() for choice in scorer.best(examples)]
        else:
            said = []
            for example in examples:
                room = 2 + max(len(scorer.encode(choice, begin=False)) for choice in example.choices)
                head = TASKS[example.meta["task"]].head
                stop = ["\n", head] if example.meta["strategy"].startswith("newline") else [" " + head, "\n"]
                said.append(scorer.complete([example], room, stop)[0].strip())
        return [
            Record.of(example, text, text == example.references[0])
            for example, text in zip(examples, said, strict=True)
        ]

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        rows, best, curves = [], [], []
        for (task, labels, shots), group in grouped(records, "task", "labels", "shots").items():
            head = {"task": task, "labels": labels, "shots": shots}
            here = []
            for (strategy,), inside in grouped(group, "strategy").items():
                here.append(head | {"strategy": strategy} | accuracy_row(inside))
            rows += here
            beside = {"chance": 100 / group[0].meta["classes"]}
            beside |= {name: 100 * mean(record.meta[name] for record in group) for name in CountedWords.NAMES}
            best.append(head | max(here, key=lambda row: row["accuracy"]) | beside)
        for task, labels in dict.fromkeys((row["task"], row["labels"]) for row in best):
            drawn = [row for row in best if (row["task"], row["labels"]) == (task, labels)]
            curves.append(curve(f"{task}, {labels} labels", drawn, "shots"))
        plot = {"x": "shots (examples of every class)", "y": "accuracy (%), best strategy", "log_x": True}
        notes = ["best: the strategy with the highest accuracy for each number of shots, as the paper reports it."]
        return {
            "tables": {"best strategy": best, "all strategies": rows},
            "plot": plot | {"curves": curves},
            "notes": notes
            + ["accuracy in percent with 95 % intervals (Wilson); the best of several is a little flattered."],
        }


class CountedWords:
    """Simple predictors of the label of a text, from the demonstrations that the model sees; relations are taken for
    their sentences.

    Args:
        shown: the texts of each label.
    """

    NAMES: ClassVar[tuple[str, str]] = ("naive Bayes", "nearest text")

    def __init__(self, shown: dict[str, list[str]]) -> None:
        self._texts = [(label, Counter(_words(text))) for label, texts in shown.items() for text in texts]
        self._counts = {label: Counter() for label in shown}
        for label, words in self._texts:
            self._counts[label].update(words)
        self._vocabulary = len(set().union(*self._counts.values()))

    def answers(self, text: str) -> dict[str, str]:
        """The label by name of the predictor: of multinomial naive Bayes with one count added to every word, and of the
        text that is nearest by the cosine of its word counts. Of equally good ones the first."""
        words = _words(text)
        asked = Counter(words)

        def nearness(shown: tuple[str, Counter[str]]) -> float:
            length = math.sqrt(sum(n * n for n in shown[1].values()))
            return sum(n * shown[1][word] for word, n in asked.items()) / max(length, 1)

        # The vocabulary is that of the demonstrations, and one for all other words.
        likeliest = naive_bayes(self._counts, words, 1.0, self._vocabulary + 1)
        found = likeliest, max(self._texts, key=nearness)[0]
        return dict(zip(self.NAMES, found, strict=True))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _query(words: Task, item: Item, separator: str) -> str:
    between = item.between or words.tail
    return f"{words.head} {item.text}{separator}{between}"


# Files


def _read_banking77(data: dict[str, str], draw: random.Random) -> tuple[list[Item], list[Item]]:
    found = []
    for name in ("banking77_train", "banking77_test"):
        rows = [fields(data[name], row, "text", "category") for row in read_csv(data[name])]
        found.append([Item(" ".join(text.split()), label) for text, label in rows])
    return found[0], found[1]


def _read_goemotions(data: dict[str, str], draw: random.Random) -> tuple[list[Item], list[Item]]:
    labels = read_text(data["goemotions_labels"]).split()
    found = []
    for name in ("goemotions_train", "goemotions_test"):
        items = []
        for number, line in enumerate(read_text(data[name]).split("\n"), 1):
            columns = line.rstrip("\r").split("\t")
            if not line.strip() or (len(columns) > 1 and "," in columns[1]):
                continue
            if len(columns) < 2 or not columns[1].isdigit() or int(columns[1]) >= len(labels):
                raise ValueError(
                    f"{data[name]}, line {number} is not a text and a label number with a tab between them"
                )
            items.append(Item(" ".join(columns[0].split()), labels[int(columns[1])]))
        found.append(items)
    return found[0], found[1]


def _read_fewrel(data: dict[str, str], draw: random.Random) -> tuple[list[Item], list[Item]]:
    names = read_json(data["fewrel_names"]) if "fewrel_names" in data else {}
    train, test = [], []
    for relation, instances in sorted(read_json(data["fewrel"]).items()):
        label = names[relation][0] if relation in names else relation
        items = []
        for instance in instances:
            tokens, head, tail = fields(data["fewrel"], instance, "tokens", "h", "t")
            subject, object_ = (" ".join(tokens[i] for i in entity[2][0]) for entity in (head, tail))
            items.append(_relation(" ".join(token for token in tokens if token.strip()), subject, object_, label))
        draw.shuffle(items)
        cut = max(1, len(items) // 5)
        test += items[:cut]
        train += items[cut:]
    return train, test


def _read_tacred(data: dict[str, str], draw: random.Random) -> tuple[list[Item], list[Item]]:
    found = []
    for name in ("tacred_train", "tacred_test"):
        items = []
        for record in read_json(data[name]):
            tokens, label, *places = fields(
                data[name], record, "token", "relation", "subj_start", "subj_end", "obj_start", "obj_end"
            )
            subject, object_ = (" ".join(tokens[places[i] : places[i + 1] + 1]) for i in (0, 2))
            if label != "no_relation":  # 41 relations are left
                items.append(_relation(" ".join(tokens), subject, object_, label))
        found.append(items)
    return found[0], found[1]


def _read_babi(data: dict[str, str], draw: random.Random) -> tuple[list[Item], list[Item]]:
    found = []
    for name in ("babi_train", "babi_test"):
        items, story = [], []
        for line in read_text(data[name]).splitlines():
            number, _, rest = line.partition(" ")
            if not number.isdigit():
                raise ValueError(f"{data[name]} has a line that does not begin with a number; give a file of bAbI")
            if number == "1":
                story = []
            said, *answer = rest.split("\t")
            if answer:
                items.append(Item(" ".join([*story, said.strip()]), answer[0]))
            else:
                story.append(said)
        found.append(items)
    return found[0], found[1]


def _relation(sentence: str, subject: str, object_: str, label: str) -> Item:
    return Item(sentence, label, f"the relation between {subject} and {object_} is:")


READERS = {
    "banking77": (("banking77_train", "banking77_test"), _read_banking77),
    "goemotions": (("goemotions_train", "goemotions_test", "goemotions_labels"), _read_goemotions),
    "fewrel": (("fewrel",), _read_fewrel),
    "tacred": (("tacred_train", "tacred_test"), _read_tacred),
    "babi": (("babi_train", "babi_test"), _read_babi),
}


# Made-up words

_ONSETS = "b d f g k l m n p r s t v z bl br dr fl gr kl pr st tr".split()
_VOWELS = "a e i o u ai ou".split()


def made_up_words(draw: random.Random, count: int) -> list[str]:
    """Different words of two or three syllables that are (almost surely) in no language."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = (draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(draw.choice((2, 3))))
        words["".join(syllables) + draw.choice(("", "n", "s", "k"))] = None
    return list(words)


def synthetic(
    draw: random.Random, classes: int, shots: int, samples: int, noise: float, words: int = 8
) -> tuple[list[Item], list[Item]]:
    """Texts of made-up words; which words belong to which class is drawn, so that only the demonstrations tell.

    Args:
        draw: of all that is random.
        classes: number of classes; their names are made-up words too.
        shots: demonstrations of every class.
        samples: queries; classes take turns.
        noise: share of words that are drawn from words of no class.
        words: in a text; at least one is of the class.

    Returns:
        Demonstrations and queries.
    """
    vocabulary = iter(made_up_words(draw, classes * 5 + 40))
    names = [next(vocabulary) for _ in range(classes)]
    own = {name: [next(vocabulary) for _ in range(4)] for name in names}
    rest = list(vocabulary)

    def text(name: str) -> Item:
        telling = max(1, round(words * (1 - noise)))
        drawn = draw.choices(own[name], k=telling) + draw.choices(rest, k=words - telling)
        draw.shuffle(drawn)
        return Item(" ".join(drawn), name)

    train = [text(name) for name in names for _ in range(shots)]
    return train, [text(names[i % classes]) for i in range(samples)]
