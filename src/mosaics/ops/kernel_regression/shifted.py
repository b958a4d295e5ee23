"""The read of whole documents as plain causal attention between shifted slices: a delay is a shift."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.blockwise import BLOCK
from mosaics.ops.kernel_regression.reach import Reach


def pays(start: Tensor | None) -> bool:
    """Whether a call for each document is worth it: the documents are not shorter than a tile of the blockwise form."""
    return start is None or len(documents(start)) * BLOCK <= start.numel()


def kernel_regression(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bandwidth: Bandwidth,
    reach: Reach,
    *,
    dropout: float = 0.0,
    log_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Equation 4 through PyTorch's fused attention, a call for each document; see
    `mosaics.ops.kernel_regression.kernel_regression`.

    Rows that have the same document at the same place share a call.

    Raises:
        ValueError: there is a window, or a pair of an earlier call, or the sum of weights is asked for.
    """
    if log_sum:
        raise ValueError("The shifted form has no sums of weights; use the blockwise form.")
    time, delay, start = queries.shape[2], reach.delay, reach.start
    if delay is not None and (reach.window is not None or keys.shape[2] != time):
        raise ValueError("The shifted form reads whole documents without a window; use the blockwise form.")
    first, end = reach.span(queries, keys)
    beta = bandwidth.at(end - first)
    # In the queries' dtype, which the fused kernels ask for: in bfloat16 this moves a logit by up to beta / 512.
    scaled = beta[..., None].to(queries.dtype) * queries
    dtype, keys, values = values.dtype, keys.to(queries.dtype), values.to(queries.dtype)

    if delay is None:
        return F.scaled_dot_product_attention(scaled, keys, values, dropout_p=dropout, scale=1.0).to(dtype)
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    if start is not None:
        for row, begin, stop in documents(start):
            rows[begin, stop].append(row)
    if start is None or (len(rows) == 1 and (0, time) in rows):
        return _read(scaled, keys, values, delay, dropout).to(dtype)
    out = torch.zeros_like(values)
    for (begin, stop), members in rows.items():
        here = slice(None) if len(members) == len(start) else torch.tensor(members, device=start.device)
        part = (x[here, :, begin:stop] for x in (scaled, keys, values))
        out[here, :, begin:stop] = _read(*part, delay, dropout)
    return out.to(dtype)


def documents(start: Tensor) -> list[tuple[int, int, int]]:
    """Row, first position and end of every document in `start` `(batch, time)`, in order."""
    time = start.shape[1]
    borders = torch.nonzero(start.clamp(min=0) == torch.arange(time, device=start.device)).tolist()
    following = borders[1:] + [[-1, 0]]
    return [
        (row, begin, stop if row == after else time)
        for (row, begin), (after, stop) in zip(borders, following, strict=True)
    ]


def _read(queries: Tensor, keys: Tensor, values: Tensor, delay: int, dropout: float) -> Tensor:
    """One document: its position t reads its positions up to t - delay."""
    time = queries.shape[2]
    past = slice(0, max(time - delay, 0))
    read = values[:, :, past]
    if time > delay:
        read = F.scaled_dot_product_attention(
            queries[:, :, delay:], keys[:, :, past], read, dropout_p=dropout, is_causal=True, scale=1.0
        )
    return F.pad(read, (0, 0, min(delay, time), 0))
