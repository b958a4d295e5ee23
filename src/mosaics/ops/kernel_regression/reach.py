"""Which of the stored pairs each position may read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mosaics.ops.kernel_regression.narrow import Narrow


class Reach(NamedTuple):
    """The pairs that each position of a read may use: position t those of t-window+1 ... t-delay of its own document.

    That is equation 10 of Memory Mosaics v2; its Figure 11 draws t-window ... t-1 instead. Slots hold the pairs of
    earlier calls first, then one for each position of this call.

    Attributes:
        delay: how far back the newest readable pair lies; at least 0 (1 is strictly causal). In a graph it may be a
            tensor of one integer. None: the slots are no positions but a fixed set of pairs, and every position reads
            them all; then the rest is left out (`ALL_PAIRS`).
        window: a pair this far back or farther is out of reach; at least 1. None is no limit.
        start: `(batch, time)`, integers, where the document of each position begins, counted from the first position of
            this call (negative: so many pairs before it; never decreasing); None: all stored pairs and positions are
            one document.
        stored: `(batch,)`, int64, the slot in which the pair of each row's first position lies, where more slots follow
            those of this call: what is in them is not read. None: the last slots are those of this call.
    """

    delay: int | Tensor | None
    window: int | None = None
    start: Tensor | None = None
    stored: Tensor | None = None

    def span(self, queries: Tensor, keys: Tensor | Narrow) -> tuple[Tensor, Tensor]:
        """The slots that each position may read, as a half-open range.

        Args:
            queries: `(batch, heads, time, width)`.
            keys: `(batch, heads, slots, width)`.

        Returns:
            first and end, each `(time,)`, or `(batch, time)` where rows differ; nothing is readable where end <= first.
        """
        time, slots = queries.shape[2], keys.shape[2]
        stored = slots - time if self.stored is None else self.stored[:, None]
        own = stored + torch.arange(time, device=queries.device)
        if self.delay is None:
            return torch.zeros_like(own), torch.full_like(own, slots)
        end = own - self.delay + 1
        first = torch.zeros_like(own) if self.start is None else (self.start.to(torch.int64) + stored).clamp(min=0)
        if self.window is not None:
            first = torch.maximum(first, own - self.window + 1)
        return first, end.expand_as(first)


ALL_PAIRS = Reach(None)  # of a fixed set, which has no positions


def outside(first: Tensor, end: Tensor, low: int, high: int) -> Tensor:
    """Which of the slots from `low` to below `high` a position with the range `first` to below `end` may not read:
    `(1 or batch, 1, time, high - low)`."""
    slot = torch.arange(low, high, device=first.device)
    first, end = (torch.atleast_2d(x)[:, None, :, None] for x in (first, end))
    return (slot < first) | (slot >= end)


def is_empty(first: Tensor, end: Tensor) -> Tensor:
    """Which positions may read nothing: `(1 or batch, 1, time)`."""
    return torch.atleast_2d(end <= first)[:, None]
