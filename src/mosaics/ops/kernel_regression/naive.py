"""Kernel regression with every weight written out: the definition that every faster form is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops.kernel_regression.bandwidth import Bandwidth, readable
from mosaics.ops.kernel_regression.narrow import Narrow, widened


def weights(
    queries: Tensor,
    keys: Tensor | Narrow,
    bandwidth: Bandwidth,
    *,
    delay: int | None,
    window: int | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Weights `(batch, heads, time, slots)` of each query on each pair; a row sums to 1, or to 0 without pairs."""
    keys = widened(keys)
    time, slots = queries.shape[2], keys.shape[2]
    first, end = readable(time, slots - time, start, delay, window, keys.device)
    slot = torch.arange(slots, device=keys.device)
    allowed = (slot >= first[..., None]) & (slot < end[..., None])
    allowed = allowed[:, None] if allowed.dim() == 3 else allowed
    if queries.dtype != torch.float64:
        queries, keys = queries.float(), keys.float()
    beta = bandwidth.at((end - first).clamp(min=0))
    logits = beta[..., None] * (queries @ keys.transpose(-1, -2))
    logits = logits.masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def kernel_regression(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bandwidth: Bandwidth,
    *,
    delay: int | None,
    window: int | None = None,
    start: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Equation 4 of Memory Mosaics v2 as a T x T matrix; see `mosaics.ops.kernel_regression.kernel_regression`."""
    dtype = values.dtype
    read = weights(queries, keys, bandwidth, delay=delay, window=window, start=start)
    read = F.dropout(read, dropout)
    return (read @ values.to(read.dtype)).to(dtype)
