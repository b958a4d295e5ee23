"""Kernel regression with every weight written out: the definition that every faster form is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops import FLOATS, INTEGERS, check
from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.narrow import Narrow, widened
from mosaics.ops.kernel_regression.reach import Reach, is_empty, outside

NARROW = (torch.int8, *FLOATS)
FARTHEST = 2**62  # positions; what they are added to stays within 64 bits


def check_read(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow | None,
    bandwidth: Bandwidth,
    reach: Reach,
) -> None:
    """Refuse a read that is none; see `mosaics.ops.kernel_regression.kernel_regression`.

    Raises:
        ValueError: as there.
    """
    delay, window, start, stored = reach
    if delay is None and any(x is not None for x in (window, start, stored)):
        raise ValueError("A fixed set of pairs has no positions; leave out the window and the start.")
    for x, least in ((delay, 0), (window, 1)):
        if not (x is None or isinstance(x, Tensor)) and not (isinstance(x, int) and least <= x < FARTHEST):
            raise ValueError(
                f"The delay is {delay} and the window {window}; give whole numbers, a delay of 0 or more and a window "
                "of 1 or more."
            )
    if (bandwidth.slope is None) != (bandwidth.exponent is None):
        raise ValueError("A bandwidth has a slope and an exponent, or neither; give both or none.")
    op = "kernel_regression"
    batch, heads, time, width = queries.shape if queries.dim() == 4 else ("batch", "heads", "time", "width")
    slots = keys.shape[2] if len(keys.shape) == 4 else "slots"
    value_width = None if values is None else values.shape[3] if len(values.shape) == 4 else "value width"
    given = [("queries", queries, (batch, heads, time, width), FLOATS)]
    for name, x, wide in (("keys", keys, width), ("values", values, value_width)):
        if isinstance(x, Narrow):
            given.append((name, x.data, (batch, heads, slots, wide), NARROW))
            given.append((f"scales of {name}", x.scale, (batch, heads, slots, 1), FLOATS[:1]))
        else:
            given.append((name, x, (batch, heads, slots, wide), FLOATS))
    for x in bandwidth:
        given.append(("bandwidths", x, (heads,), FLOATS))
    given.append(("starts", start, (batch, time), INTEGERS))
    given.append(("stored pairs", stored, (batch,), INTEGERS[:1]))
    check(op, queries.device, given)
    if delay is not None and slots < time:
        raise ValueError(f"{op} got {slots} pairs for {time} positions; give those of all positions, the newest last.")


def weights(
    queries: Tensor,
    keys: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
) -> Tensor:
    """Weights `(batch, heads, time, slots)` of each query on each pair; a row sums to 1, or to 0 without pairs.

    Raises:
        ValueError: as `mosaics.ops.kernel_regression.kernel_regression`.
    """
    keys = getattr(keys, "exact", keys)  # without a sketch
    check_read(queries, keys, None, bandwidth, reach)
    return _weights(*_logits(queries, keys, bandwidth, reach))


def weights_at(
    queries: Tensor,
    keys: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
    positions: slice,
) -> tuple[Tensor, int]:
    """`weights` of some positions, over the slots that one of them at least may read. What masks is added to the
    logits: a masked fill of all heads takes several times as long.

    Returns:
        `(batch, heads, positions, slots)` and the number of the first of these slots, which follow each other; there is
        one at least.

    Raises:
        ValueError: as `mosaics.ops.kernel_regression.kernel_regression`.
    """
    check_read(queries, keys, None, bandwidth, reach)
    slots = keys.shape[2]
    first, end = (x[..., positions] for x in reach.span(queries, keys))
    low = min(int(first.min()), slots - 1)
    high = max(low + 1, min(int(end.max()), slots))
    keys = widened(keys.cut(low, high) if isinstance(keys, Narrow) else keys[:, :, low:high])
    wide = torch.promote_types(queries.dtype, torch.float32)
    beta = bandwidth.at(end - first)
    masked, empty = outside(first, end, low, high), is_empty(first, end)[..., None]
    bias = torch.zeros_like(masked, dtype=wide).masked_fill_(masked, -torch.inf).masked_fill_(empty, 0.0)
    logits = ((beta[..., None] * queries[:, :, positions].to(wide)) @ keys.to(wide).mT).add_(bias)
    return logits.softmax(-1).masked_fill_(empty, 0.0) if bool(empty.any()) else logits.softmax(-1), low


def _weights(logits: Tensor, empty: Tensor) -> Tensor:
    return logits.softmax(-1).masked_fill(empty, 0.0)


def _logits(queries: Tensor, keys: Tensor | Narrow, bandwidth: Bandwidth, reach: Reach) -> tuple[Tensor, Tensor]:
    """-inf where a query may not read, and which queries `(..., time, 1)` read nothing: theirs are 0."""
    keys = widened(keys)
    first, end = reach.span(queries, keys)
    masked = outside(first, end, 0, keys.shape[2])
    wide = torch.promote_types(queries.dtype, torch.float32)
    queries, keys = queries.to(wide), keys.to(wide)
    logits = bandwidth.at(end - first)[..., None] * (queries @ keys.transpose(-1, -2))
    logits = logits.masked_fill(masked, -torch.inf)
    empty = masked.all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0), empty


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
    """Equation 4 of Memory Mosaics v2 as a T x T matrix; see `mosaics.ops.kernel_regression.kernel_regression`."""
    dtype = values.dtype
    logits, empty = _logits(queries, keys, bandwidth, reach)
    read = F.dropout(_weights(logits, empty), dropout)
    read = (read @ values.to(read.dtype)).to(dtype)
    return (read, logits.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)) if log_sum else read
