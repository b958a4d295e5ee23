"""RegBench: languages of random automata, each to be learnt from the words before (Akyürek et al., 2024, "In-context
language learning"). One sequence of words for each automaton; those of the test are no others' automata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LETTERS = 18
SEPARATOR, PADDING = LETTERS, LETTERS + 1  # token ids; those below are letters
SYMBOLS = "abcdefghijklmnopqr|."
HELD_OUT = 250  # automata for validation, and as many for the test
SPLITS = {"test": 0, "validation": HELD_OUT, "train": 2 * HELD_OUT}  # where each begins
_OPEN_ROWS = 16


@dataclass(frozen=True)
class Automaton:
    """A deterministic automaton, minimal and trimmed. All states accept, 0 is the initial one.

    Attributes:
        edges: for each state the pairs (letter, next state), sorted by letter. States are numbered as they are found,
            breadth first, so that automata of the same language are equal.
    """

    edges: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, edges: Sequence[Mapping[int, int]]) -> Automaton:
        """Minimises (states that allow the same words become one) and drops what can't be reached from state 0."""
        kinds, count = [0] * len(edges), 1
        while True:
            signs = [tuple(sorted((letter, kinds[to]) for letter, to in state.items())) for state in edges]
            names = {sign: number for number, sign in enumerate(dict.fromkeys(signs))}
            kinds = [names[sign] for sign in signs]
            if len(names) == count:
                break
            count = len(names)
        table = dict(enumerate(names))  # names are of the last partition but one, which is the same one
        numbers = {kinds[0]: 0}
        order = [kinds[0]]
        for kind in order:
            for _, to in table[kind]:
                if to not in numbers:
                    numbers[to] = len(order)
                    order.append(to)
        return cls(tuple(tuple((letter, numbers[to]) for letter, to in table[kind]) for kind in order))

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Automaton:
        """4 to 12 nodes over 4 to 18 of the letters; from each node 1 to 3 edges with different letters, to different
        other nodes."""
        count = int(rng.integers(4, 13))
        alphabet = rng.choice(LETTERS, rng.integers(4, LETTERS + 1), replace=False)
        edges = []
        for node in range(count):
            degree = rng.integers(1, 4)
            to = rng.choice(count - 1, degree, replace=False)
            to += to >= node  # not to itself
            edges.append(dict(zip(rng.choice(alphabet, degree, replace=False).tolist(), to.tolist(), strict=True)))
        return cls.of(edges)

    def sequence(self, rng: np.random.Generator) -> np.ndarray:
        """10 to 19 words of 1 to 49 letters with separators between them: walks from the initial state, every edge
        of a state as likely as the others. int64 `(symbols,)`."""
        found: list[int] = []
        for length in rng.integers(1, 50, rng.integers(10, 20)):
            state = 0
            if found:
                found.append(SEPARATOR)
            for draw in rng.random(length):
                letter, state = self.edges[state][int(draw * len(self.edges[state]))]
                found.append(letter)
        return np.array(found)

    def allowed(self, sequence: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """For every position whose next symbol is a letter: the position, and the letters that are possible there."""
        state = 0
        for position, (symbol, following) in enumerate(zip(sequence, sequence[1:], strict=False)):
            state = 0 if symbol == SEPARATOR else dict(self.edges[state])[int(symbol)]
            if following < LETTERS:
                yield position, [letter for letter, _ in self.edges[state]]


class RegBench:
    """The automata, no two of them equal, and one sequence of each; both depend on the seed and their number alone.

    Those for test and validation (`HELD_OUT` each) are drawn first: they are the same for any number of training
    automata, and fewer training automata are the first of more.

    Args:
        seed: of everything.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._rng = np.random.default_rng([seed, 0])
        self._known: dict[Automaton, None] = {}
        self._found: list[Automaton] = []

    def automaton(self, split: str, number: int) -> Automaton:
        """Automaton `number` of a split.

        Raises:
            ValueError: there is no such split, or none of that number in it.
        """
        if split not in SPLITS or number < 0 or (split != "train" and number >= HELD_OUT):
            raise ValueError(
                f"there is no automaton {number} in split {split!r}; take train (0 or more), or validation or test "
                f"(0 to {HELD_OUT - 1})"
            )
        index = SPLITS[split] + number
        while len(self._found) <= index:
            drawn = Automaton.draw(self._rng)
            if drawn not in self._known:
                self._known[drawn] = None
                self._found.append(drawn)
        return self._found[index]

    def sequence(self, split: str, number: int) -> np.ndarray:
        """Its sequence: int64 `(symbols,)`, up to 949 of them."""
        rng = np.random.default_rng([self.seed, 1, SPLITS.get(split, 0) + number])
        return self.automaton(split, number).sequence(rng)


@lru_cache(maxsize=2)
def open_regbench(seed: int = 0) -> RegBench:
    """The benchmark of a seed, whose automata are drawn once in a process."""
    return RegBench(seed)


class RegBenchStream:
    """An endless stream of rows, addressed by their number: the sequences of a split, some in a row, none cut in two.

    A sequence is always in a row with the same others (it does not see them); every pass over the split takes the rows
    in another order.

    Args:
        automata: of the split, from the first on.
        context_length: tokens in a row, T; longer sequences lose their end.
        split: `train`, `validation` or `test`.
        seed: of the order.
        benchmark: seed of the automata.

    Raises:
        ValueError: fewer than 1 automaton, or more than the split has.
    """

    vocab_size = len(SYMBOLS)

    def __init__(
        self, automata: int, context_length: int, *, split: str = "train", seed: int = 0, benchmark: int = 0
    ) -> None:
        if automata < 1:
            raise ValueError(f"there are {automata} automata to learn from; take 1 or more")
        self.context_length, self.seed = context_length, seed
        self.rows = _packed(automata, context_length, split, benchmark)

    def batch(self, first_sequence: int, count: int) -> dict[str, torch.Tensor]:
        """Rows number `first_sequence` to `first_sequence + count - 1`, as `PackedDataset.batch` gives them.

        Returns:
            A dictionary for `count` rows of T positions:

            - `input_ids`: int64, (count, T), filled up with padding;
            - `document_ids`: int64, (count, T), which sequence of the row;
            - `attention_mask`: bool, (count, T), False for padding;
            - `labels`: int64, (count, T), -100 for padding and separators, which are not counted (models shift them
              inside).
        """
        shape = (count, self.context_length)
        ids, documents = np.full(shape, PADDING), np.zeros(shape, dtype=np.int64)
        for place, number in enumerate(range(first_sequence, first_sequence + count)):
            turn, at = divmod(number, len(self.rows))
            row = self.rows[_order(self.seed, turn, len(self.rows))[at]]
            whole = np.concatenate(row)
            ids[place, : len(whole)] = whole
            documents[place, : len(whole)] = np.repeat(np.arange(len(row)), [len(one) for one in row])
        ids = torch.from_numpy(ids)
        return {
            "input_ids": ids,
            "document_ids": torch.from_numpy(documents),
            "attention_mask": ids != PADDING,
            "labels": ids.masked_fill(ids >= LETTERS, -100),
        }


@lru_cache(maxsize=4)
def _packed(automata: int, context_length: int, split: str, benchmark: int) -> list[list[np.ndarray]]:
    """Every sequence in the first of the newest rows that has room for it."""
    rows: list[list[np.ndarray]] = []
    room: list[int] = []
    for number in range(automata):
        sequence = open_regbench(benchmark).sequence(split, number)[:context_length]
        fits = (at for at in range(max(0, len(rows) - _OPEN_ROWS), len(rows)) if room[at] >= len(sequence))
        at = next(fits, len(rows))
        if at == len(rows):
            rows.append([])
            room.append(context_length)
        rows[at].append(sequence)
        room[at] -= len(sequence)
    return rows


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(count)


def regbench_tokenizer() -> PreTrainedTokenizerFast:
    """A character a token: letters a to r, `|` between words, `.` for padding; nothing is put before a text."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(SYMBOLS)}, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=".", unk_token=".")
