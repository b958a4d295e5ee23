"""Multi-query associative recall: key-value pairs of random tokens, asked for after a distance."""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from mosaics.evaluation.example import Example, Record
from mosaics.evaluation.results import Suite, curve, grouped, mean, wilson

FILLERS = 512


class Recall(Suite):
    """Multi-query associative recall (MQAR; Arora et al. 2023, "Zoology").

    A row is: the pairs `key value key value ...`, and then every key once more, each followed by its value, at random
    places among filler tokens. The answer to a query is what the model finds likeliest after the key. Keys, values and
    fillers are drawn anew for every row, all different from each other, from the tokens that are one word each; so
    nothing but the pair itself says what follows a key, a key never stands anywhere but in its pair and its query, and
    the model's own knowledge does not help.

    Attributes:
        lengths: tokens of a row.
        pairs: numbers of pairs.
        samples: rows for each length and number of pairs.
        seed: of every draw.
    """

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    pairs: tuple[int, ...] = (4, 16, 32)
    samples: int = Field(20, ge=1)
    seed: int = 0

    name: ClassVar[str] = "recall"

    @property
    def block(self) -> int:
        return 4

    def examples(self, scorer) -> list[Example]:
        words = word_tokens(scorer)
        needed = 2 * max(self.pairs) + 2
        if min(self.pairs) < 1:
            raise ValueError(f"pairs is {min(self.pairs)}; choose 1 or more")
        if len(words) < needed:
            raise ValueError(
                f"the tokenizer has {len(words)} tokens that are one word each and {max(self.pairs)} pairs "
                f"need {needed}; ask for fewer --pairs"
            )
        found = []
        for length in self.lengths:
            for pairs in self.pairs:
                if 4 * pairs + 1 > length:
                    raise ValueError(f"{pairs} pairs and their queries need {4 * pairs + 1} tokens, not {length}")
                for sample in range(self.samples):
                    name = f"{length}/{pairs}/{sample}"
                    draw = random.Random(f"recall/{self.seed}/{name}")
                    found.append(_row(name, draw, words, scorer.start_id, length, pairs))
        return found

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        records = []
        for example in examples:
            queries = example.meta["queries"]
            scores = scorer.next_logprobs(example.prompt, [query["position"] for query in queries])
            values = [query["value"] for query in queries]
            predicted = scores.argmax(-1).tolist()
            among = [values[i] for i in scores[:, values].argmax(-1).tolist()]
            answers = [
                {"distance": q["distance"], "value": q["value"], "predicted": p, "among_values": a}
                for q, p, a in zip(queries, predicted, among, strict=True)
            ]
            correct = mean(a["predicted"] == a["value"] for a in answers)
            records.append(Record.of(example, predicted, correct, queries=answers))
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        rows = []
        for (length, pairs), group in grouped(records, "length", "pairs").items():
            queries = [query for record in group for query in record.meta["queries"]]
            rows.append({"length": length, "pairs": pairs} | _accuracy(queries) | {"chance": 100 / pairs})
        by_distance: dict[tuple[int, int], list[dict]] = {}
        for record in records:
            for query in record.meta["queries"]:
                reach = 1 << (query["distance"] - 1).bit_length()  # the next power of two
                by_distance.setdefault((record.meta["pairs"], reach), []).append(query)
        distances = [
            {"pairs": pairs, "distance up to": reach} | _accuracy(queries)
            for (pairs, reach), queries in sorted(by_distance.items())
        ]
        curves = [
            curve(f"{pairs} pairs", [row for row in distances if row["pairs"] == pairs], "distance up to")
            for pairs in sorted({record.meta["pairs"] for record in records})
        ]
        plot = {"x": "distance to the pair, up to (tokens)", "y": "accuracy (%)", "log_x": True, "curves": curves}
        note = "accuracy: likeliest of all tokens; among values: likeliest of the row's values (chance is 1 / pairs)."
        return {"tables": {"by length": rows, "by distance": distances}, "plot": plot, "notes": [note]}


def word_tokens(scorer) -> list[int]:
    """Ids of the tokens that are one word, written with letters, which encode to themselves, sorted."""
    tokenizer = scorer.tokenizer
    special = set(tokenizer.all_special_ids)
    texts = {i: scorer.decode([i]) for i in sorted(tokenizer.get_vocab().values()) if i not in special}
    likely = [i for i, text in texts.items() if text.strip().isalnum() and "\ufffd" not in text]
    return [i for i in likely if scorer.encode(texts[i], begin=False) == [i]]


def _row(name: str, draw: random.Random, words: list[int], start: int, length: int, pairs: int) -> Example:
    drawn = draw.sample(words, min(len(words), 2 * pairs + FILLERS))
    keys, values, fillers = drawn[:pairs], drawn[pairs : 2 * pairs], drawn[2 * pairs :]
    free = length - 1 - 4 * pairs
    # Each query takes one place among the fillers: which of the places are queries is drawn.
    is_query = [True] * pairs + [False] * free
    draw.shuffle(is_query)
    order = draw.sample(range(pairs), pairs)
    ids = [start] + [token for pair in zip(keys, values, strict=True) for token in pair]
    queries = []
    for here in is_query:
        if here:
            number = order[len(queries)]
            # The distance from the key in its pair to the key that asks.
            queries.append({"position": len(ids), "distance": len(ids) - 1 - 2 * number, "value": values[number]})
            ids += [keys[number], values[number]]
        else:
            ids.append(draw.choice(fillers))
    references = [str(query["value"]) for query in queries]
    return Example(name, ids, references, meta={"length": length, "pairs": pairs, "queries": queries})


def _accuracy(queries: Sequence[dict]) -> dict[str, Any]:
    score = mean(query["predicted"] == query["value"] for query in queries)
    among = mean(query["among_values"] == query["value"] for query in queries)
    low, high = wilson(score, len(queries))
    return {
        "accuracy": 100 * score,
        "low": 100 * low,
        "high": 100 * high,
        "among values": 100 * among,
        "queries": len(queries),
    }
