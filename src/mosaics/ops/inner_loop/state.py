"""What the inner loop carries, and what tokens bring to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaics.ops.chunks import ChunkSteps, filled_positions
from mosaics.ops.inner_loop.retention import Retention


class InnerState(NamedTuple):
    """For each map `(batch, heads, inputs, outputs)`: the weights at the start of the open chunk, at which gradients
    are taken; the weights now, or the sums that a retention makes them of; and the momentum (or, with a scale, the sum
    of the chunk's steps). With a window also what the gradients of all its tokens but the newest are made of, from
    the oldest: inputs, and errors times steps, `(batch, heads, window - 1, inputs or outputs)`; 0 where there was no
    token."""

    anchor: list[Tensor]
    current: list[Tensor]
    momentum: list[Tensor]
    inputs: Sequence[Tensor] = ()
    errors: Sequence[Tensor] = ()

    @classmethod
    def first(cls, initial: Sequence[Tensor], batch: int, dtype: torch.dtype, window: int | None = None) -> InnerState:
        """Before the first token; `initial` are `(heads, inputs, outputs)`."""
        weights = [w.to(dtype).expand(batch, *w.shape) for w in initial]
        older = [[], []]
        if window is not None:
            older = [[w.new_zeros(*w.shape[:2], window - 1, w.shape[dim]) for w in weights] for dim in (2, 3)]
        return cls(weights, weights, [torch.zeros_like(w) for w in weights], *older)

    def opened(
        self, initial: Sequence[Tensor], begins: Tensor, opens: Tensor, scale: Tensor | None, retention: Retention
    ) -> InnerState:
        """Where a chunk opens `(batch,)`; where a document begins `(batch,)`, all is as at first."""
        begins, opens = (x[:, None, None, None] for x in (begins, opens))
        current, momentum = self.current, self.momentum
        if scale is not None:  # the last place of a chunk decides what is left of it
            ended = [a + scale[-1].to(a.dtype) * s for a, s in zip(self.anchor, momentum, strict=True)]
            current = [torch.where(opens, e, m) for e, m in zip(ended, current, strict=True)]
            momentum = [torch.where(opens, torch.zeros_like(s), s) for s in momentum]
        current = [torch.where(begins, w.to(m.dtype)[None], m) for w, m in zip(initial, current, strict=True)]
        momentum = [torch.where(begins, torch.zeros_like(s), s) for s in momentum]
        weights = [retention.weights(m) for m in current]
        if retention.goes_on_from_weights:
            current = [torch.where(opens, w, m) for w, m in zip(weights, current, strict=True)]
        anchor = [torch.where(opens, w, a) for w, a in zip(weights, self.anchor, strict=True)]
        older = ([torch.where(begins, 0.0, x) for x in rows] for rows in (self.inputs, self.errors))
        return InnerState(anchor, current, momentum, *older)


@dataclass(frozen=True, kw_only=True)
class Steps(ChunkSteps):
    """What tokens bring; what has channels is repeated for the units of a map, see `spread`.

    Attributes:
        queries, values: `(batch, heads, time, width)`.
        step: the step size theta, `(batch, heads, time, channels)`; 0 where there is no token.
        momentum: eta, or None.
        window: gamma, `(batch, heads, time, tokens)`, or None.
        rate: of the write, `(batch, heads, time)`, or None.
        decay: alpha, `(batch, heads, time, channels)`, or None.
        delta: of the loss, `(batch, heads, time, channels)`, or None.
        scale: `(batch, 1, time)`, or None.
        filled: `(batch, 1, time)`, where there are tokens.
    """

    PARTS = ("queries", "keys", "values", "step", "momentum", "window", "rate", "decay", "delta", "scale", "filled")

    queries: Tensor
    values: Tensor
    step: Tensor
    momentum: Tensor | None
    window: Tensor | None
    rate: Tensor | None
    decay: Tensor | None
    delta: Tensor | None
    scale: Tensor | None
    filled: Tensor

    @classmethod
    def of(cls, tensors: dict[str, Tensor | None], scale: Tensor | None, segments: Any) -> Steps:
        """The steps of a call, with those of padding without effect."""
        filled = filled_positions(segments)
        scales = None if scale is None else scale[segments.position[:, None]]
        for name in ("step", "decay", "delta"):
            x = tensors[name]
            tensors[name] = x[..., None] if x is not None and x.dim() == 3 else x
        return cls(**tensors, scale=scales, filled=filled, segments=segments)


def newest(rows: Tensor, filled: Tensor) -> Tensor:
    """Of n older rows and those of a chunk's places, `(batch, heads, n + time, width)`, the last n, where places count
    that are `filled` `(batch, 1, time)`, which have no gaps."""
    count = rows.shape[2] - filled.shape[-1]
    number = torch.arange(count, device=rows.device) + filled.sum(-1)  # (batch, n)
    number = torch.where(number < count, number, number + filled.long().argmax(-1))
    return rows.gather(2, number[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def sizes(inputs: Sequence[Tensor], errors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """`(batch, heads, time, 2)`: norms of the gradients of all maps, each the product of an input and an error, and of
    the weights `(batch, heads, inputs, outputs)`."""
    squares = [(x.square().sum(-1) * e.square().sum(-1)) for x, e in zip(inputs, errors, strict=True)]
    of_weights = torch.stack([w.square().sum((-2, -1)) for w in weights]).sum(0).sqrt()
    gradient = torch.stack(squares).sum(0).sqrt()
    return torch.stack([gradient, of_weights[..., None].expand_as(gradient)], dim=-1)


def spread(x: Tensor, units: int) -> Tensor:
    """`(..., channels)` as `(..., units)`: channel c is that of the units c, c + channels, ...; one channel stays."""
    return x if x.shape[-1] == 1 else x.repeat(*[1] * (x.dim() - 1), units // x.shape[-1])
