"""The gated recurrence of the keys as products of small matrices: no loop over time, no T x T array."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops.leaky_average.state import LeakyAverageState, at_least_float32, normalised, shortened

CHUNK = 32


def leaky_average(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, state: LeakyAverageState | None = None, eps: float = 0.0
) -> tuple[Tensor, LeakyAverageState]:
    """Equation 8 in chunks of `CHUNK` positions; see `mosaics.ops.leaky_average.leaky_average`."""
    dtype = inputs.dtype
    inputs, log_gate, log_decay = (at_least_float32(x) for x in (inputs, log_gate, log_decay))
    if state is None:
        state = LeakyAverageState.empty(inputs)
    averages, scales = _averages(inputs, log_gate, log_decay, *state)
    directions, norms = normalised(averages)
    log_norms = scales + norms.log()
    keys = shortened(directions, log_norms, eps).to(dtype)
    return keys, LeakyAverageState(directions[..., -1, :], log_norms[..., -1])


def _averages(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, first: Tensor, first_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """All averages `(batch, heads, time, width)`, each divided by the exponential of its scale `(batch, heads, time)`.

    The start of every chunk is again a leaky average, of the chunks before it: hence the recursion, which is as
    deep as the logarithm of the length.
    """
    time = inputs.shape[2]
    chunks = -(-time // CHUNK)
    size = -(-time // chunks)
    missing = chunks * size - time
    if missing:  # A position with a gate of 0 and a decay of 1 changes nothing.
        inputs = F.pad(inputs, (0, 0, 0, missing))
        log_gate = F.pad(log_gate, (0, missing), value=-torch.inf)
        log_decay = F.pad(log_decay, (0, missing))
    inputs, log_gate, log_decay = (x.unflatten(2, (chunks, size)) for x in (inputs, log_gate, log_decay))

    # log_weights[t, i]: what position i of a chunk weighs at position t; column `size` is what came before the chunk.
    older = torch.ones(size, size, dtype=torch.bool, device=inputs.device).tril(-1)
    between = log_decay[..., :, None].expand(*log_decay.shape, size).masked_fill(~older, 0.0).cumsum(-2)
    log_weights = (log_gate[..., None, :] + between).masked_fill(older.T, -torch.inf)
    since_start = log_decay.cumsum(-1)

    first, first_scale = first[:, :, None], first_scale[:, :, None]
    if chunks > 1:
        # What each chunk but the last adds, seen from its end.
        ends = log_weights[:, :, :-1, -1]
        end_scale = _finite_maximum(ends)
        added = ((ends - end_scale[..., None]).exp()[..., None, :] @ inputs[:, :, :-1]).squeeze(-2)
        end_scale = end_scale.masked_fill((ends == -torch.inf).all(-1), -torch.inf)
        later, later_scale = _averages(
            added, end_scale, since_start[:, :, :-1, -1], first[:, :, 0], first_scale[:, :, 0]
        )
        first = torch.cat([first, later], dim=2)
        first_scale = torch.cat([first_scale, later_scale], dim=2)

    log_weights = torch.cat([log_weights, (since_start + first_scale[..., None])[..., None]], dim=-1)
    scale = _finite_maximum(log_weights)
    averages = (log_weights - scale[..., None]).exp() @ torch.cat([inputs, first[..., None, :]], dim=-2)
    scale = scale.masked_fill((log_weights == -torch.inf).all(-1), -torch.inf)
    return averages.flatten(2, 3)[:, :, :time], scale.flatten(2, 3)[:, :, :time]


def _finite_maximum(log_weights: Tensor) -> Tensor:
    """The maximum over the last axis, 0 where there is nothing; a constant: the direction does not depend on it."""
    maximum = log_weights.detach().amax(-1)
    return maximum.masked_fill(maximum == -torch.inf, 0.0)
