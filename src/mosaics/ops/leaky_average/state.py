"""What the recurrence of the keys carries from one call to the next."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LeakyAverageState(NamedTuple):
    """The average so far as a direction and the logarithm of its length, in float32 or wider.

    Attributes:
        direction: `(batch, heads, width)`, of unit norm, or 0 where nothing was averaged yet.
        log_scale: `(batch, heads)`, natural logarithm of the average's norm; -inf where nothing was averaged yet.
    """

    direction: Tensor
    log_scale: Tensor

    @classmethod
    def empty(cls, inputs: Tensor) -> LeakyAverageState:
        """The state before the first of `inputs` `(batch, heads, time, width)`."""
        batch, heads, _, width = inputs.shape
        return cls(inputs.new_zeros(batch, heads, width), inputs.new_full((batch, heads), -torch.inf))


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def floor_of(average: Tensor) -> float:
    """A norm up to this counts as 0."""
    return 1e-150 if average.dtype == torch.float64 else 1e-18


def normalised(average: Tensor) -> tuple[Tensor, Tensor]:
    """`average` `(..., width)` divided by its norm, and the norm; what is (nearly) 0 gives 0 and no gradient."""
    floor, norm = floor_of(average), torch.linalg.vector_norm(average, dim=-1)
    safe = norm.clamp(min=floor)
    return average * safe.reciprocal().masked_fill(norm <= floor, 0.0)[..., None], safe


def shortened(direction: Tensor, log_norm: Tensor, eps: float) -> Tensor:
    """`direction` `(..., width)` times norm / (norm + eps), by the logarithm of the norm: no norm overflows."""
    return direction if eps == 0 else direction * torch.sigmoid(log_norm - math.log(eps))[..., None]
