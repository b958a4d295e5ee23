"""What belongs to one pass and is shared by all memories."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
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
        auxiliary_losses: losses that memories add; they count in training alone.
        reads: when a list, every memory that reads stored pairs appends a `Read`.
        stream: tensors by name that go into a block and come out of it: what systems carry from layer to layer. A block
            that is computed anew in the backward pass gets what was there when it was first computed.
    """

    draw: float | None = None
    embeddings: Tensor | None = None
    layout: Layout | None = None
    order: Tensor | None = None
    auxiliary_losses: list[Tensor] = field(default_factory=list)
    reads: list[Read] | None = None
    stream: dict[str, Tensor] = field(default_factory=dict)

    def apart(self) -> Context:
        """The same with a stream of its own and no auxiliary losses yet, for what may be computed twice."""
        return replace(self, stream=dict(self.stream), auxiliary_losses=[])

    def generator(self, name: str, layer_index: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator of random numbers for one use in one layer: always the same numbers within a step of training, in
        all its micro-batches and processes and when a block is computed anew; at evaluation always the same."""
        words = f"{0.0 if self.draw is None else self.draw!r}/{name}/{layer_index}".encode()
        return torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:8]) >> 1)

    def draw_integer(self, low: int, high: int) -> int | Tensor:
        """The step's draw as an integer between `low` and `high`, both included and all equally likely. In a graph that
        is made for a processor it is a tensor, so that the graph serves every draw."""
        count = high - low + 1
        if torch.compiler.is_compiling() and self.embeddings is not None and self.embeddings.device.type == "cpu":
            return low + (torch.ones((), dtype=torch.float64) * self.draw * count).long()
        return low + int(self.draw * count)


@dataclass(frozen=True)
class Read:
    """What one memory read: `weights` `(batch, heads, time, slots)`; a row sums to 1, or to 0 without pairs. Where a
    memory reads several stores together, the rows of all its reads do so.

    `memory` is the memory's name in its block; `contextual` says whether the slots are positions of the context, and
    not pairs that training filled. `residual` `(batch, heads, time)` is the share of a linear system that was left
    unsolved, for a memory that solves one to read.
    """

    memory: str
    layer_index: int
    weights: Tensor
    contextual: bool = True
    residual: Tensor | None = None
