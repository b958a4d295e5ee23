"""The gated recurrence of the keys, token by token: the definition that every faster form is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops.leaky_average.state import LeakyAverageState, at_least_float32, normalised, shortened


def leaky_average(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, state: LeakyAverageState | None = None, eps: float = 0.0
) -> tuple[Tensor, LeakyAverageState]:
    """Equation 8 of Memory Mosaics v2, one position after the other; see `mosaics.ops.leaky_average.leaky_average`."""
    dtype = inputs.dtype
    inputs, log_gate, log_decay = (at_least_float32(x) for x in (inputs, log_gate, log_decay))
    if state is None:
        state = LeakyAverageState.empty(inputs)
    direction, log_scale = state.direction, state.log_scale
    keys = []
    for t in range(inputs.shape[2]):
        gate, decay = log_gate[..., t], log_decay[..., t] + log_scale
        # The running maximum keeps both exponentials at most 1; only the direction of their sum matters.
        scale = torch.maximum(gate, decay).detach()
        scale = scale.masked_fill(scale == -torch.inf, 0.0)
        average = (gate - scale).exp()[..., None] * inputs[..., t, :] + (decay - scale).exp()[..., None] * direction
        direction, norm = normalised(average)
        log_scale = scale + norm.log()
        log_scale = torch.where(torch.maximum(gate, decay) == -torch.inf, -torch.inf, log_scale)
        keys.append(shortened(direction, log_scale, eps))
    return torch.stack(keys, dim=2).to(dtype), LeakyAverageState(direction, log_scale)
