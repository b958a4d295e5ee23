"""Local linear attention in closed form, every pair written out: the definition that the other form is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops.kernel_regression import Reach
from mosaics.ops.kernel_regression.reach import outside


def local_linear(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    probe: Tensor | None,
    ridge: Tensor | None,
    start: Tensor | None,
    scale: float,
    relative: bool,
    iterations: int,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """See `mosaics.ops.local_linear.local_linear`; exact, so it takes no `iterations` and leaves no residual."""
    masked = outside(*Reach(0, start=start).span(queries, keys), 0, keys.shape[2])
    logits = (scale * (queries @ keys.mT)).masked_fill(masked, -torch.inf)
    weights = logits.softmax(-1)
    if probe is not None:
        mean = weights @ keys
        slopes = probe @ keys.mT - (probe * mean).sum(-1, keepdim=True)
        return F.dropout(weights * (1 - slopes), dropout) @ values, None
    gaps = keys[:, :, None] - queries[:, :, :, None]  # z, (batch, heads, time, slots, width)
    strength = ridge[:, None]
    if not relative:
        strength = strength * (-logits.logsumexp(-1)).exp()  # all is divided by the sum of the weights here
    first_moment = torch.einsum("bhts,bhtsd->bhtd", weights, gaps)
    second_moment = torch.einsum("bhts,bhtsd,bhtse->bhtde", weights, gaps, gaps)
    second_moment = second_moment + strength[..., None, None] * torch.eye(keys.shape[3]).to(second_moment)
    solved = torch.linalg.solve(second_moment, first_moment)
    used = weights * (1 - torch.einsum("bhtsd,bhtd->bhts", gaps, solved))
    used = used / (1 - (first_moment * solved).sum(-1, keepdim=True))
    return F.dropout(used, dropout) @ values, torch.zeros_like(solved[..., 0])
