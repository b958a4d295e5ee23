"""The inner loop as written: one token after the other, gradients by automatic differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosaics.ops.inner_loop.network import Network
from mosaics.ops.inner_loop.state import InnerState, Steps


def inner_loop(
    keys: Tensor,
    initial: Sequence[Tensor],
    steps: Steps,
    network: Network,
    norm: tuple[Tensor, Tensor] | None,
    scale: Tensor | None,
    state: InnerState,
) -> tuple[Tensor, InnerState]:
    """See `mosaics.ops.inner_loop.inner_loop`; the keys are those of the steps."""
    reads = []
    for chunk in steps.chunks():
        state = state.opened(initial, chunk.begins, chunk.opens, scale)
        own = []
        for t in range(chunk.keys.shape[2]):
            now = slice(t, t + 1)
            key, value, step = chunk.keys[:, :, now], chunk.values[:, :, now], chunk.step[:, :, t]
            with torch.enable_grad():
                anchor = [w if w.requires_grad else w.detach().requires_grad_() for w in state.anchor]
                loss = network.losses(network.answer(key, anchor), key, value, norm).sum()
                slopes = torch.autograd.grad(loss, anchor, create_graph=True)
            by = step[..., None, None]
            real = chunk.filled[:, :, t, None, None]
            keep = 1.0 if chunk.momentum is None else chunk.momentum[:, :, t, None, None]
            if chunk.momentum is None and scale is None:
                keep = 0.0  # no momentum
            new = [keep * s - by * g for s, g in zip(state.momentum, slopes, strict=True)]
            momentum = [torch.where(real, n, s) for n, s in zip(new, state.momentum, strict=True)]
            current = state.current
            if scale is None:
                left = 1.0 if chunk.decay is None else 1 - chunk.decay[:, :, t, None, None]
                current = [torch.where(real, left * m + s, m) for m, s in zip(current, momentum, strict=True)]
                read = current
            else:
                rate = chunk.scale[:, :, t, None, None]
                read = [a + rate * s for a, s in zip(state.anchor, momentum, strict=True)]
            state = InnerState(state.anchor, current, momentum)
            own.append(network.answer(chunk.queries[:, :, now], read))
        reads.append(torch.cat(own, dim=2))
    return steps.joined(reads), state
