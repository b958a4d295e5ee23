"""The inner loop chunk by chunk: since all gradients of a chunk are taken at its start, each is a product of two
vectors, and what every token reads is a few products of small matrices."""

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
        left, kept, weighed, carried, ends = _coefficients(chunk)
        inputs, errors = network.gradients(state.anchor, chunk.keys, chunk.values, norm)
        x, current, momentum = chunk.queries, [], []
        for number, (given, error) in enumerate(zip(inputs, errors, strict=True)):
            x = network.with_bias(network.active(x) if number else x)
            weights = state.anchor[number] if chunk.scale is not None else state.current[number]
            read = left * (x @ weights) - (x @ given.mT * weighed) @ error
            if carried is not None:
                read = read + carried * (x @ state.momentum[number])
            last = (given * weighed[..., -1, :, None]).mT @ error
            if chunk.scale is None:
                after = left[..., -1:, :] * weights - last
                if carried is not None:
                    after = after + carried[..., -1:, :] * state.momentum[number]
                current.append(after)
            else:
                current.append(state.current[number])
            if ends is not None:
                momentum.append(kept * state.momentum[number] - (given * ends[..., None]).mT @ error)
            else:
                momentum.append(state.momentum[number])
            x = read
        state = InnerState(state.anchor, current, momentum)
        reads.append(x)
    return steps.joined(reads), state


def _products(factors: Tensor) -> Tensor:
    """`(..., n)` factors to `(..., n, n)`: in row t and column j the product of those after j up to t; 0 above."""
    size = factors.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=factors.device).tril(-1)
    return torch.where(later, factors[..., :, None], 1.0).cumprod(-2).tril()


def _coefficients(chunk: Steps) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """How the weights that place t reads are made: `left` of those at hand, `carried` of the momentum, less `weighed`
    of each gradient; and of the momentum at the end what was `kept` and each gradient's share `ends`."""
    step = chunk.step * chunk.filled
    ones = torch.ones_like(step)
    if chunk.scale is not None:
        weighed = (chunk.scale[..., :, None] * step[..., None, :]).tril()
        return ones[..., None], ones[..., :1, None], weighed, chunk.scale[..., None], step
    decay = ones if chunk.decay is None else torch.where(chunk.filled, 1 - chunk.decay, 1.0)
    products = _products(decay)
    left = decay.cumprod(-1)[..., None]
    if chunk.momentum is None:
        return left, None, products * step[..., None, :], None, None
    # A place without a token has no step, and adds no momentum a second time.
    eta = torch.where(chunk.filled, chunk.momentum, 1.0)
    passed, since = _products(eta), eta.cumprod(-1)
    taken = products * chunk.filled[..., None, :]
    weighed = taken @ passed * step[..., None, :]
    carried = taken @ since[..., None]
    return left, since[..., -1:, None], weighed, carried, passed[..., -1, :] * step
