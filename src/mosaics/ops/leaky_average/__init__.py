r"""The gated recurrence that makes keys: `leaky_average`. The mathematics is in this folder's README."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import FLOATS, Faster, check, has_numbers, run
from mosaics.ops.leaky_average import chunked, naive
from mosaics.ops.leaky_average.state import LeakyAverageState

FASTER = Faster(__name__, "compiled", "triton")
FORMS = {"naive": naive.leaky_average, "chunked": chunked.leaky_average} | FASTER.functions()

__all__ = ["FORMS", "LeakyAverageState", "leaky_average"]


def leaky_average(
    inputs: Tensor,
    log_gate: Tensor,
    log_decay: Tensor,
    state: LeakyAverageState | None = None,
    *,
    eps: float = 0.0,
    form: str | None = None,
) -> tuple[Tensor, LeakyAverageState]:
    r"""Unit keys from a gated leaky average: \( \bar k_t = g_t \tilde k_t + \lambda_t \bar k_{t-1},\ k_t = \bar k_t /
    \|\bar k_t\| \).

    Source: Memory Mosaics v2, equation 8. Only directions leave the recurrence, so it is carried as direction and log
    scale: no gate, however large or small, overflows. Computed in float32 or wider whatever the dtype of `inputs`.

    Args:
        inputs: \( \tilde k \), `(batch, heads, time, width)`.
        log_gate: \( \log g \), `(batch, heads, time)`; -inf keeps a position out (padding).
        log_decay: \( \log \lambda \le 0 \), `(batch, heads, time)`; -inf forgets all that came before (a new document).
        state: what an earlier call returned, to continue it.
        eps: added to the norm, \( k_t = \bar k_t / (\|\bar k_t\| + \epsilon) \).
        form: force one of `FORMS`; by default the fastest for this input.

    Returns:
        The keys in the shape and dtype of `inputs` (0 where the average is 0), and the state after the last position.

    Raises:
        ValueError: the form is unknown or cannot run here, there is no position, or a tensor has a wrong shape, device
            or dtype.
    """
    named = inputs.dim() == 4 and inputs.shape[2]
    batch, heads, time, width = inputs.shape if named else ("batch", "heads", "time of 1 or more", "width")
    given = [
        ("inputs", inputs, (batch, heads, time, width), FLOATS),
        ("gates", log_gate, (batch, heads, time), FLOATS),
        ("decays", log_decay, (batch, heads, time), FLOATS),
    ]
    if state is not None:
        given.append(("directions", state[0], (batch, heads, width), FLOATS))
        given.append(("log scales", state[1], (batch, heads), FLOATS))
    check("leaky_average", inputs.device, given)
    if form is None:
        form = _fastest(inputs)
    return run(FORMS, form, "leaky_average", inputs, log_gate, log_decay, state, eps=eps)


def _fastest(inputs: Tensor) -> str:
    if FASTER.pays("compiled", inputs):
        return "compiled"
    if torch.compiler.is_exporting():
        return "chunked"  # whose graph is the same for all lengths
    if inputs.shape[2] == 1 or (not inputs.is_cuda and not has_numbers(inputs)):
        return "naive"  # one position is one step of the recurrence; without numbers there is nothing to ask them
    return "triton" if FASTER.pays("triton", inputs) else "chunked"
