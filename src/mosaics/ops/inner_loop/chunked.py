"""The inner loop chunk by chunk: since all gradients of a chunk are taken at its start, each is a product of two
vectors, and what every token reads is a few products of small matrices, or of the sums that a retention is taken of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
        shares = _Shares.of(chunk)
        step = chunk.step * chunk.filled[..., None]
        delta = None if chunk.delta is None else spread(chunk.delta, chunk.values.shape[-1])
        inputs, errors = network.gradients(state.anchor, chunk.keys, chunk.values, delta, norm)
        x, current, momentum = chunk.queries, [], []
        for number, (given, error) in enumerate(zip(inputs, errors, strict=True)):
            x = network.with_bias(network.active(x) if number else x)
            error = spread(step, error.shape[-1]) * error
            weights = state.anchor[number] if chunk.scale is not None else state.current[number]
            old = state.momentum[number] if shares.carried is not None else None
            if retention.linear:
                x = _read(x, weights, old, shares, given, error)
            elif torch.is_grad_enabled():  # what each token reads is as large as the weights: made again when needed
                x = checkpoint(
                    _retained, x, weights, old, shares, given, error, retention,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                x = _retained(x, weights, old, shares, given, error, retention)
            now = state.current[number]
            current.append(now if chunk.scale is not None else _last(now, old, shares, given, error))
            momentum.append(state.momentum[number])
            if shares.ends is not None:
                momentum[-1] = shares.kept * momentum[-1] - (given * shares.ends).mT @ error
        state = InnerState(state.anchor, current, momentum)
        reads.append(network.completed(x, chunk.queries, norm))
    return steps.joined(reads), state


class _Shares(NamedTuple):
    """What place t has of everything: `left` `(batch, heads, time, channels)` of the weights at hand, `carried` of the
    momentum, less `weighed` `(batch, heads, channels, time, time)` of each step. And the momentum at the end: `kept`
    `(batch, heads, 1, 1)` of it, less `ends` `(batch, heads, time, 1)` of each step."""

    left: Tensor
    weighed: Tensor
    carried: Tensor | None
    kept: Tensor | None
    ends: Tensor | None

    @classmethod
    def of(cls, chunk: Steps) -> _Shares:
        filled = chunk.filled[:, :, None]
        ones = torch.ones_like(chunk.keys[:, :1, :, 0])[:, :, None]  # (batch, 1, 1, time)
        if chunk.scale is not None:
            weighed = (chunk.scale[:, :, None, :, None] * ones[..., None, :]).tril()
            return cls(ones.mT, weighed, chunk.scale[..., None], ones[..., :1], ones.mT)
        decay = ones if chunk.decay is None else torch.where(filled, 1 - chunk.decay.mT, 1.0)
        products, left = _products(decay), decay.cumprod(-1).mT
        if chunk.momentum is None:
            return cls(left, products, None, None, None)
        # A place without a token adds no momentum a second time.
        eta = torch.where(filled, chunk.momentum[:, :, None], 1.0)
        passed, since = _products(eta), eta.cumprod(-1)
        taken = products * filled[..., None, :]
        carried = (taken @ since[..., None])[..., 0].mT
        return cls(left, taken @ passed, carried, since[..., -1:], passed[:, :, 0, -1, :, None])


def _products(factors: Tensor) -> Tensor:
    """`(..., n)` factors to `(..., n, n)`: in row t and column j the product of those after j up to t; 0 above."""
    size = factors.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=factors.device).tril(-1)
    return torch.where(later, factors[..., :, None], 1.0).cumprod(-2).tril()


def _read(x: Tensor, weights: Tensor, momentum: Tensor | None, shares: _Shares, given: Tensor, error: Tensor) -> Tensor:
    """What the weights of every place make of its own x; `error` times the step is that of the inputs `given`."""
    units = weights.shape[-1]
    read = spread(shares.left, units) * (x @ weights) - _mixed((x @ given.mT)[:, :, None] * shares.weighed, error)
    return read if momentum is None else read + spread(shares.carried, units) * (x @ momentum)


def _retained(
    x: Tensor,
    weights: Tensor,
    momentum: Tensor | None,
    shares: _Shares,
    given: Tensor,
    error: Tensor,
    retention: Retention,
) -> Tensor:
    """The same with weights that a retention makes of the sums of every place, as many numbers for each place as the
    map has; in parts `(batch, heads, channels, time, units of a channel, inputs)`."""
    channels = shares.weighed.shape[2]
    steps = _parts(error, channels)[..., None] * given[:, :, None, :, None, :]
    sums = (-shares.weighed @ steps.flatten(-2)).unflatten(-1, steps.shape[-2:])
    sums = torch.addcmul(sums, shares.left.mT[..., None, None], _parts(weights, channels).mT[:, :, :, None])
    if momentum is not None:
        sums = torch.addcmul(sums, shares.carried.mT[..., None, None], _parts(momentum, channels).mT[:, :, :, None])
    dims = {"inputs": -1, "outputs": (2, -2)}
    if retention.scales:
        return _read(x, weights, momentum, shares, given, error) / retention.size(sums, **dims)[:, :, 0, :, 0]
    read = retention.weights(sums, **dims) @ x[:, :, None, ..., None]
    return read[..., 0].movedim(2, -1).flatten(-2)


def _last(weights: Tensor, momentum: Tensor | None, shares: _Shares, given: Tensor, error: Tensor) -> Tensor:
    """The weights, or their sums, of the last place."""
    units = weights.shape[-1]
    after = spread(shares.left[:, :, -1:], units) * weights
    after = after - given.mT @ (spread(shares.weighed[..., -1, :].mT, units) * error)
    return after if momentum is None else after + spread(shares.carried[:, :, -1:], units) * momentum


def _mixed(weights: Tensor, rows: Tensor) -> Tensor:
    """`weights` `(batch, heads, channels, n, m)` of `rows` `(batch, heads, m, units)`, each channel of its units."""
    channels = weights.shape[2]
    if channels == 1:
        return weights[:, :, 0] @ rows
    return (weights @ _parts(rows, channels)).movedim(2, -1).flatten(-2)


def _parts(x: Tensor, channels: int) -> Tensor:
    """`(batch, heads, n, units)` as `(batch, heads, channels, n, units of a channel)`."""
    return x.unflatten(-1, (-1, channels)).movedim(-1, 2)
