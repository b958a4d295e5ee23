"""Kernel regression of one query over very many pairs, with a bound on the error: what a sketch of the keys proves to
matter little is not read."""

from __future__ import annotations

from ctypes import byref, c_double, c_int64

from torch import Tensor

from mosaics.ops import cast
from mosaics.ops.compiling import dense, library, plain, strided
from mosaics.ops.kernel_regression import single
from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.narrow import Narrow
from mosaics.ops.kernel_regression.reach import Reach
from mosaics.ops.kernel_regression.sketch import Sketched


def pays(queries: Tensor, keys: Sketched, values: Tensor | Narrow, bandwidth: Bandwidth, dropout: float = 0.0) -> bool:
    """Whether the loop can be used, and may be wrong."""
    return keys.tolerance > 0 and single.pays(queries, keys.exact, values, bandwidth, dropout)


def kernel_regression(
    queries: Tensor,
    keys: Sketched,
    values: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
    *,
    dropout: float = 0.0,
    log_sum: bool = False,
    counts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Equation 4 for one query, wrong by at most `keys.tolerance` times the length of the longest value readable.

    The sketch gives every weight a least and a largest value. The pairs with the smallest largest values are left out,
    as many as have together at most half the tolerance of the sum of all least values: with \( R \) and \( S \) the
    sums of the weights left out and of all, the error is \( R / S \) times the difference of two averages of values.
    The logarithm of the sum of weights is at most half the tolerance too small.

    Args:
        counts: `(batch, heads)`, int64: filled with the number of pairs that were read.

    Raises:
        ValueError: as the single form.
    """
    reason = single.why_not(queries, keys.exact, values, bandwidth, dropout)
    if reason or not single.available():
        raise ValueError(f"A bounded read can't be had: {reason or 'there is no C++ compiler'}; read all pairs.")

    call = single.prepared(queries, *single.parts_of(keys.exact, values), *bandwidth, *reach, log_sum)
    parts = [dense(keys.data), *(None if x is None else dense(x.mT) for x in (keys.scale, keys.radius))]
    sketched = [x for part in parts for x in ([None, None] if part is None else strided(part))]
    numbers = byref(c_double(keys.tolerance)), byref(c_int64(keys.data.shape[2]))
    getattr(library(single.SOURCE), f"bounded_{call.kind}")(*call.given, *numbers, *sketched, *plain(counts))
    out, logs = cast(call.out, values.dtype), call.logs
    return (out, logs) if log_sum else out
