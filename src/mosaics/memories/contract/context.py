"""What belongs to one pass and is shared by all memories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mosaics.memories.contract.layout import Layout


@dataclass
class Context:
    """What belongs to one forward pass and is shared by all memories.

    Attributes:
        draw: the step's random number in [0, 1), one for all layers, micro-batches and processes, from which a memory
            takes what it draws in training; None at evaluation and with a cache.
        embeddings: `(batch, time, d)`, the token embeddings in compact order.
        layout: what each position of the pass is, as the memories are given it.
        order: `(batch, time)`, the positions in compact order; None if they are so already.
        auxiliary_losses: losses that memories add for the trainer to sum.
        reads: when a list, every memory that reads stored pairs appends a `Read`.
        stream: what systems that pass memory from layer to layer carry.
    """

    draw: float | None = None
    embeddings: Tensor | None = None
    layout: Layout | None = None
    order: Tensor | None = None
    auxiliary_losses: list[Tensor] = field(default_factory=list)
    reads: list[Read] | None = None
    stream: dict[str, Any] = field(default_factory=dict)

    def draw_integer(self, low: int, high: int) -> int:
        """The step's draw as an integer between `low` and `high`, both included and all equally likely."""
        return low + int(self.draw * (high - low + 1))


@dataclass(frozen=True)
class Read:
    """What one memory read: `weights` `(batch, heads, time, slots)`; a row sums to 1, or to 0 without pairs.

    `memory` is the memory's name in its block; `contextual` says whether the slots are positions of the context, and
    not pairs that training filled.
    """

    memory: str
    layer_index: int
    weights: Tensor
    contextual: bool = True
