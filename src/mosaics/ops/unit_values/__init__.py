r"""What contextual memories store as values: `unit_values`. The mathematics is in this folder's README."""

from __future__ import annotations

from torch import Tensor

from mosaics.ops import FLOATS, Faster, check, run
from mosaics.ops.unit_values import naive

FASTER = Faster(__name__, "in_place", "compiled")
FORMS = {"naive": naive.unit_values} | FASTER.functions()

__all__ = ["FORMS", "unit_values"]


def unit_values(raw: Tensor, mix: Tensor, length: Tensor, *, eps: float = 0.0, form: str | None = None) -> Tensor:
    r"""Values that look one position ahead: \( \bar v_t = c\, \tilde v_t + (1 - c)\, \tilde v_{t+1},\ v_t = \ell\, \bar
    v_t / (\|\bar v_t\| + \epsilon) \).

    Source: Memory Mosaics v2, equation 9. What follows the last position counts as 0. Computed in float32 or wider
    whatever the dtype of `raw`.

    Args:
        raw: \( \tilde v \), `(batch, heads, time, width)`.
        mix: c, the share of the own position, `(heads,)`.
        length: \( \ell > 0 \), the norm of the values, `(heads,)`.
        eps: added to the norm.
        form: force one of `FORMS`; by default the fastest for this input.

    Returns:
        The values, contiguous, in the shape and dtype of `raw`; 0 without a gradient where the norm is 1e-12 or less.

    Raises:
        ValueError: the form is unknown or cannot run here, or a tensor has a wrong shape, device or dtype.
    """
    batch, heads, time, width = raw.shape if raw.dim() == 4 else ("batch", "heads", "time", "width")
    each = (("shares", mix, (heads,), FLOATS), ("lengths", length, (heads,), FLOATS))
    check("unit_values", raw.device, (("raw values", raw, (batch, heads, time, width), FLOATS), *each))
    if form is None:
        form = "compiled" if FASTER.pays("compiled", raw) else "in_place" if FASTER.pays("in_place", raw) else "naive"
    return run(FORMS, form, "unit_values", raw, mix, length, eps=eps)
