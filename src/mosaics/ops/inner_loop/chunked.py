"""The inner loop chunk by chunk: since all gradients of a chunk are taken at its start, each is a product of two
vectors, and what every token reads is a few products of small matrices, or of the sums that a retention is taken of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mosaics.ops.heap import give_back
from mosaics.ops.inner_loop.network import Network, Norm
from mosaics.ops.inner_loop.retention import Retention
from mosaics.ops.inner_loop.state import InnerState, Steps, newest, sizes, spread
from mosaics.ops.newton_schulz import newton_schulz

DIMS = {"inputs": -1, "outputs": (2, -2)}  # of sums in parts


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
        shares = _Shares.of(chunk, orthogonal > 0)
        step = chunk.step * chunk.filled[..., None]
        delta = None if chunk.delta is None else spread(chunk.delta, chunk.values.shape[-1])
        inputs, errors = network.gradients(state.anchor, chunk.keys, chunk.values, delta, norm)
        if seen is not None:
            seen.append(sizes(inputs, errors, state.anchor))
        errors = [spread(step, e.shape[-1]) * e for e in errors]
        older = (), ()
        if chunk.window is not None:
            inputs, errors = (
                [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
                for old, new in ((state.inputs, inputs), (state.errors, errors))
            )
            older = ([newest(x, chunk.filled) for x in rows] for rows in (inputs, errors))
        x, current, momentum = chunk.queries, [], []
        for number, (given, error) in enumerate(zip(inputs, errors, strict=True)):
            x = network.with_bias(network.active(x) if number else x)
            weights = state.anchor[number] if chunk.scale is not None else state.current[number]
            old = state.momentum[number] if shares.carried is not None else None
            if orthogonal:
                halves = network.halves(number, len(inputs))
                more = retention, orthogonal, halves
                x, now = _again(_orthogonal, x, weights, old, shares, given, error, *more, large=True)
            elif retention.linear:
                x = _read(x, weights, old, shares, given, error)
            else:
                x = _again(_retained, x, weights, old, shares, given, error, retention)
            if not orthogonal:
                now = state.current[number]
                now = now if chunk.scale is not None else _last(now, old, shares, given, error)
            current.append(now)
            momentum.append(state.momentum[number])
            if shares.ends is not None:
                momentum[-1] = shares.kept * momentum[-1] - (given * shares.ends).mT @ error
        state = InnerState(state.anchor, current, momentum, *older)
        reads.append(network.completed(x, chunk.queries, norm))
    return steps.joined(reads), state


class _Shares(NamedTuple):
    """What place t has of everything: `left` `(batch, heads, time, channels)` of the weights at hand, `carried` of the
    momentum, less `weighed` `(batch, heads, channels, time, steps)` of each step. And the momentum at the end: `kept`
    `(batch, heads, 1, 1)` of it, less `ends` `(batch, heads, steps, 1)` of each step. Steps are those of the window's
    older tokens, then of the chunk's places.

    Where what is written is no linear function of the momentum, `weighed` is that of the writes `(..., time, time)`,
    `carried` and `passed` `(batch, heads, time, steps)` what the momentum of place t has of the momentum and steps."""

    left: Tensor
    weighed: Tensor
    carried: Tensor | None
    kept: Tensor | None
    ends: Tensor | None
    passed: Tensor | None = None

    @classmethod
    def of(cls, chunk: Steps, orthogonal: bool) -> _Shares:
        filled = chunk.filled[:, :, None]
        ones = torch.ones_like(chunk.keys[:, :1, :, 0])[:, :, None]  # (batch, 1, 1, time)
        if chunk.scale is not None:
            weighed = (chunk.scale[:, :, None, :, None] * ones[..., None, :]).tril()
            return cls(ones.mT, weighed, chunk.scale[..., None], ones[..., :1], ones.mT)
        decay = ones if chunk.decay is None else torch.where(filled, 1 - chunk.decay.mT, 1.0)
        products, left = _products(decay), decay.cumprod(-1).mT
        written = products * filled[..., None, :]  # a place without a token adds no momentum a second time
        if chunk.rate is not None:
            written = written * chunk.rate[:, :, None, None]
        passed = None if chunk.window is None else _band(chunk.window, chunk.filled)
        carried = kept = ends = since = None
        if chunk.momentum is not None:
            eta = torch.where(filled, chunk.momentum[:, :, None], 1.0)
            own, since = _products(eta), eta.cumprod(-1)
            passed = own if passed is None else own @ passed
            carried, since = (written @ since[..., None])[..., 0].mT, since.mT
            kept, ends = since[..., -1:, :], passed[:, :, 0, -1, :, None]
        if orthogonal:
            passed = torch.eye(ones.shape[-1]).to(ones) if passed is None else passed[:, :, 0]
            return cls(left, written, since, kept, ends, passed)
        return cls(left, written if passed is None else written @ passed, carried, kept, ends)


def _band(window: Tensor, filled: Tensor) -> Tensor:
    """`(batch, heads, time, tokens)` of a window to `(batch, heads, 1, time, tokens - 1 + time)`: what the place of
    each row has of the gradients before the chunk and in it."""
    size = window.shape[-1]
    place = size - 2 + filled.cumsum(-1)  # of each token in the row of those before and its own
    before = torch.arange(size - 1, device=window.device).expand(*filled.shape[:2], -1)
    since = place[..., None] - torch.cat([before, place], dim=-1)[..., None, :]
    within = (since >= 0) & (since < size) & filled[..., None]
    weights = window.gather(-1, since.clamp(0, size - 1).expand(-1, window.shape[1], -1, -1))
    return torch.where(within, weights, 0.0)[:, :, None]


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
    if retention.scales:
        return _read(x, weights, momentum, shares, given, error) / retention.size(sums, **DIMS)[:, :, 0, :, 0]
    return _answered(x, sums, retention)


def _orthogonal(
    x: Tensor,
    weights: Tensor,
    momentum: Tensor | None,
    shares: _Shares,
    given: Tensor,
    error: Tensor,
    retention: Retention,
    iterations: int,
    halves: int,
) -> tuple[Tensor, Tensor]:
    """The same with writes that are the momentum of each place made nearly orthogonal; and the sums of the last."""
    channels = shares.weighed.shape[2]
    steps = error[..., None, :] * given[..., None]
    writes = (-shares.passed @ steps.flatten(-2)).unflatten(-1, steps.shape[-2:])
    if momentum is not None:
        writes = torch.addcmul(writes, shares.carried[..., None], momentum[:, :, None])
    writes = torch.cat([newton_schulz(m, iterations) for m in writes.chunk(halves, -1)], dim=-1)
    writes = writes.unflatten(-1, (-1, channels)).permute(0, 1, 5, 2, 4, 3)
    sums = (shares.weighed @ writes.flatten(-2)).unflatten(-1, writes.shape[-2:])
    sums = torch.addcmul(sums, shares.left.mT[..., None, None], _parts(weights, channels).mT[:, :, :, None])
    return _answered(x, sums, retention), sums[:, :, :, -1].permute(0, 1, 4, 3, 2).flatten(-2)


def _answered(x: Tensor, sums: Tensor, retention: Retention) -> Tensor:
    """What the weights of the sums of every place, in parts, make of its x."""
    read = retention.weights(sums, **DIMS) @ x[:, :, None, ..., None]
    return read[..., 0].movedim(2, -1).flatten(-2)


def _again(function: Callable, *given: Any, large: bool = False) -> Any:
    """What it gives; what each token reads is as large as the weights, and made again in the backward pass. If that is
    `large`, the heap is given back between chunks: with Muon it would hold twenty times of what is kept."""
    if not torch.is_grad_enabled():
        return function(*given)

    def run(*given: Any) -> Any:
        if large:
            give_back(given[0].device)
        return function(*given)

    return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)


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
