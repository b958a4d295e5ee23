"""Rotary positions (Su et al., arXiv 2104.09864), also stretched beyond the length that was trained at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALINGS = ("linear", "yarn")
FAST, SLOW = 32, 1  # turns within the trained length: faster pairs are kept, slower ones stretched (YaRN)

__all__ = ["SCALINGS", "frequencies", "rotated"]


def frequencies(
    width: int,
    base: float,
    scaling: str | None = None,
    factor: float = 1.0,
    trained_length: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, float]:
    """Angles per position, and the factor of both queries and keys that goes with them.

    Args:
        width: of a head; even.
        base: of the geometric series of wave lengths.
        scaling: `"linear"` divides all positions by `factor` (position interpolation, Chen et al., arXiv 2306.15595);
            `"yarn"` only those of slow pairs, and sharpens the attention (Peng et al., arXiv 2309.00071, section 3.2
            and equation 22); None leaves them.
        factor: length to be read over the length trained at.
        trained_length: in positions; YaRN needs it.
        device: of the result.
        dtype: of the result.

    Returns:
        `(width / 2,)` angles, and the factor.
    """
    exponents = torch.arange(0, width, 2, device=device).to(dtype) / width
    plain = base**-exponents
    if scaling is None or factor == 1:
        return plain, 1.0
    if scaling == "linear":
        return plain / factor, 1.0

    def pair_of(turns: float) -> float:
        """Which pair of dimensions makes so many turns within the trained length."""
        return width * math.log(trained_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair_of(FAST)), 0), min(math.ceil(pair_of(SLOW)), width - 1)
    ramp = (torch.arange(width // 2, device=device).to(dtype) - low) / (high - low or 1e-3)
    stretched = ramp.clamp(0, 1)
    return plain * (1 - stretched) + plain / factor * stretched, 0.1 * math.log(factor) + 1


def rotated(x: Tensor, positions: Tensor, angles: Tensor, factor: float = 1.0) -> Tensor:
    """`x` `(batch, heads, time, width)`, the pairs (i, i + width / 2) turned by position times angle, times a factor.

    Args:
        x: queries or keys.
        positions: `(batch or 1, time)` integers.
        angles: `(width / 2,)`, in float32 or wider.
        factor: of the result.
    """
    turns = (positions.to(angles.dtype)[..., None] * angles)[:, None]
    cos, sin = (y.mul(factor).to(x.dtype) if factor != 1 else y.to(x.dtype) for y in (turns.cos(), turns.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
