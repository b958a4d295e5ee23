"""What the studies ask beside the suites of `mosaics.evaluation`: questions of the worlds, what is possible in
the languages of automata, and where models look."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field

from mosaics.data.regbench import HELD_OUT, SEPARATOR, open_regbench
from mosaics.data.worlds.world import EXAMPLE_WORDS, WorldExample
from mosaics.evaluation import Example, InContextLearning, NewKnowledge, Perplexity, Record, Suite
from mosaics.evaluation.results import accuracy_row, curve, grouped, mean

_QUESTIONS = 8


class WorldQuestions(Suite):
    """Questions of a world's test split, each asked alone after its context; the model writes one word.

    Attributes:
        task: of the worlds.
        lengths: tokens of an episode.
        shots: examples of every class, in the place of lengths.
        samples: questions for each length or number of shots, up to 8 to a context.
        settings: further ones of `World.episode`, such as `facts` or `noise`.
        trained: of persistent knowledge, whether to leave out facts that training never asks for.
        seed: of the world.
    """

    task: str
    lengths: tuple[int, ...] = ()
    shots: tuple[int, ...] = ()
    samples: int = Field(64, ge=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    trained: bool = False
    seed: int = 0

    name: ClassVar[str] = "world"

    @property
    def block(self) -> int:
        return _QUESTIONS

    def asked(self) -> Iterator[tuple[int, WorldExample]]:
        """Every question with its length or number of shots."""
        from mosaics.data.worlds import World

        world = World(self.seed)
        for length in self.lengths:
            room = min(_QUESTIONS, length // 32, self.settings.get("facts", _QUESTIONS))
            # Persistent facts that training asks for are picked out of all.
            endless = world.examples(self.task, sys.maxsize, length, questions=room, **self.settings)
            wanted = (example for example in endless if not (self.trained and example.difficulty))
            yield from ((length, example) for example in islice(wanted, self.samples))
        # Fewer shots are the first ones of the most: the same questions about the same classes at every point.
        most = max(self.shots, default=0)
        full = list(world.examples(self.task, self.samples, shots=most, **self.settings)) if most else []
        each = self.settings.get("words", EXAMPLE_WORDS) + 3
        for shots in self.shots:
            for example in full:
                shown = " ".join(example.context.split()[: shots * len(example.choices) * each])
                yield shots, replace(example, id=f"{example.id}/{shots}", context=shown, shots=shots)

    def examples(self, scorer) -> list[Example]:
        return [self._example(x, example) for x, example in self.asked()]

    def _example(self, x: int, example: WorldExample) -> Example:
        words = example.context.split()
        found = [place for place, word in enumerate(words) if word == example.answer]
        distance = len(words) + len(example.question.split()) - found[-1] if found else None
        # Questions of one episode share its context: they do not count as so many independent ones.
        meta = {"x": x, "distance": distance, "episode": example.id.split("/")[2]}
        return Example(example.id, f" {example.question}", [example.answer], prefix=example.context, meta=meta)

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
            reads = [read for read in scorer.model.read_weights(ids.to(scorer.model.device)) if read.contextual]
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


class RegBenchQuestions(Suite):
    """What a model expects next, in sequences of the test automata of RegBench, wherever a letter comes next.

    *Accuracy*: whether its likeliest symbol is a letter that is possible there. *Total variation*: half the sum over
    symbols of |p(model) - p(automaton)|, for the automaton the same for every letter that is possible.

    Attributes:
        automata: that the model learnt from; the results only name them.
        samples: sequences, each of another automaton.
        seed: of the benchmark.
    """

    automata: int
    samples: int = Field(HELD_OUT, ge=1, le=HELD_OUT)
    seed: int = 0

    name: ClassVar[str] = "regbench"

    def examples(self, scorer) -> list[Example]:
        found = (open_regbench(self.seed).sequence("test", number) for number in range(self.samples))
        return [Example(f"test/{self.seed}-{n}", ids.tolist(), [], meta={"number": n}) for n, ids in enumerate(found)]

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        records = []
        for example in examples:
            automaton = open_regbench(self.seed).automaton("test", example.meta["number"])
            positions, allowed = zip(*automaton.allowed(example.prompt), strict=True)
            expected = scorer.next_logprobs(example.prompt, positions).double().exp()
            possible = torch.zeros_like(expected)
            for row, letters in zip(possible, allowed, strict=True):
                row[letters] = 1 / len(letters)
            right = possible.gather(1, expected.argmax(1, keepdim=True))[:, 0] > 0
            variation = (expected - possible).abs().sum(1) / 2
            words = torch.tensor(example.prompt).eq(SEPARATOR).cumsum(0)[list(positions)]
            by_words = [
                {"words": n, "positions": int(here.sum()), "right": int(right[here].sum())}
                | {"variation": float(variation[here].sum())}
                for n in range(int(words.max()) + 1)
                if (here := words == n).any()
            ]
            records.append(Record.of(example, None, right.double().mean(), by_words=by_words))
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        found = [part for record in records for part in record.meta["by_words"]]

        def row(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
            positions, right, variation = (sum(part[k] for part in parts) for k in ("positions", "right", "variation"))
            return {
                "accuracy": 100 * right / positions,
                "total variation": variation / positions,
                "positions": positions,
            }

        most = max(part["words"] for part in found)
        after = [{"words before": n} | row([part for part in found if part["words"] == n]) for n in range(most + 1)]
        plot = {"x": "words before", "y": "total variation", "log_x": False}
        return {
            "tables": {"all": [{"automata": self.automata} | row(found)], "by words before": after},
            "plot": plot | {"curves": [curve(self.name, after, "words before", "total variation")]},
        }


class Asked(NamedTuple):
    """A suite, and what of its results studies show.

    Attributes:
        suite: the suite.
        table: of its summary.
        x, y: columns of that.
        point: what in a record's `meta` is its x; None where single records belong to no point.
        group: what in a record's `meta` tells those that belong together; None where each stands for itself.
    """

    suite: type[Suite]
    table: str
    x: str
    y: str
    point: str | None = None
    group: str | None = None


SUITES = {
    "world": Asked(WorldQuestions, "by x", "x", "accuracy", "x", "episode"),
    "perplexity": Asked(Perplexity, "loss by context", "times", "nats per token", "multiple", "document"),
    "attention": Asked(AttentionByDistance, "by distance", "x", "score"),
    "regbench": Asked(RegBenchQuestions, "all", "automata", "accuracy"),
    "regbench-variation": Asked(RegBenchQuestions, "all", "automata", "total variation"),
    "many-shot": Asked(InContextLearning, "best strategy", "shots", "accuracy", "shots"),
    "documents": Asked(NewKnowledge, "by length", "length", "accuracy", "length"),
}


def telling(said: dict[str, dict[str, dict[str, Any]]], points: dict[str, float], count: int = 5) -> list[str]:
    """Ids of questions to be shown: those that models answered differently first, then wrong and right ones, from the
    longest and the shortest in turn.

    Args:
        said: the records by arrangement and id.
        points: x by id.
        count: at most so many.
    """
    kinds: dict[tuple[bool, ...], list[str]] = {}
    for name in sorted(points, key=lambda name: -points[name]):
        kinds.setdefault(tuple(bool(records[name]["score"]) for records in said.values()), []).append(name)
    order = sorted(kinds, key=lambda kind: (len(set(kind)) == 1, sum(kind)))
    chosen: list[str] = []
    while len(chosen) < count and any(kinds.values()):
        for kind in order:
            if kinds[kind] and len(chosen) < count:
                chosen.append(kinds[kind].pop(0 if len(chosen) % 2 == 0 else -1))
    return sorted(chosen, key=lambda name: -points[name])
