"""Stored keys with a sketch of them, by which most need not be read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mosaics.ops.kernel_regression.narrow import Narrow


class Sketched(NamedTuple):
    r"""Keys in the place of a tensor, for a read that may be wrong by a little: the first of them also in 8 bits.

    Key i is \( s_i \hat k_i + e_i \) with \( \lVert e_i \rVert \le r_i \), so that no query q gives it a logit farther
    than \( \lVert q \rVert r_i \) from that of \( s_i \hat k_i \).

    Attributes:
        exact: all of them, `(batch, heads, slots, width)`.
        data: `(batch, heads, count, width)`, int8: the first `count` in 8 bits.
        scale: `(batch, heads, count, 1)`, float32.
        radius: `(batch, heads, count, 1)`, float32; None: the keys themselves are in 8 bits, and these are they.
        tolerance: the largest error of an answer, as a share of the length of the longest value.
    """

    exact: Tensor | Narrow
    data: Tensor
    scale: Tensor
    radius: Tensor | None
    tolerance: float

    @property
    def shape(self) -> torch.Size:
        return self.exact.shape

    def repeat_interleave(self, times: int, dim: int) -> Sketched:
        """As that of a tensor."""
        parts = (None if x is None else x.repeat_interleave(times, dim=dim) for x in self[:-1])
        return Sketched(*parts, self.tolerance)


def sketch_of(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `(batch, heads, slots, width)` in 8 bits, the scale and the radius of each, as `Sketched` has them."""
    wide = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    data, scale, _ = Narrow.of(wide, torch.int8)
    left = (wide - data.to(wide.dtype) * scale.to(wide.dtype)).norm(dim=-1, keepdim=True)
    # Its own rounding, and that to float32.
    radius = left * (1 + 1e-5) + wide.abs().amax(-1, keepdim=True) * (wide.shape[-1] ** 0.5 * 2**-22)
    return data, scale, radius.float()
