"""Lattice chunk by chunk: since all gradients of a chunk are taken at its start, what every token reads, and the norms
of the slots that it reads, are a few products of small matrices; no token has slots of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops.lattice.state import EPS, LatticeState, Steps, inverse_norms


def lattice(
    initial: Tensor, steps: Steps, loss: str, renormalised: bool, state: LatticeState
) -> tuple[Tensor, LatticeState]:
    """See `mosaics.ops.lattice.lattice`."""
    reads = []
    for chunk in steps.chunks():
        state = state.opened(initial, chunk.begins, chunk.opens, renormalised)
        read, current = _chunk(chunk, loss, state)
        state = LatticeState(state.anchor, current)
        reads.append(read)
    return steps.joined(reads), state


def _chunk(chunk: Steps, loss: str, state: LatticeState) -> tuple[Tensor, Tensor]:
    """What the places read `(..., places, width)`, and the slots behind them."""
    current, inverse = state.current, inverse_norms(state.anchor)
    unit = state.anchor * inverse
    # A token adds to slot i its code c_i times what of h is orthogonal to it.
    codes, h = chunk.keys, chunk.values
    if loss == "decoding":
        h = h - codes @ unit
    elif loss == "encoding":
        codes = codes - h @ unit.mT
    codes = codes * inverse.mT

    left, passed = _decays(chunk)
    weighed = passed * chunk.step[..., None, :]  # place t has so much of what j wrote
    inner = h @ h.mT
    # Of u, the sum of what a slot was given: along the slot, along what it was, and its square, each (..., places,
    # slots). The square follows a recurrence: what a token adds to it is known from the tokens before.
    along = weighed @ (codes * (h @ unit.mT))
    kept = current - unit * (unit * current).sum(-1, keepdim=True)
    mixed = weighed @ (codes * (h @ kept.mT))
    scaled = codes * chunk.step[..., None]
    before = (weighed.tril(-1) * inner) @ codes
    square = passed.square() @ (scaled * (2 * before + scaled * inner.diagonal(dim1=-2, dim2=-1)[..., None]))
    # The Jacobian of the norm takes (2 - |unit|²) of the part along the slot out of the square: all of it but for EPS.
    length = unit.square().sum(-1)[..., None, :]
    added = (square - (2 - length) * along.square()).clamp(min=0)
    squares = left.square() * current.square().sum(-1)[..., None, :] + 2 * left * mixed + added

    asked = chunk.queries * (squares + EPS).rsqrt()
    read = left * (asked @ current) + (asked @ codes.mT * weighed) @ h - (asked * along) @ unit
    after = left[..., -1:, :] * current + (codes * weighed[..., -1, :, None]).mT @ h - along[..., -1, :, None] * unit
    return read, after


def _decays(chunk: Steps) -> tuple[Tensor, Tensor]:
    """What is left of the slots at hand `(..., places, 1)`, and in row t and column j of what j wrote; 0 above."""
    if chunk.decay is None:
        ones = torch.ones_like(chunk.step)
        return ones[..., None], (ones[..., :, None] * ones[..., None, :]).tril()
    sums = chunk.decay.cumsum(-1)
    differences = sums[..., :, None] - sums[..., None, :]
    later = torch.ones(differences.shape[-2:], dtype=torch.bool, device=sums.device).triu(1)
    return sums.exp()[..., None], differences.masked_fill(later, -torch.inf).exp()
