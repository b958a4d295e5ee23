"""The weights of some positions alone, for who looks at what is read: all of them are the square of the context."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops.kernel_regression.bandwidth import Bandwidth, readable
from mosaics.ops.kernel_regression.naive import check_read
from mosaics.ops.kernel_regression.narrow import Narrow, widened


def weights_at(
    queries: Tensor,
    keys: Tensor | Narrow,
    bandwidth: Bandwidth,
    positions: slice,
    *,
    delay: int | Tensor | None,
    window: int | None = None,
    start: Tensor | None = None,
    stored: Tensor | None = None,
) -> tuple[Tensor, int]:
    """`weights` of some positions, over the slots that one of them at least may read.

    Returns:
        `(batch, heads, positions, slots)` and the number of the first of these slots, which follow each other; there is
        one at least.

    Raises:
        ValueError: as `mosaics.ops.kernel_regression.kernel_regression`.
    """
    check_read(queries, keys, None, bandwidth, delay, window, start, stored)
    time, slots = queries.shape[2], keys.shape[2]
    ranges = readable(time, slots - time if stored is None else stored, start, delay, window, queries.device)
    first, end = (x[..., positions] for x in ranges)
    low = min(int(first.min()), slots - 1)
    high = max(low + 1, min(int(end.max()), slots))
    keys = widened(keys.cut(low, high) if isinstance(keys, Narrow) else keys[:, :, low:high])
    wide = torch.promote_types(queries.dtype, torch.float32)
    beta = bandwidth.at((end - first).clamp(min=0))
    slot = torch.arange(low, high, device=keys.device)
    outside, empty = (slot < first[..., None]) | (slot >= end[..., None]), (end <= first)[..., None]
    # Added to the logits: a masked fill of all heads takes several times as long.
    bias = torch.zeros_like(outside, dtype=wide).masked_fill_(outside, -torch.inf).masked_fill_(empty, 0.0)
    bias, empty = (x if x.dim() == 2 else x[:, None] for x in (bias, empty))
    logits = (beta[..., None] * queries[:, :, positions].to(wide)) @ keys.to(wide).mT
    weights = logits.add_(bias).softmax(-1)
    return weights.masked_fill_(empty, 0.0) if bool(empty.any()) else weights, low
