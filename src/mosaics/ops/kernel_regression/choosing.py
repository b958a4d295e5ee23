"""Which documents of a fixed store a read may leave out: a sketch of their keys proves that they weigh little."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import FLOATS, check
from mosaics.ops.kernel_regression import Bandwidth, Narrow, kernel_regression
from mosaics.ops.kernel_regression.united import bandwidth_at

_AT_ONCE = 1 << 22  # weights that are held
_ROUNDED = 1e-4  # at most, of a logit and of a sum, besides what grows with the query
_SMALLEST = 1e-34  # at least the weight that is left of what underflows, as a share of the largest


def needed_documents(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    data: Tensor,
    scale: Tensor,
    radius: Tensor,
    sizes: Tensor,
    bandwidth: Bandwidth,
    tolerance: float,
    *,
    delay: int | Tensor,
    start: Tensor | None = None,
    stored: Tensor | None = None,
) -> list[int]:
    r"""The documents without which what a memory answers beside a store would be off by more than was allowed.

    Every weight has a least and a largest value (`sketch.Sketched`). Documents are left out in the order of the largest
    share of the weight that any of them may have at any position, as many as have together at most half the tolerance
    at every position. With \( R \) and \( S \) the sums of the weights left out and of all, pairs of the context among
    them, the error of an answer is \( R / S \) times the difference of two averages of values: at most `tolerance`
    times the length of the longest.

    Args:
        queries: `(batch, heads, time, width)`.
        keys: of the context, as for `united_regression`.
        values: of the context, as there.
        data: `(1, heads, store slots, width)`, int8, the keys of the store in 8 bits, a document after the other.
        scale: `(1, heads, store slots, 1)`, what they are multiples of.
        radius: `(1, heads, documents, 1)`, how far a key of the document is from that at most.
        sizes: `(documents,)`, integers, the pairs of each.
        bandwidth: as there; all pairs of the store count, whatever is left out.
        tolerance: from 0 (nothing is left out) to below 1.
        delay: of the context, as there.
        start: of the context, as there.
        stored: of the context, as there.

    Returns:
        Their numbers, in order.

    Raises:
        ValueError: as `united_regression`.
    """
    heads, slots, width = queries.shape[1], data.shape[2], queries.shape[3]
    given = [("keys of the store", data, (1, heads, slots, width), (torch.int8,))]
    given.append(("scale", scale, (1, heads, slots, 1), FLOATS))
    given.append(("radius", radius, (1, heads, len(sizes), 1), FLOATS))
    check("needed_documents", queries.device, given)
    if not 0 <= tolerance < 1 or int(sizes.sum()) != slots:
        raise ValueError(f"The tolerance is {tolerance}, the sizes make {int(sizes.sum())} of {slots} pairs.")
    if not slots:
        return []
    access = dict(delay=delay, start=start, stored=stored)
    keys = getattr(keys, "exact", keys)
    beta = bandwidth_at(queries, keys, slots, bandwidth, **access)
    asked = beta[..., None] * queries.to(beta.dtype)
    once = Bandwidth(beta.new_ones(heads))
    own = kernel_regression(asked, keys, values, once, log_sum=True, **access)[1]
    asked, own = asked.transpose(0, 1).flatten(1, 2).float(), own.transpose(0, 1).flatten(1, 2).float()
    owner = torch.arange(len(sizes), device=data.device).repeat_interleave(sizes)
    unsure = scale[0].amax(1, keepdim=True).float() * (127 * width**0.5 * (width + 8) * 2**-23)  # of what is rounded
    shares = []  # the largest that each document may have, (heads, positions, documents)
    at_once = max(1, _AT_ONCE // (heads * slots))
    for part, own_part in zip(asked.split(at_once, dim=1), own.split(at_once, dim=1), strict=True):
        logits = (part @ data[0].float().mT).mul_(scale[0].float().mT)
        longest = part.norm(dim=-1, keepdim=True)
        slack = longest * (radius[0].float().mT + unsure) + _ROUNDED  # (heads, positions, documents)
        top = torch.maximum(logits.amax(-1), own_part)
        sums = logits.sub_(top[..., None]).exp_().double()
        sums = torch.zeros_like(slack, dtype=sums.dtype).index_add_(2, owner, sums)
        least = (own_part - top).double().exp() * (1 - _ROUNDED) + (sums * (-slack.double()).exp()).sum(-1)
        largest = (sums + sizes * _SMALLEST) * slack.double().exp()
        shares.append(largest / least[..., None])
    share = torch.cat(shares, dim=1).flatten(0, 1)
    score = share.amax(0)  # not a number where a key is none: last in the order, and needed
    order = score.argsort(stable=True)
    out = (share[:, order].cumsum(-1) <= tolerance / 2 * (1 - _ROUNDED)).all(0).sum()
    return sorted(order[int(out) :].tolist())
