"""Which documents of a fixed store a read may leave out: a sketch of their keys proves that they weigh little."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import FLOATS, check
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach, kernel_regression
from mosaics.ops.kernel_regression.united import bandwidth_at

_AT_ONCE = 1 << 22  # weights that are held
_ROUNDED = 1e-4  # at most, of a logit and of a sum, besides what grows with the query
_SMALLEST = 1e-34  # at least the weight that is left of what underflows, as a share of the largest


def largest_shares(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    data: Tensor,
    scale: Tensor,
    radius: Tensor,
    sizes: Tensor,
    bandwidth: Bandwidth,
    reach: Reach,
) -> Tensor:
    """The largest share of the weight that each document of a store may have, by a sketch of its keys: a weight has a
    least and a largest value (`sketch.Sketched`).

    Args:
        queries: `(batch, heads, time, width)`.
        keys: of the context, as for `united_regression`.
        values: of the context, as there.
        data: `(1, heads, store slots, width)`, int8, the keys of the store in 8 bits, a document after the other.
        scale: `(1, heads, store slots, 1)`, what they are multiples of.
        radius: `(1, heads, documents, 1)`, how far a key of the document is from that at most.
        sizes: `(documents,)`, integers, the pairs of each.
        bandwidth: as there.
        reach: as there.

    Returns:
        `(positions, documents)`, float64, every head of every position of every row; not a number where a key is none.

    Raises:
        ValueError: as `united_regression`.
    """
    heads, slots, width = queries.shape[1], data.shape[2], queries.shape[3]
    given = [("keys of the store", data, (1, heads, slots, width), (torch.int8,))]
    given.append(("scale", scale, (1, heads, slots, 1), FLOATS))
    given.append(("radius", radius, (1, heads, len(sizes), 1), FLOATS))
    check("largest_shares", queries.device, given)
    if not slots or int(sizes.sum()) != slots:
        raise ValueError(f"The sizes of the documents make {int(sizes.sum())} of {slots} pairs; give at least 1.")
    keys = getattr(keys, "exact", keys)
    beta = bandwidth_at(queries, keys, slots, bandwidth, reach)
    asked = beta[..., None] * queries.to(beta.dtype)
    once = Bandwidth(beta.new_ones(heads))
    own = kernel_regression(asked, keys, values, once, reach, log_sum=True)[1]
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
    return torch.cat(shares, dim=1).flatten(0, 1)


def needed(shares: Tensor, tolerance: float) -> list[int]:
    r"""The documents without which an answer would be off by more than was allowed.

    They are left out in the order of the largest share that any of them may have anywhere, as many as have together at
    most half the tolerance at every position. With \( R \) and \( S \) the sums of the weights left out and of all,
    the error of an answer is \( R / S \) times the difference of two averages of values: at most `tolerance` times the
    length of the longest.

    Args:
        shares: `(positions, documents)`, as `largest_shares` gives them.
        tolerance: from 0 (nothing is left out) to below 1.

    Returns:
        Their numbers, in order.
    """
    order = shares.amax(0).argsort(stable=True)  # what is no number is the last, and needed
    out = (shares[:, order].cumsum(-1) <= tolerance / 2 * (1 - _ROUNDED)).all(0).sum()
    return sorted(order[int(out) :].tolist())
