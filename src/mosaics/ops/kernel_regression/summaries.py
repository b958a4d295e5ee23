"""What is worth keeping of each query's weights, without writing them out: the largest, and how they are spread."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops import INTEGERS, check, run
from mosaics.ops.compiling import dense, library, plain, strided
from mosaics.ops.kernel_regression import compiled
from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.naive import check_read
from mosaics.ops.kernel_regression.narrow import Narrow, widened
from mosaics.ops.kernel_regression.reach import Reach


class Summary(NamedTuple):
    """Of the weights of each query, in float32 or wider; all shares are 0 without pairs.

    Attributes:
        slots: `(batch, heads, time, top)`, those with the largest weights, the largest first; -1 where fewer may be
            read.
        weights: `(batch, heads, time, top)`, 0 where there is none.
        entropy: `(batch, heads, time)`, in nats.
        near: `(batch, heads, time)`, the share of slots that lie so near.
        distance: `(batch, heads, time)`, how many slots back, on average over the weights.
        repeats: `(batch, heads, time, 2)`, the share of earlier slots with the position's own token, and of those right
            behind such.
    """

    slots: Tensor
    weights: Tensor
    entropy: Tensor
    near: Tensor
    distance: Tensor
    repeats: Tensor


def summary(
    queries: Tensor,
    keys: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
    top: int,
    near: int,
    tokens: Tensor,
    *,
    form: str | None = None,
) -> Summary:
    """What is worth keeping of each query's weights, where these are too many to be written out.

    Args:
        queries: as for `mosaics.ops.kernel_regression.kernel_regression`, and so are those below without a word.
        keys: `(batch, heads, slots, width)`.
        bandwidth: beta as a function of n.
        reach: which pairs each position may read; not a fixed set, which has no positions.
        top: how many of the largest weights, at least 1.
        near: how many slots back count as near, at least 0.
        tokens: `(1 + slots,)`, int64, the token before the first slot and that of each slot, the same for all rows;
            those below 0 are not known, and repeat nothing.
        form: force one of `FORMS`; by default the compiled one where there is a compiler.

    Raises:
        ValueError: as `mosaics.ops.kernel_regression.kernel_regression`; or a number is too small.
    """
    keys = getattr(keys, "exact", keys)  # without a sketch
    if reach.delay is None or top < 1 or near < 0:
        raise ValueError(f"The delay is {reach.delay}, top {top} and near {near}; give numbers, top at least 1.")
    check_read(queries, keys, None, bandwidth, reach)
    time, slots = queries.shape[2], keys.shape[2]
    check("summary", queries.device, [("tokens", tokens, (1 + slots,), INTEGERS[:1])])
    first, end = reach.span(queries, keys)
    own = torch.arange(time, device=queries.device) + (slots - time if reach.stored is None else reach.stored[:, None])
    labels = torch.stack([tokens[1:], tokens[:-1]]).clamp(min=-1)
    form = form or ("compiled" if compiled.pays(queries) else "naive")
    wide = torch.promote_types(queries.dtype, torch.float32)
    beta = bandwidth.at((end - first).clamp(min=0)).to(wide).expand(queries.shape[:3])
    given = (widened(keys).to(wide), beta, *torch.broadcast_tensors(first, end, own), labels, top, near)
    return run(FORMS, form, "summary", queries.to(wide), *given)


def summary_of(queries: Tensor, *rest: Any) -> Callable[[int, int, Tensor], Summary] | None:
    """`summary` of a read, still to be told what is wanted; None where all weights would be written out for it."""
    return partial(summary, queries, *rest) if compiled.pays(queries) else None


def naive(
    queries: Tensor,
    keys: Tensor,
    beta: Tensor,
    first: Tensor,
    end: Tensor,
    own: Tensor,
    labels: Tensor,
    top: int,
    near: int,
) -> Summary:
    """From all weights, written out; of equal ones the first is the largest. See `summary`."""
    slot = torch.arange(keys.shape[2], device=keys.device)

    def each(x: Tensor) -> Tensor:  # (batch or 1, 1, time, slots)
        return x.view(-1, 1, *x.shape[-2:])

    allowed = each((slot >= first[..., None]) & (slot < end[..., None]))
    logits = ((beta[..., None] * queries) @ keys.mT).masked_fill(~allowed, -torch.inf)
    shares = logits.softmax(-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    kept, slots = shares.sort(dim=-1, descending=True, stable=True)
    kept, slots = kept[..., :top], slots.masked_fill(kept == 0, -1)[..., :top]
    missing, back = (0, top - kept.shape[-1]), each(own[..., None] - slot)
    same = [each(label == label_of(labels, own)[..., None]) & (back > 0) for label in labels]
    return Summary(
        F.pad(slots, missing, value=-1),
        F.pad(kept, missing),
        torch.special.entr(shares).sum(-1),
        (shares * (back <= near)).sum(-1),
        (shares * back).sum(-1),
        torch.stack([(shares * x).sum(-1) for x in same], dim=-1),
    )


def label_of(labels: Tensor, own: Tensor) -> Tensor:
    """What each position looks for: its own token; where that is not known, what no slot bears."""
    return labels[0][own].masked_fill(labels[0][own] < 0, -2)


def faster(
    queries: Tensor,
    keys: Tensor,
    beta: Tensor,
    first: Tensor,
    end: Tensor,
    own: Tensor,
    labels: Tensor,
    top: int,
    near: int,
) -> Summary:
    """In tiles that stay in the cache of a core, with a running maximum; see `summary`.

    Raises:
        ValueError: the kernel can't be compiled here, or the tensors are not on a processor.
    """
    if not compiled.pays(queries):
        raise ValueError("The compiled form needs a processor and a C++ compiler; use the naive form.")
    batch, heads, time, width = queries.shape
    double = queries.dtype == torch.float64
    queries, keys = dense(queries), dense(keys)
    ranges = [x.contiguous() for x in (beta, first, end, own)]
    wanted = label_of(labels, own)
    labels, wanted = (x.to(torch.int64 if double else torch.int32).contiguous() for x in (labels, wanted))
    found = torch.empty(batch, heads, time, top, dtype=torch.int64)
    logits, numbers = queries.new_empty(found.shape), queries.new_empty(batch, heads, time, 6)
    lines = batch if first.dim() == 2 else 1
    sizes = (c_int64 * 8)(batch, heads, time, keys.shape[2], width, 0, lines, torch.get_num_threads())
    call = getattr(library(compiled.SOURCE), "summary_double" if double else "summary_float")
    near = min(near, keys.shape[2])
    call(sizes, *strided(queries, keys), *plain(*ranges), near, *plain(labels, wanted), top,
         *plain(found, logits, numbers))  # fmt: skip
    kept = (logits - numbers[..., :1]).exp_().masked_fill_(found < 0, 0.0)
    return Summary(found.masked_fill_(kept == 0, -1), kept, *numbers[..., 1:4].unbind(-1), numbers[..., 4:])


FORMS = {"naive": naive, "compiled": faster}
