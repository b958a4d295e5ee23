"""Packing: rows of the context length, filled with whole documents and pieces of long ones."""

import os
from bisect import bisect_left, insort
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from mosaics.data.shards import PreparedCorpus

LONG_DOCUMENTS = ("split", "truncate")


class PackedDataset:
    """A prepared corpus as an endless stream of packed rows; the position in it is one integer.

    A document that fits into the context is never cut. A longer one is split into pieces of the context
    length and a rest (every token of the corpus is then used once an epoch), or truncated to its first piece
    (as the paper does). The pieces are put together by best fit, longest first, so that little padding is
    left. Which pieces share a row does not matter to a model that keeps documents apart, so it stays the
    same; the order of the rows is drawn anew for every epoch from (seed, epoch).

    Each piece starts a document of its own: its memory is empty, and nothing predicts its first token.

    Args:
        folder: what `prepare` wrote.
        split: `train` or `validation`.
        context_length: tokens in a row, T.
        long_documents: `split` or `truncate`.
        seed: of the order of the rows.
        verify: compares the SHA-256 of the split's files first.

    Attributes:
        prepared: the open folder, with vocabulary size and special tokens.
        tokens: tokens of the corpus in an epoch (without padding).

    Raises:
        FileNotFoundError: no prepared corpus there.
        ValueError: a damaged folder, an empty split, a context shorter than two tokens, another word for
            `long_documents`, a negative seed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        context_length: int,
        *,
        long_documents: str = "split",
        seed: int = 0,
        verify: bool = True,
    ):
        if context_length < 2:
            raise ValueError(f"a context of {context_length} tokens predicts nothing; choose 2 or more")
        if long_documents not in LONG_DOCUMENTS:
            raise ValueError(f"long_documents is {long_documents!r}; choose {' or '.join(LONG_DOCUMENTS)}")
        if seed < 0:
            raise ValueError(f"seed {seed} is negative; choose 0 or more")
        self.prepared = PreparedCorpus(folder)
        if verify:
            self.prepared.verify(split)
        self.context_length, self.seed = context_length, seed
        self._split = self.prepared.split(split)
        lengths = np.diff(self._split.offsets)
        if long_documents == "truncate":
            lengths = np.minimum(lengths, context_length)
        self.tokens = int(lengths.sum())
        pieces = -(-lengths // context_length)
        document = np.repeat(np.arange(len(lengths)), pieces)
        start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * context_length
        length = np.minimum(lengths[document] - start, context_length)
        rows = best_fit_rows(length, context_length)
        order = np.argsort(rows, kind="stable")
        self._document, self._start, self._length = document[order], start[order], length[order]
        self._first_piece = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        # One epoch's order is held, and the next one's while a batch lies in both.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        """Rows in an epoch: sequence number n lies in epoch n // len."""
        return len(self._first_piece) - 1

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))

    def batch(self, first_sequence: int, count: int) -> dict[str, torch.Tensor | None]:
        """Rows number `first_sequence` to `first_sequence + count - 1` of the endless stream.

        Returns:
            A dictionary for `count` rows of T positions:

            - `input_ids`: int64, (count, T);
            - `document_ids`: int64, (count, T), from 0 in every row; padding has the next free number;
            - `attention_mask`: int64, (count, T), 0 at padding, which is at the end; None if there is none;
            - `labels`: int64, (count, T): `input_ids`, with -100 at padding (models shift them inside);
            - `text_targets`: bool, (count, T): a token of the text that the position before it predicts;
            - `end_targets`: bool, (count, T): an end-of-text that the position before it predicts;
            - `text_bytes`: int64, (count,): UTF-8 bytes of the tokens that `text_targets` marks.

            So bits per byte = nats at `text_targets` / ln 2 / `text_bytes`, with the end of text apart.
            Nothing predicts the first token of a document in a row: begin-of-text, or the first token of a
            later piece, whose bytes are then not counted either. The bytes are exact for byte-level
            tokenizers. For others a token has no bytes of its own; the document's bytes are then spread
            evenly over its tokens, so that whole documents are exact, and a token that nothing predicts
            takes the document's average with it.

        Raises:
            ValueError: a negative position or fewer than one row.
        """
        if first_sequence < 0 or count < 1:
            raise ValueError(f"{count} rows from {first_sequence} are out of range; take 1 or more from 0 or later")
        numbers = (divmod(number, len(self)) for number in range(first_sequence, first_sequence + count))
        return self._collate([int(self._order(epoch)[index]) for epoch, index in numbers])

    def batches(self, count: int) -> Iterator[dict[str, torch.Tensor | None]]:
        """All rows once in a fixed order that does not depend on the seed, `count` at a time (the last time
        perhaps fewer): what validation takes. The dictionaries are those of `batch`."""
        for first in range(0, len(self), count):
            yield self._collate(range(first, min(first + count, len(self))))

    def document_names(self, first_sequence: int, count: int) -> list[list[str]]:
        """For each row of the stream, the corpus's names of the documents in it, in the order of their ids.

        Reads the list of names: for messages, not for every step.
        """
        rows = [int(self._order(n // len(self))[n % len(self)]) for n in range(first_sequence, first_sequence + count)]
        documents = [self._document[self._first_piece[row] : self._first_piece[row + 1]].tolist() for row in rows]
        names = self._split.names([number for row in documents for number in row])
        return [[names.pop(0) for _ in row] for row in documents]

    def _collate(self, rows) -> dict[str, torch.Tensor | None]:
        shape = len(rows), self.context_length
        ids = np.full(shape, self.prepared.pad_token_id, dtype=np.int64)
        documents, used = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        text, ends = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        text_bytes = np.zeros(len(rows), dtype=np.int64)
        begins = int(self.prepared.bos_token_id is not None)
        for line, row in enumerate(rows):
            place = 0
            for number, piece in enumerate(range(self._first_piece[row], self._first_piece[row + 1])):
                document, start, length = self._document[piece], self._start[piece], int(self._length[piece])
                first, stop = self._split.offsets[document], self._split.offsets[document + 1]
                here = slice(place, place + length)
                ids[line, here] = tokens = self._split.read(first + start, first + start + length)
                documents[line, here], used[line, here] = number, 1
                inside = np.arange(start, start + length)  # positions in the document
                is_text = (inside >= begins) & (inside < stop - first - 1)
                is_text[0] = False
                text[line, here] = is_text
                ends[line, place + length - 1] = length > 1 and start + length == stop - first
                if self.prepared.token_bytes is not None:
                    counted = self.prepared.token_bytes[tokens]
                else:
                    counted = _even_share(inside - begins, stop - first - 1 - begins, self._split.text_bytes[document])
                text_bytes[line] += counted[is_text].sum()
                place += length
            documents[line, place:] = number + 1
        padded = used.min() == 0
        return {
            "input_ids": torch.from_numpy(ids),
            "document_ids": torch.from_numpy(documents),
            "attention_mask": torch.from_numpy(used) if padded else None,
            "labels": torch.from_numpy(np.where(used, ids, -100)),
            "text_targets": torch.from_numpy(text),
            "end_targets": torch.from_numpy(ends),
            "text_bytes": torch.from_numpy(text_bytes),
        }


def _even_share(index: np.ndarray, count: int, total: int) -> np.ndarray:
    """Whole numbers for the places 0 to count - 1 that differ by one at most and add up to the total."""
    return (index + 1) * total // max(count, 1) - index * total // max(count, 1)


def best_fit_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Puts pieces into rows: longest first, each into the fullest row that has room for it.

    Pieces of one length are placed together, so that the work grows with the number of different lengths (and
    one sort), not with pieces times rows.

    Args:
        lengths: int64, (pieces,), each from 1 to the capacity.
        capacity: tokens in a row.

    Returns:
        int64, (pieces,): the row of each piece, from 0 without gaps.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    free: dict[int, list[np.ndarray]] = {}  # free space -> groups of rows that have it
    spaces: list[int] = []
    opened = 0

    def put_back(space: int, group: np.ndarray) -> None:
        if space and len(group):
            if space not in free:
                free[space] = []
                insort(spaces, space)
            free[space].append(group)

    borders = np.flatnonzero(np.diff(lengths[order])) + 1
    for pieces in np.split(order, borders) if len(order) else []:
        length = int(lengths[pieces[0]])
        while len(pieces):
            place = bisect_left(spaces, length)
            if place == len(spaces):
                new = -(-len(pieces) // (capacity // length))
                put_back(capacity, np.arange(opened, opened + new))
                opened += new
                continue
            space = spaces[place]
            group = free[space].pop()
            if not free[space]:
                del free[space], spaces[place]
            each = space // length
            full = min(len(group), len(pieces) // each)
            rows[pieces[: full * each]] = np.repeat(group[:full], each)
            put_back(space - each * length, group[:full])
            pieces, group = pieces[full * each :], group[full:]
            if len(pieces) and len(group):  # fewer than would fill one more row
                rows[pieces] = group[0]
                put_back(space - len(pieces) * length, group[:1])
                pieces, group = pieces[:0], group[1:]
            put_back(space, group)
    return rows
