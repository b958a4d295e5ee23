"""What Lattice carries, and what tokens bring to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaics.ops.chunks import ChunkSteps, filled_positions

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


@dataclass(frozen=True, kw_only=True)
class Steps(ChunkSteps):
    """What tokens bring.

    Attributes:
        queries: as the keys, `(batch, heads, time, slots)`.
        values: `(batch, heads, time, width)`.
        step: 0 where there is no token.
        decay: the logarithm of what is kept, 0 where there is no token; or None.
    """

    PARTS = ("queries", "keys", "values", "step", "decay")

    queries: Tensor
    values: Tensor
    step: Tensor
    decay: Tensor | None

    @classmethod
    def of(cls, tensors: dict[str, Tensor | None], segments: Any) -> Steps:
        """The steps of a call, with those of padding without effect."""
        real = filled_positions(segments)
        rates = {n: None if tensors[n] is None else tensors[n].masked_fill(~real, 0.0) for n in ("step", "decay")}
        return cls(**tensors | rates, segments=segments)
