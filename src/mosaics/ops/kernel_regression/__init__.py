r"""Kernel regression over stored pairs: `kernel_regression`. The mathematics is in this folder's README."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import eager_on_cpu, has_numbers, run
from mosaics.ops.kernel_regression import blockwise, compiled, flex, naive, shifted, single, sliced
from mosaics.ops.kernel_regression.bandwidth import Bandwidth, readable
from mosaics.ops.kernel_regression.naive import check_read, weights
from mosaics.ops.kernel_regression.narrow import Narrow, widened

FORMS = {
    "naive": naive.kernel_regression,
    "blockwise": blockwise.kernel_regression,
    "shifted": shifted.kernel_regression,
    "compiled": compiled.kernel_regression,
    "single": single.kernel_regression,
    "sliced": sliced.kernel_regression,
    "flex": flex.kernel_regression,
}

FEW = 64  # queries that do not make up for widening all that is stored
LONG = 1 << 14  # slots

__all__ = ["FORMS", "Bandwidth", "Narrow", "kernel_regression", "readable", "weights", "widened"]


@eager_on_cpu
def kernel_regression(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    bandwidth: Bandwidth,
    *,
    delay: int | None,
    window: int | None = None,
    start: Tensor | None = None,
    dropout: float = 0.0,
    form: str | None = None,
) -> Tensor:
    r"""What a memory answers: \( f(k_t) = \sum_i \mathrm{softmax}_i(\beta(n_t)\, k_t^\top k_i)\, v_i \) over the pairs
    that t may read.

    Source: Memory Mosaics v2, equations 3, 4, 6 and 10. Position t reads the n_t pairs t-window+1 ... t-delay of its
    own document; without any it answers exactly 0.

    Args:
        queries: `(batch, heads, time, width)`; for Memory Mosaics the keys of the same positions.
        keys: `(batch, heads, slots, width)`: the pairs of earlier calls, then one for each of the `time` positions.
        values: `(batch, heads, slots, value width)`.
        bandwidth: beta as a function of n.
        delay: how far back the newest readable pair lies; at least 0 (1 is strictly causal). None: the slots are no
            positions but a fixed set of pairs, and every position reads them all.
        window: a pair this far back or farther is out of reach; None is no limit.
        start: `(batch, time)`, integers, where the document of each position begins, counted from the first position of
            this call (negative: so many pairs before it; never decreasing); None: all stored pairs and positions are
            one document.
        dropout: probability with which a weight is set to 0, the others growing to make up for it.
        form: force one of `FORMS`; by default the fastest for this input.

    Returns:
        `(batch, heads, time, value width)` in the dtype of `values`.

    Raises:
        ValueError: the delay is negative, the window is below 1, the dropout no probability below 1, a fixed set is cut
            by a window or a start, a tensor has a wrong shape, device or dtype, or the form is unknown or cannot serve
            this input.
    """
    check_read(queries, keys, values, bandwidth, delay, window, start)
    if not 0 <= dropout < 1:
        raise ValueError(f"The dropout is {dropout}; give a probability of at least 0 and below 1.")
    if queries.numel() == 0 or keys.shape[2] == 0:
        form = "naive"  # nothing is asked, or nothing stored
    if form is None and single.pays(queries, keys, values, bandwidth, dropout):
        form = "single"
    if form is None:
        form = _fastest(queries, keys, values, delay, window, start, dropout)
    if form not in ("single", "sliced"):
        keys, values = widened(keys), widened(values)
    access = dict(delay=delay, window=window, start=start, dropout=dropout)
    return run(FORMS, form, "kernel_regression", queries, keys, values, bandwidth, **access)


def _fastest(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    delay: int | None,
    window: int | None,
    start: Tensor | None,
    dropout: float,
) -> str:
    time = queries.shape[2]
    if isinstance(keys, Narrow) and time < FEW:
        return "sliced"  # the others would widen all that is stored
    if time == 1 or (not queries.is_cuda and not has_numbers(queries)):
        return "naive"  # one query needs no tiles; without numbers there is nothing to ask them
    if not dropout and compiled.pays(queries):
        return "compiled"
    if dropout and queries.device.type == "cpu":
        return "blockwise"  # PyTorch's fused attention would write out every weight
    if delay is None:
        return "shifted"
    cut = window is not None or start is not None
    if cut and keys.shape[2] == time and not dropout and flex.pays(queries, values):
        return "flex"
    if window is not None or keys.shape[2] != time:
        # Without a gradient, a tile need not be as wide as all that is stored.
        return "sliced" if window is None and keys.shape[2] > LONG and not torch.is_grad_enabled() else "blockwise"
    # A call for each document pays as long as the documents are not shorter than a tile.
    few = start is None or len(shifted.documents(start)) * blockwise.BLOCK <= start.numel()
    return "shifted" if few else "blockwise"
