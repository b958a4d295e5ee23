"""What Lattice carries, and how a call is cut into its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-6


def inverse_norms(slots: Tensor) -> Tensor:
    """`(..., slots, 1)` of rows `(..., slots, width)`."""
    return (slots.square().sum(-1, keepdim=True) + EPS).rsqrt()


def normalised(slots: Tensor) -> Tensor:
    """Each row of `(..., slots, width)` over its norm."""
    return slots * inverse_norms(slots)


class LatticeState(NamedTuple):
    """Slots `(batch, heads, slots, width)`: at the start of the open chunk, where gradients are taken; and now."""

    anchor: Tensor
    current: Tensor

    @classmethod
    def first(cls, initial: Tensor, batch: int) -> LatticeState:
        """Before the first token; `initial` is `(heads, slots, width)`."""
        slots = initial.expand(batch, *initial.shape)
        return cls(slots, slots)

    def opened(self, initial: Tensor, begins: Tensor, opens: Tensor, renormalised: bool) -> LatticeState:
        """Where a chunk opens `(batch,)`, gradients are taken anew; where a document begins `(batch,)`, all is as at
        first."""
        begins, opens = (x[:, None, None, None] for x in (begins, opens))
        current = torch.where(begins, initial, self.current)
        if renormalised:
            current = torch.where(opens, normalised(current), current)
        return LatticeState(torch.where(opens, current, self.anchor), current)


@dataclass(frozen=True)
class Steps:
    """What tokens bring, `(batch, heads, time, ...)`; of a chunk `time` are its places, and `begins`, `opens` are set.

    Attributes:
        queries, keys: `(batch, heads, time, slots)`.
        values: `(batch, heads, time, width)`.
        step: 0 where there is no token.
        decay: the logarithm of what is kept, 0 where there is no token; or None.
        segments: of the call.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    step: Tensor
    decay: Tensor | None
    segments: Any
    begins: Tensor | None = None
    opens: Tensor | None = None

    @classmethod
    def of(cls, tensors: dict[str, Tensor | None], segments: Any) -> Steps:
        """The steps of a call, with those of padding without effect."""
        real = segments.scatter(segments.filled.long()[..., None])[..., 0].bool()[:, None]
        rates = {n: None if tensors[n] is None else tensors[n].masked_fill(~real, 0.0) for n in ("step", "decay")}
        return cls(**tensors | rates, segments=segments)

    def chunks(self) -> Iterator[Steps]:
        """The chunks of the call in the order of their rows."""
        s = self.segments
        if self.keys.shape[2] == 1:
            yield replace(self, begins=s.begins[:, 0], opens=s.opens[:, 0])
            return
        parts = {name: getattr(self, name) for name in ("queries", "keys", "values", "step", "decay")}
        parts = {n: None if x is None else s.gather(x.transpose(1, 2)).transpose(2, 3) for n, x in parts.items()}
        for number in range(s.count):
            own = {name: None if x is None else x[:, number] for name, x in parts.items()}
            yield replace(self, **own, begins=s.begins[:, number], opens=s.opens[:, number])

    def joined(self, reads: list[Tensor]) -> Tensor:
        """The reads of all chunks `(batch, heads, places, width)` as `(batch, heads, time, width)`."""
        if self.keys.shape[2] == 1:
            return reads[0]
        return self.segments.scatter(torch.stack(reads, dim=1).transpose(2, 3)).transpose(1, 2)
