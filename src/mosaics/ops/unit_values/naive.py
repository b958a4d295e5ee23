"""Values that look one position ahead, as their equation has it: what every faster form is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-12  # a norm up to this counts as 0


def unit_values(raw: Tensor, mix: Tensor, length: Tensor, *, eps: float = 0.0) -> Tensor:
    """Equation 9 of Memory Mosaics v2; see `mosaics.ops.unit_values.unit_values`."""
    wide = torch.promote_types(raw.dtype, torch.float32)
    own, mix, length = raw.to(wide), mix.to(wide)[:, None, None], length.to(wide)[:, None, None]
    following = F.pad(own, (0, 0, 0, 1))[:, :, 1:]
    mixed = mix * own + (1 - mix) * following
    norm = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
    inverse = (norm.clamp(min=SMALLEST) + eps).reciprocal().masked_fill(norm <= SMALLEST, 0.0)  # no gradient from 0
    return (mixed * (length * inverse)).to(raw.dtype)
