"""Interpolated Kneser-Ney smoothing of counted n-grams: what a language model has to be better than."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class KneserNey:
    """Forecasts the next token from the n-1 before it, by counts.

    With c the counts of the longest n-grams, and for shorter ones the number of different tokens that were seen before
    them, P(w | h) = (max(c(hw) - D, 0) + D N(h) P(w | h')) / c(h), where c(h) is the sum over what follows h, N(h) the
    number of different ones, h' is h without its first token, and D = n_1 / (n_1 + 2 n_2) for the n-grams that were
    counted once and twice; below single tokens lies the uniform distribution. A history that was never seen is
    shortened (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7).

    Args:
        tokens: `(count,)` integers that are counted.
        order: n, at least 1.
        vocabulary: number of tokens; order times its bits must fit into 63.

    Raises:
        ValueError: an order or vocabulary that is out of range.
    """

    def __init__(self, tokens: Sequence[int] | np.ndarray, order: int, vocabulary: int) -> None:
        self.bits = max(1, int(vocabulary - 1).bit_length())
        if order < 1 or vocabulary < 1 or order * self.bits > 63:
            raise ValueError(f"order {order} with {vocabulary} tokens can't be counted; give fewer of either")
        self.order, self.vocabulary = order, vocabulary
        tokens = np.asarray(tokens, dtype=np.int64)
        grams, counts = np.unique(self._grams(tokens, order), return_counts=True)
        self._levels = []
        for n in range(order, 0, -1):
            self._levels.append(_Level(grams, counts, self.bits))
            if n > 1:  # of the shorter ones, how many different tokens stand before them
                grams, counts = np.unique(grams & ((1 << (n - 1) * self.bits) - 1), return_counts=True)

    def _grams(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """n-grams packed into integers, the oldest token in the highest bits."""
        found = np.zeros(max(len(tokens) - n + 1, 0), dtype=np.int64)
        for i in range(n):
            found = found << self.bits | tokens[i : len(tokens) - n + 1 + i]
        return found

    def nats(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """-log P of every token but the first, each from at most n-1 before it: `(count - 1,)`."""
        tokens = np.asarray(tokens, dtype=np.int64)
        found = np.full(len(tokens) - 1, 1.0 / self.vocabulary)
        for n, level in enumerate(reversed(self._levels), 1):
            here = slice(max(n - 2, 0), None)  # who has n-1 tokens before it
            grams = self._grams(tokens, n)[1 if n == 1 else 0 :]
            found[here] = level.interpolated(grams, found[here])
        return -np.log(found)


class _Level:
    """n-grams of one length: their counts, and of each history how much follows it and how many different ones."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, bits: int) -> None:
        self.grams, self.counts, self.bits = grams, counts, bits
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once else 0.0
        self.histories, first = np.unique(grams >> bits, return_index=True)
        self.follow = np.add.reduceat(counts, first) if len(counts) else counts
        self.different = np.diff(np.append(first, len(grams)))

    def interpolated(self, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """P of packed n-grams, given that of the same without their oldest token."""
        counts = _looked_up(self.grams, self.counts, grams)
        follow = _looked_up(self.histories, self.follow, grams >> self.bits)
        different = _looked_up(self.histories, self.different, grams >> self.bits)
        found = np.maximum(counts - self.discount, 0) + self.discount * different * shorter
        return np.where(follow > 0, found / np.maximum(follow, 1), shorter)


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of sorted keys; 0 for others."""
    if not len(keys):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
