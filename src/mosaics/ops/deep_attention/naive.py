"""Deep attention as it is defined: the weights of a network that learns, token after token, from features that are
written out. There are infinitely many; Taylor's up to `DEGREE` stand for them, enough where products are small."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mosaics.ops.deep_attention.state import DeepState, Given
from mosaics.ops.inner_loop import inner_loop
from mosaics.ops.inner_loop.network import Network
from mosaics.ops.polynomial import polynomial

DEGREE = 8


def deep_attention(
    keys: Tensor,
    given: Given,
    initial: Tensor | None,
    segments: Any,
    network: Network,
    start: Tensor | None,
    state: DeepState | None,
) -> tuple[Tensor, None]:
    """See `mosaics.ops.deep_attention.deep_attention`; the chunks say where documents begin.

    Raises:
        ValueError: there is a state, which has pairs and not weights.
    """
    if state is not None:
        raise ValueError("The naive form of deep_attention begins with the document; leave out the form.")
    roots = keys.new_tensor([1 / math.sqrt(math.factorial(n)) for n in range(DEGREE + 1)])
    size, along = (x[:, None, None] for x in ((-0.5 * given.shift).exp(), given.scale.sqrt()))
    queries, keys = (size * polynomial(along * x, roots) for x in (given.queries, keys))
    units = given.values.shape[-1] if initial is None else initial.shape[1]
    first = keys.new_zeros(keys.shape[1], keys.shape[3], units)
    read, _ = inner_loop(
        [first] if initial is None else [first, initial],
        queries,
        keys,
        given.values,
        given.step,
        segments,
        network=network,
        decay=-torch.expm1(given.log_decay),
        window=given.window,
        rate=given.rate,
        form="naive",
    )
    return read, None
