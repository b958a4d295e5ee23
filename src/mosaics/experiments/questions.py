"""What the studies ask beside the suites of `mosaics.evaluation`: questions of the worlds, and where models look."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from mosaics.data.worlds.world import CLASSES, EXAMPLE_WORDS
from mosaics.evaluation import Example, Perplexity, Record, Suite
from mosaics.evaluation.results import accuracy_row, curve, grouped, mean
from mosaics.experiments.labels import names_of_classes

_QUESTIONS = 8


class WorldQuestions(Suite):
    """Questions of a world's test split, each asked alone after its context; the model writes one word.

    Attributes:
        task: of the worlds.
        lengths: tokens of an episode.
        shots: examples of every class, in the place of lengths.
        samples: questions for each length or number of shots, up to 8 to a context.
        facts: stated in a context, whatever its length; by default as many as `World.episode` states.
        named_classes: whether labels are words of their classes (see `mosaics.experiments.labels`).
        seed: of the world.
    """

    task: str
    lengths: tuple[int, ...] = ()
    shots: tuple[int, ...] = ()
    samples: int = Field(64, ge=1)
    facts: int | None = None
    named_classes: bool = False
    seed: int = 0

    name: ClassVar[str] = "world"

    @property
    def block(self) -> int:
        return _QUESTIONS

    def examples(self, scorer) -> list[Example]:
        return list(self._examples())

    def _examples(self) -> Iterator[Example]:
        from mosaics.data.worlds import World

        world = World(self.seed)
        more = {} if self.facts is None else {"facts": self.facts}
        for length in self.lengths:
            room = min(_QUESTIONS, length // 32, self.facts or _QUESTIONS)
            for asked in world.examples(self.task, self.samples, length, questions=room, **more):
                yield self._example(asked.id, length, asked.context.split(), asked.question, asked.answer)
        # Fewer shots are the first ones of the most: the same questions about the same classes at every point.
        most = list(world.examples(self.task, self.samples, shots=max(self.shots))) if self.shots else []
        for shots in self.shots:
            for asked in most:
                words, answer = asked.context.split(), asked.answer
                if self.named_classes:
                    names = names_of_classes(words)
                    words, answer = [names.get(word, word) for word in words], names[answer]
                shown = words[: shots * CLASSES * (EXAMPLE_WORDS + 3)]
                yield self._example(f"{asked.id}/{shots}", shots, shown, asked.question, answer)

    def _example(self, name: str, x: int, words: list[str], question: str, answer: str) -> Example:
        found = [place for place, word in enumerate(words) if word == answer]
        distance = len(words) + len(question.split()) - found[-1] if found else None
        return Example(name, f" {question}", [answer], prefix=" ".join(words), meta={"x": x, "distance": distance})

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        said = scorer.complete(examples, 1)
        return [
            Record.of(e, word.strip(), word.strip() in e.references) for e, word in zip(examples, said, strict=True)
        ]

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        rows = [{"x": x} | accuracy_row(group) for (x,), group in grouped(records, "x").items()]
        plot = {"x": "shots" if self.shots else "tokens", "y": "accuracy (%)", "log_x": True}
        reaches: dict[int, list[Record]] = {}
        for record in records:
            if record.meta["distance"] is not None:
                reaches.setdefault(1 << (record.meta["distance"] - 1).bit_length(), []).append(record)
        distances = [{"distance up to": reach} | accuracy_row(group) for reach, group in sorted(reaches.items())]
        return {
            "tables": {"by x": rows, "by distance": distances},
            "plot": plot | {"curves": [curve(self.task, rows, "x")]},
        }


class AttentionByDistance(Perplexity):
    """How much the last position reads from each distance (Figure 1): weights, averaged over memories, heads and texts,
    as multiples of an even spread. The first token, where attention likes to rest, is left out.

    Attributes:
        bins: parts of the distances, equally wide.
    """

    training_length: int | None = Field(None, ge=32)
    multiples: tuple[int, ...] = (1,)
    bins: int = Field(16, ge=2)

    name: ClassVar[str] = "attention"

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        records = []
        for example in examples:
            ids = torch.tensor([[scorer.start_id, *example.prompt[: example.meta["length"] - 1]]])
            reads = scorer.model.read_weights(ids.to(scorer.model.device))
            weights = torch.stack([read.weights[0, :, -1].float().mean(0).cpu() for read in reads]).mean(0).flip(0)
            parts = np.array_split(weights[:-1].numpy(), self.bins)  # by distance; the last is the first token
            edges = np.cumsum([0, *map(len, parts)])
            shown = [
                {"from": int(a), "to": int(b), "score": float(part.mean() * len(weights))}
                for a, b, part in zip(edges, edges[1:], parts, strict=False)
            ]
            records.append(Record.of(example, None, float(weights[-1]), by_distance=shown))
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        bins = [record.meta["by_distance"] for record in records]
        rows = [
            {"x": (b["from"] + b["to"]) / 2, "score": mean(one[i]["score"] for one in bins)}
            for i, b in enumerate(bins[0])
        ]
        plot = {"x": "distance (tokens)", "y": "weight (even spread = 1)", "curves": [curve("", rows, "x", "score")]}
        return {"tables": {"by distance": rows}, "plot": plot}


SUITES: dict[str, tuple[type[Suite], str, str, str]] = {
    # name: the suite; which table of its summary, which columns of that are x and y
    "world": (WorldQuestions, "by x", "x", "accuracy"),
    "perplexity": (Perplexity, "loss by context", "times", "nats per token"),
    "attention": (AttentionByDistance, "by distance", "x", "score"),
}
