r"""Fast weights: a matrix that is written and read at every position. The mathematics is in this folder's README."""

from __future__ import annotations

from torch import Tensor

from mosaics.ops import FLOATS, INTEGERS, check, run
from mosaics.ops.delta_rule import chunked, naive

FORMS = {"naive": naive.delta_rule, "chunked": chunked.delta_rule}
WRITES = ("delta", "hebbian")

__all__ = ["FORMS", "WRITES", "delta_rule"]


def delta_rule(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None = None,
    strength: Tensor | None = None,
    state: Tensor | None = None,
    *,
    start: Tensor | None = None,
    write: str = "delta",
    form: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""\( \tilde S_t = e^{g_t} S_{t-1},\ S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top,\
    y_t = S_t^\top q_t \); a Hebbian write leaves \( \tilde S_t^\top k_t \) out.

    Sources: linear attention (arXiv 2006.16236) and RetNet (2307.08621) are Hebbian; GLA (2312.06635) and Mamba-2
    (2405.21060), too; DeltaNet (2406.06484), Gated DeltaNet (2412.06464) and Kimi Delta Attention (2510.26692) correct
    the error of what has decayed. Computed in float32 or wider whatever the dtype of the keys.

    Args:
        queries: `(batch, heads, time, width)`, scaled as they are to be.
        keys: like `queries`; a key of 0 writes nothing.
        values: `(batch, heads, time, value width)`.
        log_decay: \( g \le 0 \), `(batch, heads, time)`, or `(batch, heads, time, width)` for every channel of the
            keys; below -200 counts as -200; None: nothing decays.
        strength: \( \beta \), `(batch, heads, time)`; None: 1.
        state: \( S \), `(batch, heads, width, value width)`, what an earlier call returned; None: 0.
        start: `(batch, time)`, integers, where the document of each position begins, counted from the first position of
            this call; None: all positions and the state are one document.
        write: `delta` or `hebbian`.
        form: force one of `FORMS`; by default the fastest for this input.

    Returns:
        `(batch, heads, time, value width)` in the dtype of `values`, and the state after the last position.

    Raises:
        ValueError: the form or the write is unknown, there is no position, or a tensor has a wrong shape, device or
            dtype.
    """
    if write not in WRITES:
        raise ValueError(f"delta_rule has no write {write!r}; choose {' or '.join(WRITES)}.")
    named = keys.dim() == 4 and keys.shape[2] and values.dim() == 4
    batch, heads, time, width = keys.shape if named else ("batch", "heads", "time of 1 or more", "width")
    value_width = values.shape[3] if named else "value width"
    channels = log_decay is not None and log_decay.dim() == 4
    given = [
        ("keys", keys, (batch, heads, time, width), FLOATS),
        ("queries", queries, (batch, heads, time, width), FLOATS),
        ("values", values, (batch, heads, time, value_width), FLOATS),
        ("decays", log_decay, (batch, heads, time, width) if channels else (batch, heads, time), FLOATS),
        ("strengths", strength, (batch, heads, time), FLOATS),
        ("state", state, (batch, heads, width, value_width), FLOATS),
        ("start", start, (batch, time), INTEGERS),
    ]
    check("delta_rule", keys.device, given)
    if form is None:
        form = "naive" if time == 1 else "chunked"
    return run(FORMS, form, "delta_rule", queries, keys, values, log_decay, strength, state, start, write)
