"""The inner loop as written: one token after the other, gradients by automatic differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosaics.ops.inner_loop.network import Network, Norm
from mosaics.ops.inner_loop.retention import Retention
from mosaics.ops.inner_loop.state import InnerState, Steps, spread


def inner_loop(
    keys: Tensor,
    initial: Sequence[Tensor],
    steps: Steps,
    network: Network,
    retention: Retention,
    norm: Norm | None,
    scale: Tensor | None,
    state: InnerState,
) -> tuple[Tensor, InnerState]:
    """See `mosaics.ops.inner_loop.inner_loop`; the keys are those of the steps."""
    reads = []
    for chunk in steps.chunks():
        state = state.opened(initial, chunk.begins, chunk.opens, scale, retention)
        own = []
        for t in range(chunk.keys.shape[2]):
            now = slice(t, t + 1)
            slopes = _slopes(chunk, now, state.anchor, network, norm)
            real = chunk.filled[:, :, t, None, None]
            keep = 1.0 if chunk.momentum is None else chunk.momentum[:, :, t, None, None]
            if chunk.momentum is None and scale is None:
                keep = 0.0  # no momentum
            steps_taken = [_rows(chunk.step, t, g) * g for g in slopes]
            new = [keep * s - g for s, g in zip(state.momentum, steps_taken, strict=True)]
            momentum = [torch.where(real, n, s) for n, s in zip(new, state.momentum, strict=True)]
            current = state.current
            if scale is None:
                left = [1.0 if chunk.decay is None else 1 - _rows(chunk.decay, t, m) for m in current]
                after = [k * m + s for k, m, s in zip(left, current, momentum, strict=True)]
                current = [torch.where(real, a, m) for a, m in zip(after, current, strict=True)]
                read = [retention.weights(m) for m in current]
            else:
                rate = chunk.scale[:, :, t, None, None]
                read = [a + rate * s for a, s in zip(state.anchor, momentum, strict=True)]
            state = InnerState(state.anchor, current, momentum)
            own.append(network.answer(chunk.queries[:, :, now], read, norm))
        reads.append(torch.cat(own, dim=2))
    return steps.joined(reads), state


def _slopes(chunk: Steps, now: slice, weights: list[Tensor], network: Network, norm: Norm | None) -> Sequence[Tensor]:
    """The gradient of a token's loss by each map."""
    key, value = chunk.keys[:, :, now], chunk.values[:, :, now]
    delta = None if chunk.delta is None else spread(chunk.delta[:, :, now], value.shape[-1])
    with torch.enable_grad():
        weights = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
        answer = network.answer(key, weights, norm)
        if network.loss.smooth:  # its errors are the definition
            error = network.loss.errors(answer, value, delta)
        else:
            loss = network.loss.values(answer, value, delta).sum()
            (error,) = torch.autograd.grad(loss, answer, create_graph=True)
        return torch.autograd.grad(answer, weights, error, create_graph=True)


def _rows(x: Tensor, t: int, weights: Tensor) -> Tensor:
    """What place t has for each unit of a map, for all its inputs."""
    return spread(x[:, :, t], weights.shape[-1])[..., None, :]
