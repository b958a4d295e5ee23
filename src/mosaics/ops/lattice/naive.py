"""Lattice as written: one token after the other, gradients by automatic differentiation."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops.lattice.state import LatticeState, Steps, normalised

# Of unit slots (..., slots, width), a key (..., 1, slots) and a value (..., 1, width).
LOSSES = {
    "decoding": lambda slots, key, value: 0.5 * (value - key @ slots).square().sum(),
    "encoding": lambda slots, key, value: 0.5 * (key - value @ slots.mT).square().sum(),
    "similarity": lambda slots, key, value: -(key @ slots * value).sum(),
}


def lattice(
    initial: Tensor, steps: Steps, loss: str, renormalised: bool, state: LatticeState
) -> tuple[Tensor, LatticeState]:
    """See `mosaics.ops.lattice.lattice`."""
    reads = []
    for chunk in steps.chunks():
        state = state.opened(initial, chunk.begins, chunk.opens, renormalised)
        own = []
        for t in range(chunk.keys.shape[2]):
            now = slice(t, t + 1)
            with torch.enable_grad():
                anchor = state.anchor if state.anchor.requires_grad else state.anchor.detach().requires_grad_()
                found = LOSSES[loss](normalised(anchor), chunk.keys[:, :, now], chunk.values[:, :, now])
                (slope,) = torch.autograd.grad(found, anchor, create_graph=True)
            current = state.current
            if chunk.decay is not None:
                current = chunk.decay[:, :, t, None, None].exp() * current
            state = LatticeState(state.anchor, current - chunk.step[:, :, t, None, None] * slope)
            own.append(chunk.queries[:, :, now] @ normalised(state.current))
        reads.append(torch.cat(own, dim=2))
    return steps.joined(reads), state
