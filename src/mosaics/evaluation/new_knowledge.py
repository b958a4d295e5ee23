"""New knowledge: questions about documents that stand before them, and needles in haystacks, at any length.

The tasks and wordings are RULER's (Hsieh et al. 2024): its two question answering tasks over SQuAD and HotpotQA, and
its three single needles. The published harnesses shuffle all samples with one seed, so that the document with the
answer is at one place in all samples of a length. Here its place is drawn for every sample; `construction="published"`
does it their way.
"""

import random
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from mosaics.evaluation.example import Example, Prompts, Record
from mosaics.evaluation.files import fields, known_form, read_json, texts
from mosaics.evaluation.results import Suite, accuracy_row, curve, grouped, mean

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_QUESTION = (
    f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{_INSTRUCTION}\n\n"
    "Question: {question} Answer:"
)
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_HAYSTACK = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text is"
)
_NOISE = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
_ADJECTIVES = (
    "able amber brave brief calm clever crisp dusty eager early faint fierce gentle giddy green happy hollow humble "
    "idle jolly keen kind late lively loud lucky merry mild misty narrow neat noble odd pale plain proud quick quiet "
    "rapid rare rough royal rusty shy silent sleepy small smooth solid steep stern sunny sweet swift tall tidy tiny"
).split()
_NOUNS = (
    "anchor apple arrow badge barrel basket beacon bell blanket bottle bridge bucket button candle canyon carpet "
    "circle cloud copper corner cradle desert dragon engine falcon feather forest garden glacier hammer harbor "
    "island jacket kettle ladder lantern lemon market meadow mirror needle orchard paddle pepper pillow planet pocket "
    "river saddle shadow spider temple ticket timber tunnel valley violin wagon whistle window"
).split()
QA_TASKS = ("squad", "hotpotqa")
NEEDLES = {"niah-noise": ("number", None), "niah-essays": ("number", "essays"), "niah-uuids": ("uuid", "essays")}
_NEW_TOKENS = {"niah-uuids": 64}
_PUBLISHED_SEED = 42
_PUBLISHED_STEP = 10
_DEPTHS = 5


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and documents by number.

    Attributes:
        gold: those that hold the answer.
        related: others of its article, or those that are there to distract from it.
        own: those that RULER counts as its own, in their order.
    """

    id: str
    text: str
    answers: list[str]
    gold: list[int]
    related: list[int]
    own: list[int]


class NewKnowledge(Suite):
    """RULER's question answering and single-needle tasks, built from files.

    A prompt is filled with whole documents (or sentences of the haystack) up to its length; a question whose own
    documents do not fit is not asked at that length. Nothing is ever cut.

    Attributes:
        data: files: `squad` (its JSON, any version), `hotpotqa` (JSON of the distractor setting, or IRCoT's JSON
            lines), `essays` (text, as `prepare --corpus` takes it).
        tasks: `squad`, `hotpotqa`, `niah-noise`, `niah-essays`, `niah-uuids` (RULER's single needles 1 to 3); by
            default all for which there is data.
        lengths: tokens of a prompt with the room for its answer.
        samples: questions for each task and length.
        construction: `per-sample` draws the place of the answer for every sample; `published` does what RULER does:
            questions in the order of the file, steps of ten documents, one shuffle for all samples of a length.
        max_new_tokens: of the answer; by default 32, and 64 for needles that are UUIDs.
        seed: of every draw; the published construction has its own.
    """

    data: dict[str, str] = Field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    samples: int = Field(100, ge=1)
    construction: Literal["per-sample", "published"] = "per-sample"
    max_new_tokens: int | None = Field(None, ge=1)
    seed: int = 0

    name: ClassVar[str] = "new-knowledge"

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for task in tasks or ():
            if task not in (*QA_TASKS, *NEEDLES):
                raise ValueError(f"there is no task {task}; choose from {', '.join((*QA_TASKS, *NEEDLES))}")
        return tasks

    @field_validator("data")
    @classmethod
    def _known_data(cls, data: dict[str, str]) -> dict[str, str]:
        for key in data:
            if key not in (*QA_TASKS, "essays"):
                raise ValueError(f"{key} is no data set of this suite; it takes squad, hotpotqa and essays")
        return data

    @property
    def block(self) -> int:
        return 4

    def sources(self) -> list[str]:
        return list(self.data.values())

    def _chosen(self) -> list[str]:
        needs = {**{task: task for task in QA_TASKS}, **{task: source for task, (_, source) in NEEDLES.items()}}
        if self.tasks is None:
            chosen = [task for task, source in needs.items() if source is None or source in self.data]
        else:
            chosen = list(self.tasks)
        for task in chosen:
            if needs[task] is not None and needs[task] not in self.data:
                raise ValueError(f"the task {task} needs --data {needs[task]}=PATH")
        if self.construction == "published" and self.tasks is None:
            chosen = [task for task in chosen if task in QA_TASKS]
        return chosen

    def examples(self, scorer) -> Prompts:
        chosen = self._chosen()
        for task in chosen:
            if self.construction == "published" and task in NEEDLES:
                raise ValueError(f"the published construction is about squad and hotpotqa, not {task}")
        if not chosen:
            raise ValueError("there is nothing to ask; give --data squad=PATH or hotpotqa=PATH")
        return Prompts(len(chosen) * len(self.lengths) * self.samples, lambda: self._prompts(scorer, chosen))

    def _prompts(self, scorer, chosen: list[str]) -> Iterator[Example]:
        for task in chosen:
            room = self._room(task)
            if task in NEEDLES:
                kind, source = NEEDLES[task]
                build = _Needles(scorer, task, kind, self._haystack(source), self.seed)
            else:
                with known_form(self.data[task]):
                    documents, questions = READERS[task](self.data[task])
                    for question in questions:
                        texts(question.id, question.text, *question.answers)
                maker = _Published if self.construction == "published" else _Drawn
                build = maker(scorer, task, documents, questions, self.seed)
            for length in self.lengths:
                found = 0
                for example in build(length, room, self.samples):
                    found += 1
                    yield example
                if not found:
                    raise ValueError(
                        f"no question of {task} and its documents fit into {length} tokens; ask for longer prompts"
                    )

    def _room(self, task: str) -> int:
        return self.max_new_tokens or _NEW_TOKENS.get(task, 32)

    def _haystack(self, source: str | None) -> list[str]:
        if source is None:
            return _NOISE
        from mosaics.data import open_corpus

        texts = (" ".join(document.text.split()) for document in open_corpus(self.data[source]))
        return [sentence for text in texts for sentence in re.split(r"(?<=[.!?]) ", text) if sentence]

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        records = []
        for example in examples:
            [said] = scorer.complete([example], self._room(example.meta["task"]))
            best, average = matches(said, example.references)
            records.append(Record.of(example, said, best, mean_over_references=average))
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        rows, depths, curves = [], [], []
        for (task, length), group in grouped(records, "task", "length").items():
            rows.append(
                {"task": task, "length": length}
                | accuracy_row(group)
                | {
                    "mean over references": 100 * mean(record.meta["mean_over_references"] for record in group),
                    "tokens": mean(float(record.meta["tokens"]) for record in group),
                    "places": len({round(record.meta["depth"], 6) for record in group}),
                }
            )
            parts: dict[int, list[Record]] = {}
            for record in group:
                parts.setdefault(min(int(record.meta["depth"] * _DEPTHS), _DEPTHS - 1), []).append(record)
            for part, inside in sorted(parts.items()):
                between = f"{100 * part // _DEPTHS}-{100 * (part + 1) // _DEPTHS} %"
                depths.append({"task": task, "length": length, "depth": between} | accuracy_row(inside))
        for task in dict.fromkeys(row["task"] for row in rows):
            curves.append(curve(task, [row for row in rows if row["task"] == task], "length"))
        notes = [
            "accuracy: the answer contains a reference (max over references), in percent, with 95 % intervals.",
            "depth: place of the first document with the answer (or of the needle); 0 % is farthest from the question.",
        ]
        tables = {"by length": rows, "by depth": depths}
        return {
            "tables": tables,
            "plot": {"x": "prompt (tokens)", "y": "accuracy (%)", "log_x": True, "curves": curves},
            "notes": notes,
        }


def matches(said: str, references: Sequence[str]) -> tuple[float, float]:
    """Whether an answer contains a reference, and the share of the references that it contains; case is ignored."""
    found = [float(reference.lower() in said.lower()) for reference in references]
    return max(found), mean(found)


# Files


def read_squad(path: str) -> tuple[list[str], list[Question]]:
    """Paragraphs and answerable questions of SQuAD 1.1 or 2.0."""
    articles = fields(path, read_json(path), "data")[0]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
    number = {document: i for i, document in enumerate(documents)}
    questions = []
    for article in articles:
        here = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = number[paragraph["context"]]
            related = [other for other in here if other != gold]
            for asked in paragraph["qas"]:
                answers = [answer["text"] for answer in asked["answers"]]
                if answers and not asked.get("is_impossible"):
                    questions.append(Question(asked["id"], asked["question"], answers, [gold], related, [gold]))
    return documents, questions


def read_hotpotqa(path: str) -> tuple[list[str], list[Question]]:
    """Paragraphs and questions of HotpotQA (distractor setting): its own JSON, that of `datasets`, IRCoT's lines."""
    parsed = []
    for row, record in enumerate(read_json(path)):
        if "question_text" in record:
            question, answers, contexts = fields(path, record, "question_text", "answers_objects", "contexts")
            answer, name = answers[0]["spans"][0], record.get("question_id", str(row))
            paragraphs = [(c["title"], c["paragraph_text"], c["is_supporting"]) for c in contexts]
        else:
            question, answer, facts, context = fields(path, record, "question", "answer", "supporting_facts", "context")
            name = record.get("_id") or record.get("id") or str(row)
            titles = set(facts["title"]) if isinstance(facts, dict) else {title for title, _ in facts}
            pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
            paragraphs = [(title, "".join(sentences), title in titles) for title, sentences in pairs]
        parsed.append((name, question, answer, [(f"{title}\n{text}", bool(gold)) for title, text, gold in paragraphs]))
    documents = sorted({text for *_, paragraphs in parsed for text, _ in paragraphs})
    number = {document: i for i, document in enumerate(documents)}
    return documents, [
        Question(
            name,
            question,
            [answer],
            list(dict.fromkeys(number[text] for text, gold in paragraphs if gold)),
            list(dict.fromkeys(number[text] for text, gold in paragraphs if not gold)),
            [number[text] for text, _ in paragraphs],
        )
        for name, question, answer, paragraphs in parsed
    ]


READERS = {"squad": read_squad, "hotpotqa": read_hotpotqa}

# Prompts


class _Documents:
    """Prompts over documents; subclasses say which documents, in which order."""

    def __init__(self, scorer, task: str, documents: list[str], questions: list[Question], seed: int):
        self.scorer, self.task, self.documents, self.questions, self.seed = scorer, task, documents, questions, seed
        self.tokens = lru_cache(maxsize=None)(
            lambda i: len(scorer.encode(f"Document 100:\n{documents[i]}\n\n", begin=False))
        )

    def prompt(self, question: Question, order: Sequence[int]) -> str:
        listed = (f"Document {place}:\n{self.documents[i]}" for place, i in enumerate(order, 1))
        return _QUESTION.format(context="\n\n".join(listed), question=question.text)

    def example(self, question: Question, order: Sequence[int], length: int, tokens: int, place: int) -> Example:
        golden = [at for at, i in enumerate(order) if i in question.gold]
        meta = {
            "task": self.task,
            "length": length,
            "tokens": tokens,
            "documents": len(order),
            "gold": golden,
            "depth": (golden[0] + 0.5) / len(order),
        }
        name = f"{self.task}/{length}/{place}/{question.id}"
        return Example(name, self.prompt(question, order), question.answers, meta=meta)


class _Drawn(_Documents):
    """Questions, documents and the places of the gold ones drawn for every sample."""

    def __call__(self, length: int, room: int, samples: int) -> Iterator[Example]:
        budget = length - room
        order = list(range(len(self.questions)))
        random.Random(f"{self.task}/{self.seed}").shuffle(order)  # the same questions at all lengths, if they fit
        asked = 0
        for index in order:
            question = self.questions[index]
            if asked == samples:
                return
            if sum(map(self.tokens, question.gold)) > budget:
                continue
            if self.scorer.count(self.prompt(question, question.gold)) > budget:
                continue
            yield self._sample(question, length, budget, asked)
            asked += 1

    def _sample(self, question: Question, length: int, budget: int, place: int) -> Example:
        draw = random.Random(f"{self.task}/{self.seed}/{length}/{question.id}")
        own = {*question.gold, *question.related}
        others = [i for i in range(len(self.documents)) if i not in own]
        candidates = draw.sample(question.related, len(question.related)) + draw.sample(others, len(others))
        left = budget - self.scorer.count(self.prompt(question, question.gold))
        taken, misses = [], 0
        for i in candidates:
            if self.tokens(i) <= left:
                taken.append(i)
                left -= self.tokens(i)
            else:
                misses += 1
                if misses > 50:
                    break
        else:
            if left > max(map(self.tokens, question.gold), default=0) + budget // 10:
                raise ValueError(
                    f"all {len(self.documents)} documents of {self.task} do not fill {length} tokens; "
                    "give a larger file or ask for shorter prompts"
                )
        while True:
            count = len(taken) + len(question.gold)
            spots = sorted(draw.sample(range(count), len(question.gold)))
            golden = dict(zip(spots, draw.sample(question.gold, len(question.gold)), strict=True))
            rest = iter(draw.sample(taken, len(taken)))
            order = [golden[at] if at in golden else next(rest) for at in range(count)]
            tokens = self.scorer.count(self.prompt(question, order))
            if tokens <= budget or not taken:
                return self.example(question, order, length, tokens, place)
            taken.pop()


class _Published(_Documents):
    """RULER's construction: its questions in order, its number of documents, its one shuffle."""

    def __call__(self, length: int, room: int, samples: int) -> Iterator[Example]:
        draw = random.Random(_PUBLISHED_SEED)
        number, tokens = _PUBLISHED_STEP, 0
        while tokens + room < length:
            order = self._order(self.questions[0], number, draw)
            answers = f" {self.questions[0].answers}"
            tokens = self.scorer.count(self.prompt(self.questions[0], order) + answers)
            if tokens + room > length:
                number -= _PUBLISHED_STEP
                break
            number += _PUBLISHED_STEP
            if number > len(self.documents):
                number = len(self.documents)
                break
        number = max(number, 1)
        for place, question in enumerate(self.questions[:samples]):
            least = len(question.own)
            for count in (*range(max(number, least), least, -_PUBLISHED_STEP), least):
                order = self._order(question, count, draw)
                tokens = self.scorer.count(self.prompt(question, order))
                if tokens + room <= length:
                    yield self.example(question, order, length, tokens, place)
                    break

    def _order(self, question: Question, number: int, draw: random.Random) -> list[int]:
        # For HotpotQA all ten paragraphs of a question count as its own there.
        first, more = question.own, [] if self.task == "hotpotqa" else question.related
        if number >= len(self.documents):
            order = list(range(len(self.documents)))
        elif number - len(first) > len(more):
            known = {*first, *more}
            others = [i for i in range(len(self.documents)) if i not in known]
            order = first + more + draw.sample(others, max(0, number - len(first) - len(more)))
        else:
            order = first + draw.sample(more, max(0, number - len(first)))
        random.Random(_PUBLISHED_SEED).shuffle(order)
        return order


class _Needles:
    """One sentence with a number or a UUID, at a place drawn for every sample, in a haystack of sentences."""

    def __init__(self, scorer, task: str, kind: str, sentences: list[str], seed: int):
        self.scorer, self.task, self.kind, self.sentences, self.seed = scorer, task, kind, sentences, seed
        self.tokens = lru_cache(maxsize=None)(lambda i: len(scorer.encode(f" {sentences[i]}", begin=False)))

    def __call__(self, length: int, room: int, samples: int) -> Iterator[Example]:
        for sample in range(samples):
            draw = random.Random(f"{self.task}/{self.seed}/{length}/{sample}")
            key = f"{draw.choice(_ADJECTIVES)}-{draw.choice(_NOUNS)}"
            if self.kind == "uuid":
                value = str(uuid.UUID(int=draw.getrandbits(128), version=4))
            else:
                value = str(draw.randrange(10**6, 10**7))
            needle = _NEEDLE.format(kind=self.kind, key=key, value=value)
            budget = length - room
            left = budget - self.scorer.count(_HAYSTACK.format(kind=self.kind, key=key, context=needle))
            if left < 0:
                return
            # The noise begins anew each time, the essays at a sentence that is drawn.
            at = draw.randrange(len(self.sentences)) if self.task != "niah-noise" else 0
            hay: list[int] = []
            while self.tokens(at) <= left:
                left -= self.tokens(at)
                hay.append(at)
                at = (at + 1) % len(self.sentences)
            where = draw.random()
            while True:
                place = int(where * (len(hay) + 1))
                parts = [self.sentences[i] for i in hay]
                parts.insert(place, needle)
                prompt = _HAYSTACK.format(kind=self.kind, key=key, context=" ".join(parts))
                tokens = self.scorer.count(prompt)
                if tokens <= budget or not hay:
                    break
                hay.pop()
            meta = {
                "task": self.task,
                "length": length,
                "tokens": tokens,
                "sentences": len(parts),
                "gold": [place],
                "depth": (place + 0.5) / len(parts),
            }
            yield Example(f"{self.task}/{length}/{sample}", prompt, [value], meta=meta)
