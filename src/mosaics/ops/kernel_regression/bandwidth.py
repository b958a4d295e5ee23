"""Which pairs a key may read, how many they are, and the bandwidth that follows from their number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bandwidth(NamedTuple):
    """The kernel's inverse width for n pairs, beta(n) = slope * n^exponent + base (Memory Mosaics v2, equation 6).

    Attributes:
        base: beta_0, `(heads,)`.
        slope: beta_1, `(heads,)`, or None for a bandwidth that does not depend on n.
        exponent: alpha, `(heads,)`, or None together with `slope`.
    """

    base: Tensor
    slope: Tensor | None = None
    exponent: Tensor | None = None

    def at(self, count: Tensor) -> Tensor:
        """beta at `count` pairs: `(..., time)` integers give `(..., heads, time)`; finite also without pairs."""
        base = self.base[:, None]
        if self.slope is None:
            return base.expand(*count.shape[:-1], base.shape[0], count.shape[-1])
        pairs = count.clamp(min=1).to(torch.promote_types(self.base.dtype, torch.float32))[..., None, :]
        return self.slope[:, None] * pairs ** self.exponent[:, None] + base


def readable(
    time: int,
    stored: int | Tensor,
    start: Tensor | None,
    delay: int | Tensor | None,
    window: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The slots that each position may read, as a half-open range.

    Slots count the `stored` pairs of earlier calls first (the same number for all rows, or `(batch,)`), then the `time`
    pairs of this one: the pair of position t lies in slot `stored + t`. Position t reads the pairs t-window+1 ...
    t-delay of its own document. This is the one place where the paper's two readings of the window differ: equation 10
    has t-h+1 ... t-1, Figure 11 draws t-h ... t-1. Without a delay every position reads every slot.

    Returns:
        first and end, each `(time,)`, or `(batch, time)` where rows differ; nothing is readable where end <= first.
    """
    if isinstance(stored, Tensor):
        stored = stored[:, None]
    own = stored + torch.arange(time, device=device)
    if delay is None:
        return torch.zeros_like(own), torch.full_like(own, stored + time)
    end = own - delay + 1
    first = torch.zeros_like(own) if start is None else (start.to(torch.int64) + stored).clamp(min=0)
    if window is not None:
        first = torch.maximum(first, own - window + 1)
    return first, end.expand_as(first)
