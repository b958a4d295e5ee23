"""Stored vectors in fewer bits than they are computed with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Narrow(NamedTuple):
    """Keys or values that are kept in fewer bits, in the place of a tensor; no gradient passes through them.

    Attributes:
        data: `(batch, heads, slots, width)`, bfloat16 or int8.
        scale: `(batch, heads, slots, 1)`, float32: with int8 a vector is `data * scale`. None with bfloat16.
        dtype: what they are computed with.
    """

    data: Tensor
    scale: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> Narrow:
        """`x` rounded. In 8 bits the largest number of every vector is 127, and the others are rounded to multiples of
        its 127th part: the error of a number is at most a 254th of the vector's largest."""
        x, own = x.detach(), x.dtype
        if dtype != torch.int8:
            return cls(x.to(dtype), None, own)
        scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((x / scale).round().clamp(-127, 127).to(torch.int8), scale, own)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def part(self, begin: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The data of a range of slots as `dtype`, and its scale."""
        scale = None if self.scale is None else self.scale[:, :, begin:end].to(dtype)
        return self.data[:, :, begin:end].to(dtype), scale

    def cut(self, begin: int, end: int) -> Narrow:
        """Those of a range of slots."""
        scale = None if self.scale is None else self.scale[:, :, begin:end]
        return Narrow(self.data[:, :, begin:end], scale, self.dtype)

    def repeat_interleave(self, times: int, dim: int) -> Narrow:
        """As that of a tensor."""
        scale = None if self.scale is None else self.scale.repeat_interleave(times, dim)
        return Narrow(self.data.repeat_interleave(times, dim), scale, self.dtype)

    def widened(self) -> Tensor:
        """All of them as `dtype`."""
        data = self.data.to(self.dtype)
        return data if self.scale is None else data * self.scale.to(self.dtype)


def widened(x: Tensor | Narrow) -> Tensor:
    """A tensor, whether it is narrow or not."""
    return x.widened() if isinstance(x, Narrow) else x
