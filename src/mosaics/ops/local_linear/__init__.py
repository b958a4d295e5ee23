r"""Local linear attention: a ridge regression around every query. The mathematics is in this folder's README."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mosaics.ops import FLOATS, INTEGERS, cast, check, eager_on_cpu, has_numbers, run
from mosaics.ops.kernel_regression import Narrow, widened
from mosaics.ops.local_linear import blockwise, naive

FORMS = {"naive": naive.local_linear, "blockwise": blockwise.local_linear}
ITERATIONS = 16
LONGEST = 512  # queries in closed form, which holds a matrix for each pair of a query and a key

__all__ = ["FORMS", "ITERATIONS", "LocalRead", "local_linear"]


class LocalRead(NamedTuple):
    """What was read.

    Attributes:
        read: `(batch, heads, time, value width)` in the dtype of the values.
        residual: `(batch, heads, time)`, how much of each system was left unsolved, |m - q - (C + lambda) r| over
            |m - q|, in float32 or wider and without a gradient; 0 in closed form, None where the probe was given.
    """

    read: Tensor
    residual: Tensor | None


@eager_on_cpu
def local_linear(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    *,
    probe: Tensor | None = None,
    ridge: Tensor | None = None,
    relative: bool = True,
    iterations: int = ITERATIONS,
    scale: float | None = None,
    start: Tensor | None = None,
    dropout: float = 0.0,
    form: str | None = None,
) -> LocalRead:
    r"""The intercept b of \( \min_{b, W} \sum_j w_j \|v_j - b - W (k_j - q)\|^2 + \lambda \|W\|^2 \) for every query q,
    with \( w_j = e^{q \cdot k_j s} \), over the pairs up to its own position; or, with a `probe` r, Parallax:
    \( \sum_j p_j (1 - (k_j - \bar k) \cdot r)\, v_j \) with \( p = w / \sum w \).

    Sources: Local Linear Attention (Zuo et al., arXiv 2510.01450), Parallax (arXiv 2605.29157). Computed in float32 or
    wider. Time grows with the square of the context, memory with the context (not in the form `naive`).

    Args:
        queries: `(batch, heads, time, width)`.
        keys: `(batch, heads, slots, width)`: the pairs of earlier calls, then one for each of the `time` positions.
        values: `(batch, heads, slots, value width)`.
        probe: r, like `queries`; None: it is solved for.
        ridge: lambda, `(heads,)`, above 0; with a probe there is none.
        relative: whether lambda is one of weights whose sum is 1, so that adding to all logits changes nothing.
        iterations: of conjugate gradients, in each of both passes. After as many as keys are wide the solution is exact
            but for rounding; the gradient is exact as far as the solution is.
        scale: s; None: 1 / sqrt(width).
        start: as in `mosaics.ops.kernel_regression.Reach`.
        dropout: probability with which what a pair adds is left out, the others growing to make up for it.
        form: force one of `FORMS`: `naive` is the closed form, for up to 512 positions; by default `blockwise`.

    Raises:
        ValueError: a tensor has a wrong shape, device or dtype, not just one of probe and ridge is given, the dropout
            is no probability below 1, there are no iterations, or the form is unknown or can't serve this input.
    """
    keys, values = widened(keys), widened(values)
    named = queries.dim() == keys.dim() == values.dim() == 4
    batch, heads, time, width = queries.shape if named else ("batch", "heads", "time", "width")
    slots, value_width = (keys.shape[2], values.shape[3]) if named else ("slots", "value width")
    given = [
        ("queries", queries, (batch, heads, time, width), FLOATS),
        ("keys", keys, (batch, heads, slots, width), FLOATS),
        ("values", values, (batch, heads, slots, value_width), FLOATS),
        ("probes", probe, (batch, heads, time, width), FLOATS),
        ("ridges", ridge, (heads,), FLOATS),
        ("starts", start, (batch, time), INTEGERS),
    ]
    check("local_linear", queries.device, given)
    if slots < time:
        raise ValueError(f"local_linear got {slots} pairs for {time} positions; give those of all, the newest last.")
    if (probe is None) == (ridge is None):
        raise ValueError("local_linear needs a probe or a ridge, with which it solves for one; give one of them.")
    if not 0 <= dropout < 1:
        raise ValueError(f"The dropout is {dropout}; give a probability of at least 0 and below 1.")
    if iterations < 1:
        raise ValueError(f"local_linear got {iterations} iterations; give at least 1.")
    if form == "naive" and time > LONGEST:
        raise ValueError(f"The closed form is for up to {LONGEST} positions, not {time}; leave out the form.")
    if form is None:
        form = "blockwise" if queries.numel() and has_numbers(queries) else "naive"
    wide, dtype = torch.promote_types(queries.dtype, torch.float32), values.dtype
    tensors = (None if x is None else cast(x, wide) for x in (queries, keys, values, probe, ridge))
    scale = 1 / math.sqrt(width) if scale is None else scale
    rest = (start, scale, relative, iterations, dropout)
    read, residual = run(FORMS, form, "local_linear", *tensors, *rest)
    return LocalRead(cast(read, dtype), residual)
