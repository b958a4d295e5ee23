r"""A network that learns while it is used, whose first map is asked by the exponential kernel: `deep_attention`. The
mathematics is in this folder's README."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mosaics.ops import FLOATS, INTEGERS, cast, check, run
from mosaics.ops.deep_attention import chunked, naive
from mosaics.ops.deep_attention.state import DeepState, Given
from mosaics.ops.inner_loop.network import Network

FORMS = {"naive": naive.deep_attention, "chunked": chunked.deep_attention}

__all__ = ["FORMS", "DeepState", "deep_attention"]


def deep_attention(
    initial: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Tensor,
    segments: Any,
    *,
    network: Network,
    window: Tensor | None = None,
    rate: Tensor | None = None,
    log_decay: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    start: Tensor | None = None,
    state: DeepState | None = None,
    form: str | None = None,
) -> tuple[Tensor, DeepState | None]:
    r"""\( M_t = \alpha_t M_{t-1} - \rho_t \sum_i \gamma^{(t)}_i \theta_i \nabla \ell(M'_i; \phi^*(k_i), v_i),\ y_t =
    f(\phi^*(q_t); M_t) \) with \( \phi^*(q) \cdot \phi^*(k) = e^{s\, q \cdot k - c} \), where i are the last tokens of
    the document up to t and \( M'_i \) what M was at the start of i's chunk.

    Source: DeepTransformers and Dot of Atlas (arXiv 2505.23735), docs/memories/atlas.md. The first map begins with 0,
    so that \( W_2 \phi^*(q) \) is a sum over the pairs so far. Computed in float32 or wider; time grows with the square
    of the context, memory with the context.

    Args:
        initial: the second map that every document begins with, `(heads, units, value width)`; None: there is but one.
        queries: `(batch, heads, time, width)`.
        keys: like `queries`.
        values: `(batch, heads, time, value width)`.
        step: \( \theta \), `(batch, heads, time)`.
        segments: the chunks of the call, as `Layout.segments` gives them.
        network: the activation and the loss; without gate, bias, residual and norm.
        window: \( \gamma^{(t)} \), `(batch, heads, time, tokens)`: the place's weights for the gradients of itself, of
            the token before it, and so on; None: 1 for itself alone.
        rate: \( \rho \), `(batch, heads, time)`; None: 1.
        log_decay: \( \log \alpha \), at most 0, `(batch, heads, time)`; None: 0.
        scale: s, at least 0, `(heads,)`; None: 1 / sqrt(width).
        shift: c, `(heads,)`; None: 0.
        start: as in `mosaics.ops.kernel_regression.Reach`.
        state: of the calls before, with all their pairs.
        form: force one of `FORMS`; `naive` has Taylor's features up to a degree and takes no state.

    Returns:
        `(batch, heads, time, value width)` in the dtype of `values`; at padding it means nothing. And the state with
        the pairs of this call alone, before whose errors and shares are those of up to `tokens - 1` earlier ones, which
        they replace; None of the form `naive`.

    Raises:
        ValueError: shapes do not fit, the network has what it may not have, or the form is unknown or can't go on from
            a state.
    """
    named = keys.dim() == 4 and keys.shape[2] and values.dim() == 4
    batch, heads, time, width = keys.shape if named else ("batch", "heads", "time of 1 or more", "width")
    value_width = values.shape[3] if named else "value width"
    units = "units" if initial is None or initial.dim() != 3 else initial.shape[1]
    tokens = 1 if window is None else max(1, window.shape[-1])
    given = [
        ("keys", keys, (batch, heads, time, width), FLOATS),
        ("queries", queries, (batch, heads, time, width), FLOATS),
        ("values", values, (batch, heads, time, value_width), FLOATS),
        ("a second map", initial, (heads, units, value_width), FLOATS),
        ("steps", step, (batch, heads, time), FLOATS),
        ("windows", window, (batch, heads, time, tokens), FLOATS),
        ("rates", rate, (batch, heads, time), FLOATS),
        ("decays", log_decay, (batch, heads, time), FLOATS),
        ("scales", scale, (heads,), FLOATS),
        ("shifts", shift, (heads,), FLOATS),
        ("starts", start, (batch, time), INTEGERS),
    ]
    check("deep_attention", keys.device, given)
    gated = network.activation == "geglu"  # of a first map of 0 no error comes back through it
    if gated or network.bias or network.residual or network.normed or network.loss.takes_delta:
        raise ValueError("The network of deep_attention has no gate, bias, residual, norm or delta; leave them out.")
    wide = torch.promote_types(keys.dtype, torch.float32)
    step = cast(step, wide)
    window = torch.ones_like(step)[..., None] if window is None else window
    rate = torch.ones_like(step) if rate is None else rate
    log_decay = torch.zeros_like(step) if log_decay is None else log_decay
    scale = step.new_full((keys.shape[1],), 1 / math.sqrt(keys.shape[3])) if scale is None else scale
    shift = torch.zeros_like(scale) if shift is None else shift
    tensors = (queries, values, step, window, rate, log_decay, scale, shift)
    initial = None if initial is None else cast(initial, wide)
    rest = (Given(*(cast(x, wide) for x in tensors)), initial, segments, network, start, state)
    read, state = run(FORMS, form or "chunked", "deep_attention", cast(keys, wide), *rest)
    return cast(read, values.dtype), state
