"""How a call is cut into its chunks, for ops that are defined by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ChunkSteps:
    """What tokens bring, `(batch, heads, time, ...)`; of a chunk `time` are its places, and `begins`, `opens` are set.

    Attributes:
        keys: `(batch, heads, time, width)`.
        segments: of the call, as `Layout.segments` gives them.
        begins: `(batch,)`, whether the chunk is the first of a document.
        opens: `(batch,)`, whether it begins in this call.
    """

    PARTS: ClassVar[tuple[str, ...]]  # what of a subclass's fields is cut; each may be None

    keys: Tensor
    segments: Any
    begins: Tensor | None = None
    opens: Tensor | None = None

    def chunks(self) -> Iterator[Any]:
        """The chunks of the call in the order of their rows."""
        s = self.segments
        if self.keys.shape[2] == 1:
            yield replace(self, begins=s.begins[:, 0], opens=s.opens[:, 0])
            return
        parts = {name: getattr(self, name) for name in self.PARTS}
        parts = {n: None if x is None else s.gather(x.transpose(1, 2)).transpose(2, 3) for n, x in parts.items()}
        for number in range(s.count):
            own = {name: None if x is None else x[:, number] for name, x in parts.items()}
            yield replace(self, **own, begins=s.begins[:, number], opens=s.opens[:, number])

    def joined(self, reads: list[Tensor]) -> Tensor:
        """The reads of all chunks `(batch, heads, places, width)` as `(batch, heads, time, width)`."""
        if self.keys.shape[2] == 1:
            return reads[0]
        return self.segments.scatter(torch.stack(reads, dim=1).transpose(2, 3)).transpose(1, 2)


def filled_positions(segments: Any) -> Tensor:
    """`(batch, 1, time)`, where a call has tokens and no padding."""
    return segments.scatter(segments.filled.long()[..., None])[..., 0].bool()[:, None]
