"""The bandwidth that follows from the number of pairs."""

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
        """beta at `count` pairs: `(..., time)` integers give `(..., heads, time)`; fewer than 1 count as 1."""
        base = self.base[:, None]
        if self.slope is None:
            return base.expand(*count.shape[:-1], base.shape[0], count.shape[-1])
        pairs = count.clamp(min=1).to(torch.promote_types(self.base.dtype, torch.float32))[..., None, :]
        return self.slope[:, None] * pairs ** self.exponent[:, None] + base
