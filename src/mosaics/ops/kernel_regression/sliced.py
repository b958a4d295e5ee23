"""Kernel regression in slices of slots, with a running maximum: what it holds does not depend on how much is stored.

Narrow pairs are widened slice by slice; the scales of 8 bits go into logits and weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops import eager_on_cpu
from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.narrow import Narrow
from mosaics.ops.kernel_regression.reach import Reach, outside

BLOCK = 128  # queries
SLICE = 4096  # slots


@eager_on_cpu
def kernel_regression(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
    *,
    dropout: float = 0.0,
    log_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Equation 4, a slice of slots after the other; see `mosaics.ops.kernel_regression.kernel_regression`.

    The softmax of what was read so far is kept as its maximum, its sum and its sum of values (Milakov and Gimelshein,
    "Online normalizer calculation for softmax", arXiv 1805.02867).
    """
    first, end = reach.span(queries, keys)
    beta = bandwidth.at(end - first)
    scaled = beta[..., None].to(torch.promote_types(queries.dtype, torch.float32)) * queries
    blocks = (slice(begin, begin + BLOCK) for begin in range(0, queries.shape[2], BLOCK))
    read = [_read(scaled[:, :, b], keys, values, first[..., b], end[..., b], dropout) for b in blocks]
    answer = torch.cat([x for x, _ in read], dim=2).to(values.dtype)
    return (answer, torch.cat([log for _, log in read], dim=2)) if log_sum else answer


def _read(
    queries: Tensor, keys: Tensor | Narrow, values: Tensor | Narrow, first: Tensor, end: Tensor, dropout: float
) -> tuple[Tensor, Tensor]:
    low, high = int(first.min()), int(end.max())
    free = range(int(first.max()), int(end.min()) + 1)  # borders between which all queries read all slots
    total = 0 * queries[..., :1]
    top = torch.full_like(total, torch.finfo(total.dtype).min)
    smallest = math.log(torch.finfo(total.dtype).tiny) + 7  # numbers below tiny make products slow
    read = total.expand(*queries.shape[:-1], values.shape[-1])
    for begin in range(low, high, SLICE):
        stop = min(begin + SLICE, high)
        key, key_scale = _part(keys, begin, stop, queries.dtype)
        value, value_scale = _part(values, begin, stop, queries.dtype)
        logits = queries @ key.mT
        if key_scale is not None:
            logits = logits * key_scale.mT
        if begin not in free or stop not in free:
            logits = logits.masked_fill(outside(first, end, begin, stop), -torch.inf)
        higher = torch.maximum(top, logits.detach().amax(-1, keepdim=True))
        weights, fade = F.threshold(logits - higher, smallest, -torch.inf).exp(), (top - higher).exp()
        total, top = total * fade + weights.sum(-1, keepdim=True), higher
        weights = F.dropout(weights, dropout)
        if value_scale is not None:
            weights = weights * value_scale.mT
        read = read * fade + weights @ value
    empty = total == 0
    total = total.masked_fill(empty, 1)
    return read / total, (top + total.log()).masked_fill(empty, -torch.inf)[..., 0]


def _part(x: Tensor | Narrow, begin: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if isinstance(x, Narrow):
        return x.part(begin, end, dtype)
    return x[:, :, begin:end].to(dtype), None
