r"""Weights that learn while they are used: an inner loop of gradient descent. The mathematics is in this folder's
README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mosaics.ops import FLOATS, cast, check, run
from mosaics.ops.inner_loop import chunked, naive
from mosaics.ops.inner_loop.losses import LOSSES, Loss
from mosaics.ops.inner_loop.network import ACTIVATIONS, Network
from mosaics.ops.inner_loop.retention import RETENTIONS, Retention
from mosaics.ops.inner_loop.state import InnerState, Steps

FORMS = {"naive": naive.inner_loop, "chunked": chunked.inner_loop}

__all__ = ["ACTIVATIONS", "FORMS", "LOSSES", "RETENTIONS", "InnerState", "Loss", "Network", "Retention", "inner_loop"]


def inner_loop(
    initial: Sequence[Tensor],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Tensor,
    segments: Any,
    *,
    network: Network,
    retention: Retention | None = None,
    momentum: Tensor | None = None,
    decay: Tensor | None = None,
    delta: Tensor | None = None,
    window: Tensor | None = None,
    rate: Tensor | None = None,
    orthogonal: int = 0,
    norm: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    state: InnerState | None = None,
    watched: dict[str, Tensor] | None = None,
    form: str | None = None,
) -> tuple[Tensor, InnerState]:
    r"""\( S_t = \eta_t S_{t-1} - \theta_t \nabla \ell(W'; k_t, v_t),\ A_t = (1 - \alpha_t) A_{t-1} + S_t,\
    W_t = R(A_t),\ y_t = f(q_t; W_t) \), where \( W' \) are the weights at the start of t's chunk.

    Sources: Titans (arXiv 2501.00663, section 3), where W = A; Miras (2504.13173) with its losses and retentions R;
    with a `scale` \( \rho \), TTT (2407.04620): \( S \) is 0 at the start of a chunk, \( \eta = 1 \), and
    \( W_t = W' + \rho_t S_t \), of which the last place's is the next chunk's start. Computed in float32 or wider.

    With a `window` \( \gamma \), a `rate` \( \rho \) and `orthogonal` Newton–Schulz iterations N, the Omega rule and
    Muon of Atlas (2505.23735): \( S_t = \eta_t S_{t-1} - \sum_i \gamma^{(t)}_i \theta_i \nabla \ell_i,\ A_t = (1 -
    \alpha_t) A_{t-1} + \rho_t N(S_t) \), where i are the last tokens of the document up to t, each with the gradient
    that it had in its own chunk.

    Steps, decays and deltas may have channels: channel c is that of the outputs c, c + channels, ... of every map.

    Args:
        initial: the sums A that every document begins with (without a retention the weights), `(heads, inputs,
            outputs)` for each map; with a bias, it is the last row.
        queries: `(batch, heads, time, width)`.
        keys: like `queries`.
        values: `(batch, heads, time, value width)`.
        step: \( \theta \), `(batch, heads, time)` or `(batch, heads, time, channels)`.
        segments: the chunks of the call, as `Layout.segments` gives them: they count tokens of a document.
        network: what is learnt, and its loss.
        retention: R; by default W = A.
        momentum: \( \eta \), `(batch, heads, time)`; None: there is none.
        decay: \( \alpha \), shaped as a step may be; None: 0.
        delta: of the loss, where it has one, shaped as a step may be; of one channel where the loss is that of a norm.
        window: \( \gamma^{(t)} \), `(batch, heads, time, tokens)`: the place's weights for the gradients of itself, of
            the token before it, and so on; None: 1 for itself alone.
        rate: \( \rho_t \), by which what is written is multiplied, `(batch, heads, time)`; None: 1.
        orthogonal: iterations of `newton_schulz`, which each matrix of the momentum goes through before it is written
            (Muon); 0: none.
        norm: scale and shift of a `normed` network, `(heads, 1, value width)` each.
        scale: \( \rho \), `(places of a chunk,)`; neither momentum, decay, retention, window, rate nor
            `orthogonal` go with it.
        state: what an earlier call returned.
        watched: filled with `surprise` and `norm of the weights`, `(batch, heads, time)`: the norm of each token's
            gradient, and of the weights that it was taken at, those at the start of its chunk.
        form: force one of `FORMS`; by default the fastest.

    Returns:
        `(batch, heads, time, value width)` in the dtype of `values`; at padding it means nothing. And the state.

    Raises:
        ValueError: shapes do not fit, the form is unknown, or what excludes each other is given together.
    """
    named = keys.dim() == 4 and keys.shape[2] and values.dim() == 4
    batch, heads, time, width = keys.shape if named else ("batch", "heads", "time of 1 or more", "width")
    value_width = values.shape[3] if named else "value width"
    retention = retention or Retention()
    rates = {"steps": step, "decays": decay, "deltas": delta}
    sizes = {name: (batch, heads, time) + (() if x is None else x.shape[3:4]) for name, x in rates.items()}
    given = [
        ("keys", keys, (batch, heads, time, width), FLOATS),
        ("queries", queries, (batch, heads, time, width), FLOATS),
        ("values", values, (batch, heads, time, value_width), FLOATS),
        ("momenta", momentum, (batch, heads, time), FLOATS),
        ("windows", window, (batch, heads, time, max(1, window.shape[-1]) if window is not None else 1), FLOATS),
        ("rates", rate, (batch, heads, time), FLOATS),
        *((name, x, sizes[name], FLOATS) for name, x in rates.items()),
        ("scale", scale, (segments.size,), FLOATS),
    ]
    check("inner_loop", keys.device, given)
    others = (momentum, decay, window, rate)
    if scale is not None and not (all(x is None for x in others) and retention.linear and not orthogonal):
        raise ValueError("A scale goes with neither momentum, decay nor a retention, window, rate or Newton–Schulz.")
    if orthogonal < 0:
        raise ValueError(f"orthogonal is {orthogonal}; give a number of iterations, or 0 for none.")
    if (norm is None) == network.normed:
        raise ValueError("A normed network and a norm go together; give both or neither.")
    if (delta is None) == network.loss.takes_delta:
        raise ValueError(f"The loss {network.loss.name!r} {'needs a' if delta is None else 'takes no'} delta.")
    ends = [width, *(w.shape[-1] for w in initial)]
    widths = [n if number == 0 else n // network.halves(number - 1, len(initial)) for number, n in enumerate(ends)]
    fits = [w.shape[:-1] == (heads, n + network.bias) for w, n in zip(initial, widths, strict=False)]
    if not initial or not all(fits) or ends[-1] != value_width or (network.residual and width < value_width):
        shapes = ", ".join(str(tuple(w.shape)) for w in initial)
        raise ValueError(f"inner_loop got maps of shapes {shapes}; from {width} to {value_width} in {heads} heads.")
    for name, x in rates.items():
        channels = 1 if x is None or x.dim() == 3 else x.shape[3]
        units = [1] if name == "deltas" and network.loss.of_the_norm else ends[1:]
        if channels < 1 or any(n % channels for n in units):
            raise ValueError(f"inner_loop got {name} of {channels} channels; they have to divide {units}.")
        if channels > 1 and name == "decays" and retention.name == "kl" and retention.over == "outputs":
            raise ValueError("Weights that are shares of outputs are forgotten together; give decays without channels.")
    dtype = torch.promote_types(keys.dtype, torch.float32)
    wide = dict(queries=queries, keys=keys, values=values, step=step, momentum=momentum, decay=decay, delta=delta)
    wide |= dict(window=window, rate=rate)
    wide = {name: None if x is None else cast(x, dtype) for name, x in wide.items()}
    scale = None if scale is None else cast(scale, dtype)
    norm = None if norm is None else tuple(cast(x, dtype) for x in norm)
    if state is None:
        state = InnerState.first(initial, batch, dtype, None if window is None else window.shape[-1])
    steps = Steps.of(wide, scale, segments)

    seen: list[Tensor] | None = None if watched is None else []
    rest = (network, retention, orthogonal, norm, scale, state, seen)
    read, state = run(FORMS, form or "chunked", "inner_loop", keys, initial, steps, *rest)
    if watched is not None:
        watched["surprise"], watched["norm of the weights"] = steps.joined(seen).unbind(-1)
    return cast(read, values.dtype), state
