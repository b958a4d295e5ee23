r"""Slots that take from each token what is orthogonal to them: Lattice. The mathematics is in this folder's README."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosaics.ops import FLOATS, cast, check, run
from mosaics.ops.lattice import chunked, naive
from mosaics.ops.lattice.naive import LOSSES
from mosaics.ops.lattice.state import LatticeState, Steps

FORMS = {"naive": naive.lattice, "chunked": chunked.lattice}

__all__ = ["FORMS", "LOSSES", "LatticeState", "lattice"]


def lattice(
    initial: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Tensor,
    segments: Any,
    *,
    loss: str = "decoding",
    decay: Tensor | None = None,
    renormalised: bool = True,
    state: LatticeState | None = None,
    form: str | None = None,
) -> tuple[Tensor, LatticeState]:
    r"""\( S_t = a_t S_{t-1} - g_t \nabla_S\, \ell(\Phi(S'); k_t, v_t),\ y_t = \Phi(S_t) q_t \), where the columns of
    \( \Phi(S) \) are the slots \( s_i / \sqrt{\|s_i\|^2 + 10^{-6}} \) and \( S' \) are those at the start of t's chunk.

    Source: Lattice (Karami and Mirrokni, arXiv 2504.05646), its three losses: `decoding`,
    \( \frac12 \|v - \Phi k\|^2 \); `encoding`, \( \frac12 \|k - \Phi^\top v\|^2 \); `similarity`,
    \( -\langle \Phi k, v \rangle \). Computed in float32 or wider.

    Args:
        initial: the slots that every document begins with, a row each, `(heads, slots, width)`; none is 0.
        queries: `(batch, heads, time, slots)`.
        keys: like `queries`.
        values: `(batch, heads, time, width)`.
        step: g, `(batch, heads, time)`.
        segments: the chunks of the call, as `Layout.segments` gives them: they count tokens of a document.
        loss: one of `LOSSES`.
        decay: the natural logarithm of a, `(batch, heads, time)`; None: a is 1.
        renormalised: whether \( S' \) is \( \Phi \) of the slots before it, in the place of those.
        state: what an earlier call returned.
        form: force one of `FORMS`; by default the fastest.

    Returns:
        `(batch, heads, time, width)` in the dtype of `values`; at padding it means nothing. And the state.

    Raises:
        ValueError: shapes do not fit, or the form or the loss is unknown.
    """
    named = keys.dim() == 4 and keys.shape[2] and values.dim() == 4
    batch, heads, time, slots = keys.shape if named else ("batch", "heads", "time of 1 or more", "slots")
    width = values.shape[3] if named else "width"
    given = [
        ("keys", keys, (batch, heads, time, slots), FLOATS),
        ("queries", queries, (batch, heads, time, slots), FLOATS),
        ("values", values, (batch, heads, time, width), FLOATS),
        ("steps", step, (batch, heads, time), FLOATS),
        ("decays", decay, (batch, heads, time), FLOATS),
        ("initial slots", initial, (heads, slots, width), FLOATS),
    ]
    if state is not None:
        given += [("slots of the state", x, (batch, heads, slots, width), FLOATS) for x in state]
    check("lattice", keys.device, given)
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; choose one of {', '.join(LOSSES)}.")
    dtype = torch.promote_types(keys.dtype, torch.float32)
    wide = dict(queries=queries, keys=keys, values=values, step=step, decay=decay)
    steps = Steps.of({name: None if x is None else cast(x, dtype) for name, x in wide.items()}, segments)
    initial = cast(initial, dtype)
    if state is None:
        state = LatticeState.first(initial, batch)
    read, state = run(FORMS, form or "chunked", "lattice", initial, steps, loss, renormalised, state)
    return cast(read, values.dtype), state
