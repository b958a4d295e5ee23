"""Perplexity by position in the context, within and beyond the training length."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from mosaics.evaluation.example import Example, Record
from mosaics.evaluation.results import Suite, grouped, mean


class Perplexity(Suite):
    """The same text, read with ever more context.

    A stretch of 8 training lengths is cut into windows of 1, 2, 4 and 8 training lengths; each window begins with the
    token that texts begin with, and all its text tokens are predicted. So every row of the table is about exactly the
    same tokens, and only the context differs. The curves follow the loss by position inside the windows.

    Attributes:
        data: text, as `prepare --corpus` takes it (path, folder, pattern, data set), or a prepared folder.
        field: field of .jsonl records.
        split: of a prepared folder.
        training_length: tokens; by default the model's `max_position_embeddings`.
        multiples: windows as multiples of the training length; the largest must be a multiple of each.
        stretch: how many training lengths a stretch has; by default the largest of the multiples.
        samples: stretches, from as many different documents as there are.
    """

    data: str
    field: str = "text"
    split: str = "validation"
    training_length: int | None = Field(None, ge=2)
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    stretch: int | None = Field(None, ge=1)
    samples: int = Field(8, ge=1)

    name: ClassVar[str] = "perplexity"

    @property
    def block(self) -> int:
        return len(self.multiples)

    def sources(self) -> list[str]:
        path = Path(self.data)
        return [str(path / "manifest.json") if path.is_dir() else self.data]

    def _length(self, scorer) -> int:
        if self.training_length is None and scorer.training_length is None:
            raise ValueError("the model's config names no training length; give --training-length")
        return self.training_length or scorer.training_length

    def examples(self, scorer) -> list[Example]:
        length, largest = self._length(scorer), self.stretch or max(self.multiples)
        for multiple in self.multiples:
            if multiple < 1 or largest % multiple:
                what = "the largest" if self.stretch is None else "the stretch"
                raise ValueError(f"multiple {multiple} does not divide {what}, {largest}; choose as 1,2,4,8")
        found = []
        for number, name, ids in self._stretches(scorer, length * largest):
            text_bytes = len(scorer.decode(ids).encode())
            for multiple in sorted(self.multiples):
                meta = {"multiple": multiple, "length": length * multiple, "document": name, "text_bytes": text_bytes}
                found.append(Example(f"{number}/{name}/x{multiple}", ids, [], meta=meta))
        return found

    def _stretches(self, scorer, size: int) -> Iterator[tuple[int, str, list[int]]]:
        """The first stretch of each document; if there are too few, the second ones, and so on."""
        long: list[tuple[str, list[int]]] = []
        longest = 0
        for name, ids in self._documents(scorer):
            longest = max(longest, len(ids))
            if len(ids) >= size:
                long.append((name, ids))
                if len(long) == self.samples:
                    break
        if not long:
            raise ValueError(
                f"no document of {self.data} has {size} tokens (the longest has {longest}); give longer ones, "
                "or smaller --multiples or --training-length"
            )
        places = ((name, ids, turn) for turn in range(max(len(ids) for _, ids in long) // size) for name, ids in long)
        usable = (place for place in places if len(place[1]) >= (place[2] + 1) * size)
        for number, (name, ids, turn) in zip(range(self.samples), usable, strict=False):
            yield number, name, ids[turn * size : (turn + 1) * size]

    def _documents(self, scorer) -> Iterator[tuple[str, list[int]]]:
        from mosaics.data import PreparedCorpus, open_corpus

        if not (Path(self.data) / "manifest.json").is_file():
            for document in open_corpus(self.data, field=self.field):
                yield document.id, scorer.encode(document.text, begin=False)
            return
        prepared = PreparedCorpus(self.data)
        if prepared.tokenizer().get_vocab() != scorer.tokenizer.get_vocab():
            raise ValueError(f"{self.data} was prepared with another tokenizer than the model's; give its text instead")
        split = prepared.split(self.split)
        for number in range(len(split)):
            ids = split.read(int(split.offsets[number]), int(split.offsets[number + 1])).tolist()
            yield f"{self.split}:{number}", ids[int(prepared.bos_token_id is not None) : -1]

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        records = []
        for example in examples:
            length = example.meta["length"]
            windows = [
                [scorer.start_id, *example.prompt[i : i + length]] for i in range(0, len(example.prompt), length)
            ]
            nats = np.stack([row.double().numpy() for row in scorer.token_nats(windows)])
            edges = _edges(length)
            by_position = [
                {"from": int(a), "to": int(b), "nats": float(nats[:, a:b].mean())}
                for a, b in zip(edges, edges[1:], strict=False)
            ]
            records.append(Record.of(example, None, nats.mean(), by_position=by_position, nats=float(nats.sum())))
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        rows, curves = [], []
        for (multiple, length), group in grouped(records, "multiple", "length").items():
            nats = mean(record.score for record in group)
            total_bytes = sum(record.meta["text_bytes"] for record in group)
            rows.append(
                {
                    "context": length,
                    "times": multiple,
                    "nats per token": nats,
                    "perplexity": float(np.exp(nats)),
                    "bits per byte": sum(record.meta["nats"] for record in group) / np.log(2) / max(total_bytes, 1),
                    "stretches": len(group),
                }
            )
            bins = [record.meta["by_position"] for record in group]
            curves.append(
                {
                    "label": f"{multiple} x training length",
                    "x": [(b["from"] + b["to"]) / 2 for b in bins[0]],
                    "y": [mean(one[i]["nats"] for one in bins) for i in range(len(bins[0]))],
                }
            )
        plot = {"x": "position in the context (tokens)", "y": "nats per token", "log_x": True, "curves": curves}
        note = "All rows are about the same tokens; a row's windows give them that much context at most."
        return {"tables": {"loss by context": rows}, "plot": plot, "notes": [note]}


def _edges(length: int) -> list[int]:
    """Borders of bins of positions, twice as wide each time: 0, 16, 32, 64 ... and the length."""
    edges = [0]
    width = 16
    while width < length:
        edges.append(width)
        width *= 2
    return [*edges, length]
