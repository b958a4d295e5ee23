r"""Kernel regression over stored pairs: `kernel_regression`. The mathematics is in this folder's README."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops import Faster, has_numbers, run
from mosaics.ops.kernel_regression import blockwise, naive
from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.merging import merged
from mosaics.ops.kernel_regression.naive import check_read, weights, weights_at
from mosaics.ops.kernel_regression.narrow import Narrow, widened
from mosaics.ops.kernel_regression.reach import ALL_PAIRS, Reach
from mosaics.ops.kernel_regression.summaries import Summary, summary, summary_of

FASTER = Faster(__name__, "shifted", "compiled", "single", "sliced", "flex")
INEXACT = Faster(__name__, "bounded")  # for `Sketched` keys
FORMS = {"naive": naive.kernel_regression, "blockwise": blockwise.kernel_regression} | FASTER.functions()

FILLED = ("naive", "blockwise", "compiled", "single")  # forms that are told how far the slots are filled

FEW = 64  # queries that do not make up for widening all that is stored
LONG = 1 << 14  # slots
HUGE = 1e30  # a key as large may make a logit infinite

__all__ = [
    "ALL_PAIRS",
    "FORMS",
    "Bandwidth",
    "Narrow",
    "Reach",
    "Summary",
    "kernel_regression",
    "merged",
    "summary",
    "summary_of",
    "weights",
    "weights_at",
    "widened",
]


def kernel_regression(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
    *,
    dropout: float = 0.0,
    log_sum: bool = False,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""What a memory answers: \( f(k_t) = \sum_i \mathrm{softmax}_i(\beta(n_t)\, k_t^\top k_i)\, v_i \) over the pairs
    that t may read.

    Source: Memory Mosaics v2, equations 3, 4, 6 and 10. Position t reads the n_t pairs that `reach` gives it; without
    any it answers exactly 0.

    Args:
        queries: `(batch, heads, time, width)`; for Memory Mosaics the keys of the same positions.
        keys: `(batch, heads, slots, width)`: the pairs of earlier calls, then one for each of the `time` positions, or
            a fixed set. If they are `sketch.Sketched`, the answer to one query on a processor may be wrong by as much
            as they say, unless a form is forced.
        values: `(batch, heads, slots, value width)`.
        bandwidth: beta as a function of n.
        reach: which pairs each position may read.
        dropout: probability with which a weight is set to 0, the others growing to make up for it.
        log_sum: whether to return the logarithm of the sum of weights \( \sum_i e^{\beta k_t^\top k_i} \) as well, with
            which reads over several stores can be `merged`. No weight is dropped from that sum.
        form: force one of `FORMS`; by default the fastest for this input.

    Returns:
        `(batch, heads, time, value width)` in the dtype of `values`; with `log_sum` also `(batch, heads, time)` in
        float32 or wider, -inf without pairs.

    Raises:
        ValueError: the delay is negative, the window is below 1, the dropout no probability below 1, a fixed set is cut
            by a window or a start, a tensor has a wrong shape, device or dtype, or the form is unknown or cannot serve
            this input.
    """
    sketched, keys = keys, getattr(keys, "exact", keys)
    check_read(queries, keys, values, bandwidth, reach)
    if not 0 <= dropout < 1:
        raise ValueError(f"The dropout is {dropout}; give a probability of at least 0 and below 1.")
    if queries.numel() == 0 or keys.shape[2] == 0:
        form = "naive"  # nothing is asked, or nothing stored
    one = form is None and not isinstance(reach.delay, Tensor)
    if one and sketched is not keys and reach.stored is None:
        if INEXACT.pays("bounded", queries, sketched, values, bandwidth, dropout):
            given = queries, sketched, values, bandwidth, reach
            return run(INEXACT.functions(), "bounded", "kernel_regression", *given, log_sum=log_sum)
    if one and FASTER.pays("single", queries, keys, values, bandwidth, dropout):
        form = "single"
    if form is None:
        form = _fastest(queries, keys, values, reach, dropout)
        form = form if form in FORMS and not (log_sum and form == "shifted") else "blockwise"
    if form not in ("single", "sliced"):
        keys, values = widened(keys), widened(values)
    if reach.stored is not None and form not in FILLED:
        raise ValueError(f"The {form} form reads slots that are all filled; use {' or '.join(FILLED)}.")
    ask = partial(run, FORMS, form, "kernel_regression", dropout=dropout, log_sum=log_sum)
    read = ask(queries, keys, values, bandwidth, reach)
    if form == "single" or reach.delay is None or _is_sound(read[0] if log_sum else read):
        return read
    return _without_unreadable(read, ask, queries, widened(keys), widened(values), bandwidth, reach)


def _is_sound(read: Tensor) -> bool:
    """Whether all of what was read are numbers; not asked where the host would have to wait for the answer."""
    if read.device.type != "cpu" or torch.compiler.is_compiling() or not has_numbers(read):
        return True
    try:
        return math.isfinite(read.detach().sum(dtype=torch.promote_types(read.dtype, torch.float32)))
    except RuntimeError:  # within `torch.vmap`
        return True


def _without_unreadable(
    read: Tensor | tuple[Tensor, Tensor],
    ask: Callable[..., Any],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bandwidth: Bandwidth,
    reach: Reach,
) -> Tensor | tuple[Tensor, Tensor]:
    """What was `read`, where it is no number because of a pair that its position may not read: 0 times NaN is NaN, and
    most forms multiply what they mask by 0."""
    bad = ~((keys.abs() < HUGE).all(-1) & values.isfinite().all(-1))
    if not bad.any():
        return read
    first, end = reach.span(queries, keys)
    before = F.pad(bad.cumsum(-1), (1, 0))  # bad pairs before each slot
    at = (torch.atleast_2d(x.clamp(0, keys.shape[2]))[:, None].expand(queries.shape[:3]) for x in (end, first))
    reads_bad = torch.gt(*(before.gather(-1, x) for x in at))
    keys, values = (x.masked_fill(bad[..., None], 0) for x in (keys, values))
    sound = ask(queries, keys, values, bandwidth, reach)
    if not reads_bad.any():
        return sound
    if isinstance(read, tuple):
        return torch.where(reads_bad[..., None], read[0], sound[0]), torch.where(reads_bad, read[1], sound[1])
    return torch.where(reads_bad[..., None], read, sound)


def _fastest(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    reach: Reach,
    dropout: float,
) -> str:
    delay, window, start, stored = reach
    time = queries.shape[2]
    if isinstance(keys, Narrow) and time < FEW and stored is None:
        return "sliced"  # the others would widen all that is stored
    if time == 1 or (not queries.is_cuda and not has_numbers(queries)):
        return "naive"  # one query needs no tiles; without numbers there is nothing to ask them
    if not dropout and FASTER.pays("compiled", queries):
        return "compiled"
    if dropout and queries.device.type == "cpu":
        return "blockwise"  # PyTorch's fused attention would write out every weight
    if delay is None:
        return "shifted"
    if isinstance(delay, Tensor) or stored is not None:
        return "blockwise"
    cut = window is not None or start is not None
    if cut and keys.shape[2] == time and not dropout and FASTER.pays("flex", queries, values):
        return "flex"
    if window is not None or keys.shape[2] != time:
        # Without a gradient, a tile need not be as wide as all that is stored.
        return "sliced" if window is None and keys.shape[2] > LONG and not torch.is_grad_enabled() else "blockwise"
    return "shifted" if FASTER.pays("shifted", start) else "blockwise"
