"""The inner loop as written: one token after the other, gradients by automatic differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosaics.ops.inner_loop.network import Network, Norm
from mosaics.ops.inner_loop.retention import Retention
from mosaics.ops.inner_loop.state import InnerState, Steps, sizes, spread
from mosaics.ops.newton_schulz import newton_schulz


def inner_loop(
    keys: Tensor,
    initial: Sequence[Tensor],
    steps: Steps,
    network: Network,
    retention: Retention,
    orthogonal: int,
    norm: Norm | None,
    scale: Tensor | None,
    state: InnerState,
    seen: list[Tensor] | None = None,
) -> tuple[Tensor, InnerState]:
    """See `mosaics.ops.inner_loop.inner_loop`; the keys are those of the steps."""
    reads = []
    for chunk in steps.chunks():
        state = state.opened(initial, chunk.begins, chunk.opens, scale, retention)
        own, places = [], []
        for t in range(chunk.keys.shape[2]):
            now = slice(t, t + 1)
            inputs, errors = _slopes(chunk, now, state.anchor, network, norm)
            if seen is not None:
                places.append(sizes(inputs, errors, state.anchor).detach())
            errors = [spread(chunk.step[:, :, now], e.shape[-1]) * e for e in errors]
            real = chunk.filled[:, :, t, None, None]
            keep = 1.0 if chunk.momentum is None else chunk.momentum[:, :, t, None, None]
            if chunk.momentum is None and scale is None:
                keep = 0.0  # no momentum
            older = state.inputs, state.errors
            if chunk.window is not None:
                inputs, errors = (
                    [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
                    for old, new in zip(older, (inputs, errors), strict=True)
                )
                older = ([torch.where(real, x[:, :, 1:], x[:, :, :-1]) for x in own] for own in (inputs, errors))
                errors = [chunk.window[:, :, t].flip(-1)[..., None] * e for e in errors]
            new = [keep * s - x.mT @ e for s, x, e in zip(state.momentum, inputs, errors, strict=True)]
            momentum = [torch.where(real, n, s) for n, s in zip(new, state.momentum, strict=True)]
            current = state.current
            if scale is None:
                left = [1.0 if chunk.decay is None else 1 - _rows(chunk.decay, t, m) for m in current]
                writes = [_written(s, network.halves(n, len(current)), orthogonal) for n, s in enumerate(momentum)]
                rate = 1.0 if chunk.rate is None else chunk.rate[:, :, t, None, None]
                after = [k * m + rate * w for k, m, w in zip(left, current, writes, strict=True)]
                current = [torch.where(real, a, m) for a, m in zip(after, current, strict=True)]
                read = [retention.weights(m) for m in current]
            else:
                rate = chunk.scale[:, :, t, None, None]
                read = [a + rate * s for a, s in zip(state.anchor, momentum, strict=True)]
            state = InnerState(state.anchor, current, momentum, *older)
            own.append(network.answer(chunk.queries[:, :, now], read, norm))
        reads.append(torch.cat(own, dim=2))
        if seen is not None:
            seen.append(torch.cat(places, dim=2))
    return steps.joined(reads), state


def _slopes(
    chunk: Steps, now: slice, weights: list[Tensor], network: Network, norm: Norm | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The gradient of a token's loss by each map: x e^T of its input x and e, the gradient by what it makes of x."""
    key, value = chunk.keys[:, :, now], chunk.values[:, :, now]
    delta = None if chunk.delta is None else spread(chunk.delta[:, :, now], value.shape[-1])
    with torch.enable_grad():
        weights = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
        inputs, sums = network.through(key, weights)
        answer = network.completed(sums[-1], key, norm)
        if network.loss.smooth:  # its errors are the definition
            error = network.loss.errors(answer, value, delta)
        else:
            loss = network.loss.values(answer, value, delta).sum()
            (error,) = torch.autograd.grad(loss, answer, create_graph=True)
        return inputs, torch.autograd.grad(answer, sums, error, create_graph=True)


def _written(momentum: Tensor, halves: int, orthogonal: int) -> Tensor:
    """What is written of a map's momentum."""
    if not orthogonal:
        return momentum
    return torch.cat([newton_schulz(m, orthogonal, form="naive") for m in momentum.chunk(halves, -1)], -1)


def _rows(x: Tensor, t: int, weights: Tensor) -> Tensor:
    """What place t has for each unit of a map, for all its inputs."""
    return spread(x[:, :, t], weights.shape[-1])[..., None, :]
