"""Stored pairs of which a read may leave out what matters little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mosaics.memories.contract.layout import Layout
from mosaics.memories.contract.pairs import Pairs
from mosaics.memories.contract.state import State, transient
from mosaics.ops.kernel_regression import Narrow
from mosaics.ops.kernel_regression.sketch import Sketched, sketch_of

MANY = 4096  # pairs; fewer are read sooner than chosen from
TOGETHER = 256  # keys that are sketched at once


@dataclass
class Sketch(State):
    """The oldest keys in 8 bits, as `Sketched` has them, in buffers like those of `Pairs`."""

    data: Tensor | None = None
    scale: Tensor | None = None
    radius: Tensor | None = None
    used: int = 0

    def extend(self, keys: Tensor | Narrow) -> None:
        """Sketch those of `keys`, which are all that are stored, that are not yet."""
        begin, end = self.used, keys.shape[2]
        new = sketch_of((keys.data if isinstance(keys, Narrow) else keys)[:, :, begin:end])
        for name, x in zip(("data", "scale", "radius"), new, strict=True):
            buffer = getattr(self, name)
            if buffer is None or end > buffer.shape[2] or buffer.is_inference() > torch.is_inference_mode_enabled():
                grown = x.new_empty(*x.shape[:2], end + end // 2, x.shape[3])
                if buffer is not None:
                    grown[:, :, :begin] = buffer[:, :, :begin]
                buffer = grown
                setattr(self, name, buffer)
            buffer[:, :, begin:end] = x
        self.used = end


@dataclass
class SketchedPairs(Pairs):
    """Pairs whose keys come with a sketch when one position reads many of them on a processor.

    Attributes:
        tolerance: the largest error of such a read, as a share of the length of the longest value.
        sketch: of the keys; none before there are `MANY`.
    """

    tolerance: float = transient(0.0)
    sketch: Sketch | None = transient()

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor | Narrow | Sketched, Tensor | Narrow]:
        one = keys.shape[2] == 1
        keys, values = super().append(keys, values)
        if one and self.tolerance and self.used >= MANY and self.keys.device.type == "cpu":
            keys = self._sketched(keys)
        return keys, values

    def _sketched(self, keys: Tensor | Narrow) -> Tensor | Narrow | Sketched:
        narrow = isinstance(keys, Narrow)
        if narrow and keys.scale is not None:  # they are in 8 bits themselves
            return Sketched(keys, keys.data, keys.scale, None, self.tolerance)
        if not narrow and torch.is_grad_enabled() and keys.requires_grad:
            return keys
        if self.sketch is None:
            self.sketch = Sketch()
        if self.used >= self.sketch.used + TOGETHER:
            self.sketch.extend(keys)
        end = self.sketch.used
        data, scale, radius = (x[:, :, :end] for x in (self.sketch.data, self.sketch.scale, self.sketch.radius))
        return Sketched(keys, data, scale, radius, self.tolerance)

    def settle(self, layout: Layout) -> None:
        if layout.length is not None:  # the rows are moved
            self.sketch = None
        super().settle(layout)

    def join(self, others: Sequence[State]) -> State:
        self.sketch = None  # made again sooner than joined
        return super().join(others)

    def release(self) -> None:
        self.sketch = None
        super().release()


Pairs.sketched = SketchedPairs
