"""Kernel regression over the pairs of the context and a fixed store beside them, both counted by the bandwidth."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import FLOATS, check
from mosaics.ops.kernel_regression import ALL_PAIRS, Bandwidth, Narrow, Reach, kernel_regression, merged, widened
from mosaics.ops.kernel_regression.reach import outside


def united_regression(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    store_keys: Tensor | Narrow,
    store_values: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
    *,
    sizes: Tensor | None = None,
    offsets: Tensor | None = None,
    dropout: float = 0.0,
    total: int | None = None,
    form: str | None = None,
) -> Tensor:
    r"""What a memory answers from the pairs that a position may read of its context and all pairs of a store:
    \( f(k_t) = \sum_i \mathrm{softmax}_i(\beta(N + n_t)\, k_t^\top k_i)\, v_i \), N the pairs of the store.

    The store is read as a fixed set, and merged with the context through the logarithm of the sums.

    Args:
        queries: `(batch, heads, time, width)`.
        keys: `(batch, heads, slots, width)`, as for `kernel_regression`.
        values: `(batch, heads, slots, value width)`.
        store_keys: `(1, heads, store slots, width)`: every row and position reads them all.
        store_values: `(1, heads, store slots, value width)`.
        bandwidth: beta as a function of the number of pairs, those of the store and of the context together.
        reach: which pairs of the context each position may read.
        sizes: `(store slots,)`, integers, how many pairs each slot of the store stands for, all with its key and value;
            None: one each.
        offsets: `(1, heads, store slots, 1)`, what is added to the product of each key of the store with a query; None:
            nothing.
        dropout: as for `kernel_regression`.
        total: N, where the store is a part of the one that counts; None: all pairs that are given.
        form: `"naive"` lists all pairs, `"merged"` reads the two apart; by default the latter.

    Returns:
        `(batch, heads, time, value width)` in the dtype of `values`.

    Raises:
        ValueError: as `kernel_regression`, or the store has other heads or widths.
    """
    keys = getattr(keys, "exact", keys)  # of keys with a sketch: beside a store all are read
    beta = bandwidth_at(queries, keys, _total(store_keys, sizes, total), bandwidth, reach)
    _check_store(queries, values, store_keys, store_values, sizes, offsets)
    if form == "naive":
        if dropout:
            raise ValueError("The naive form of a united read has no dropout; leave out the form.")
        own, of_store = _weights(queries, keys, store_keys, beta, reach, sizes, offsets)
        values, store_values = widened(values), widened(store_values)
        return (own @ values.to(own.dtype) + of_store @ store_values.to(own.dtype)).to(values.dtype)
    if form not in (None, "merged"):
        raise ValueError(f"united_regression has no form {form!r}; choose naive or merged.")
    scaled = beta[..., None] * queries.to(beta.dtype)
    once = Bandwidth(beta.new_ones(queries.shape[1]))
    own = kernel_regression(scaled, keys, values, once, reach, dropout=dropout, log_sum=True)
    batch, _, time = queries.shape[:3]
    asked = scaled
    if offsets is not None:  # one more number of every query is beta
        asked = torch.cat([asked, beta[..., None].expand_as(scaled[..., :1])], dim=-1)
        store_keys = torch.cat([widened(store_keys), offsets.to(store_keys.dtype)], dim=-1)
    if sizes is not None:  # or 1
        asked = torch.cat([asked, torch.ones_like(asked[..., :1])], dim=-1)
        store_keys = widened(store_keys)
        logs = sizes.to(store_keys.dtype).log()[:, None].expand(*store_keys.shape[:3], 1)
        store_keys = torch.cat([store_keys, logs], dim=-1)
    # Every position reads the same pairs, so rows are one long row.
    asked = asked.transpose(0, 1).flatten(1, 2)[None]
    read, log_sum = kernel_regression(asked, store_keys, store_values, once, ALL_PAIRS, dropout=dropout, log_sum=True)
    rows = (read[0].unflatten(1, (batch, time)).transpose(0, 1), log_sum[0].unflatten(1, (batch, time)).transpose(0, 1))
    return merged(own, rows)[0]


def united_weights(
    queries: Tensor,
    keys: Tensor | Narrow,
    store_keys: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
    *,
    sizes: Tensor | None = None,
    offsets: Tensor | None = None,
    total: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights `(batch, heads, time, slots)` on the pairs of the context and `(batch, heads, time, store slots)` on
    those of the store; the rows of both together sum to 1, or to 0 where there is no pair."""
    keys = getattr(keys, "exact", keys)  # of keys with a sketch: beside a store all are read
    beta = bandwidth_at(queries, keys, _total(store_keys, sizes, total), bandwidth, reach)
    return _weights(queries, keys, store_keys, beta, reach, sizes, offsets)


def _total(store_keys: Tensor | Narrow, sizes: Tensor | None, total: int | None) -> int | Tensor:
    if total is not None:
        return total
    return store_keys.shape[2] if sizes is None else sizes.sum()


def bandwidth_at(
    queries: Tensor,
    keys: Tensor | Narrow,
    total: int | Tensor,
    bandwidth: Bandwidth,
    reach: Reach,
) -> Tensor:
    """beta of each position, `(heads, time)` or `(batch, heads, time)`, in float32 or wider, beside a store of `total`
    pairs."""
    first, end = reach.span(queries, keys)
    count = (end - first).clamp(min=0) + total
    return bandwidth.at(count).to(torch.promote_types(queries.dtype, torch.float32))


def _weights(
    queries: Tensor,
    keys: Tensor | Narrow,
    store_keys: Tensor | Narrow,
    beta: Tensor,
    reach: Reach,
    sizes: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All pairs listed, those of the store behind those of the context."""
    keys, store_keys = widened(keys).to(beta.dtype), widened(store_keys).to(beta.dtype)
    masked = outside(*reach.span(queries, keys), 0, keys.shape[2])
    scaled = beta[..., None] * queries.to(beta.dtype)
    own, of_store = (scaled @ keys.mT).masked_fill(masked, -torch.inf), scaled @ store_keys.mT
    if offsets is not None:
        of_store = of_store + beta[..., None] * offsets.to(beta.dtype).mT
    if sizes is not None:
        of_store = of_store + sizes.to(of_store.dtype).log()
    logits = torch.cat([own, of_store], dim=-1)
    weights = logits.softmax(-1).nan_to_num(0.0)  # no pair at all
    return weights.split([keys.shape[2], store_keys.shape[2]], dim=-1)


def _check_store(
    queries: Tensor,
    values: Tensor | Narrow,
    store_keys: Tensor | Narrow,
    store_values: Tensor | Narrow,
    sizes: Tensor | None,
    offsets: Tensor | None,
) -> None:
    heads, width, slots = queries.shape[1], queries.shape[3], store_keys.shape[2]
    given = []
    for name, x, wide in (("keys", store_keys, width), ("values", store_values, values.shape[3])):
        data = x.data if isinstance(x, Narrow) else x
        given.append((f"{name} of the store", data, (1, heads, slots, wide), (torch.int8, *FLOATS)))
    given.append(("sizes", sizes, (slots,), (torch.int64, torch.int32)))
    given.append(("offsets", offsets, (1, heads, slots, 1), FLOATS))
    check("united_regression", queries.device, given)
