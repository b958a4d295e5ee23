"""What belongs to one pass and is shared by all memories."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
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
        reads: when a list, or what else has an `append`, every memory that has something to show appends a `Read`.
        without: names and types of memories that are left out of this pass, as if they were removed; what they have
            stored stays as it is.
        stream: tensors by name that go into a block and come out of it: what systems carry from layer to layer. A block
            that is computed anew in the backward pass gets what was there when it was first computed.
    """

    draw: float | None = None
    embeddings: Tensor | None = None
    layout: Layout | None = None
    order: Tensor | None = None
    auxiliary_losses: list[Tensor] = field(default_factory=list)
    reads: list | None = None  # of `Read`, which exported code does not need
    without: frozenset[str] = frozenset()
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
    r"""What one memory shows of a pass: how it read stored pairs, if it has any, and what else it declares.

    Weights are made when they are asked for, of as many positions as are wanted: all of them are as many as the square
    of the context. Where a memory reads several stores together, it shows a `Read` for each.

    Attributes:
        memory: the memory's name in its block.
        layer_index: the block's index, from 0.
        rows: of a slice of the positions, the weights `(batch, heads, positions, some slots)`, and the number of the
            first of these slots, which follow each other. A row sums to 1, or to 0 without pairs; those of several
            stores that are read together do so together. None: the memory has no pairs to show.
        slots: how many there are; where they are positions of the context, the last is that of the newest.
        span: the first of the slots that each position may read, and the one after the last, `(batch, time)` or
            `(time,)`; None: all slots.
        contextual: whether the slots are positions of the context, and not pairs that training filled.
        from_store: whether they are those of a `Store`, which were read before.
        residual: `(batch, heads, time)`, the share of a linear system that was left unsolved, for a memory that solves
            one to read.
        values: `(batch, heads, slots, width)`, of the pairs; None: not to be shown.
        answer: `(batch, heads, time, width)`, what was read: the weighted sum of the values.
        pull: takes directions `(batch, some positions, d)` in what the memory adds to the residual stream, and the
            slice of these positions, back to directions of the values `(batch, heads, positions, width)`: a value v
            read with the weight w moves the output by \( w\, v \cdot \mathrm{pull}(u) \) along u. What a gate or
            a norm multiplies it with counts as given.
        summary: makes the `mosaics.ops.kernel_regression.Summary` of the weights of all positions from what
            `summary` there calls `top`, `near` and `tokens`. None: it takes all weights.
        traces: numbers over time by name, `(batch, heads, time)`: gates, decays, step sizes, surprise, norms.
        recurrence: logarithms of the gates and of the decays, `(batch, heads, time)`, of a leaky average of tokens that
            the memory asks or stores with: at t it holds what s brought, times \( g_s \prod_{r=s+1}^{t} \lambda_r \).
            At a border of documents nothing is kept, whatever they say.
        maps: by name the shares `(batch, time, columns)` of each position in parts of the memory, as of a router.
    """

    memory: str
    layer_index: int
    rows: Callable[[slice], tuple[Tensor, int]] | None = None
    slots: int = 0
    span: tuple[Tensor, Tensor] | None = None
    contextual: bool = True
    from_store: bool = False
    residual: Tensor | None = None
    values: Tensor | None = None
    answer: Tensor | None = None
    pull: Callable[[Tensor, slice], Tensor] | None = None
    summary: Callable[[int, int, Tensor], Any] | None = None
    traces: dict[str, Tensor] = field(default_factory=dict)
    recurrence: tuple[Tensor, Tensor] | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Tensor | None:
        """`(batch, heads, time, slots)`, those of all positions; None if there are no pairs."""
        if self.rows is None:
            return None
        found, first = self.rows(slice(None))
        return F.pad(found, (first, self.slots - first - found.shape[-1]))

    def times(self, factor: Tensor) -> Read:
        """The same, of a part of a memory that multiplies the part's answer by `factor` `(batch, time, d)`."""
        inner = self.pull
        if inner is None:
            return self
        return replace(self, pull=lambda u, positions: inner(u * factor[:, positions].to(u.dtype), positions))
