"""What deep attention is given, and what it carries from call to call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Given(NamedTuple):
    """The arguments of `deep_attention` by these names in one dtype, float32 or wider; none is left out."""

    queries: Tensor
    values: Tensor
    step: Tensor
    window: Tensor
    rate: Tensor
    log_decay: Tensor
    scale: Tensor
    shift: Tensor


class DeepState(NamedTuple):
    """The pairs, what the newest of them are to get still, and the second map.

    Attributes:
        keys: `(batch, heads, pairs, width)`.
        errors: `(batch, heads, pairs, units)`, the error behind the first map that each key brought.
        shares: `(batch, heads, pairs, 2)`: by how much the errors were multiplied when their window had gone by, and
            the logarithm of all decays up to then; of the newest `window - 1` pairs neither is known.
        now: `(batch, heads, 1, window + 1)`, by how much the last token multiplies the errors of itself, the token
            before it and so on, and the logarithm of all decays up to it.
        opened: the same of the token before the open chunk.
        current: `(batch, heads, units, value width)`, the second map; None where there is none.
        anchor: the second map before the open chunk.
        inputs: `(batch, heads, window - 1, units)`, the second map's inputs of the newest tokens.
        sent: `(batch, heads, window - 1, value width)`, their errors.
    """

    keys: Tensor
    errors: Tensor
    shares: Tensor
    now: Tensor
    opened: Tensor
    current: Tensor | None = None
    anchor: Tensor | None = None
    inputs: Tensor | None = None
    sent: Tensor | None = None
