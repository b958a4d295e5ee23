"""The recurrence of fast weights as written, one position after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import cast


def delta_rule(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    strength: Tensor | None,
    state: Tensor | None,
    start: Tensor | None,
    write: str,
) -> tuple[Tensor, Tensor]:
    """See `mosaics.ops.delta_rule.delta_rule`."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    batch, heads, time, width = keys.shape
    memory = keys.new_zeros(batch, heads, width, values.shape[3], dtype=dtype) if state is None else state
    reads = []
    for t in range(time):
        query, key, value = (cast(x[:, :, t], dtype) for x in (queries, keys, values))
        if start is not None:
            memory = memory.masked_fill((start[:, t] == t)[:, None, None, None], 0.0)
        if log_decay is not None:
            decay = cast(log_decay[:, :, t], dtype).exp()
            memory = (decay[..., None, None] if decay.dim() == 2 else decay[..., None]) * memory
        if write == "delta":
            value = value - (key[:, :, None] @ memory)[:, :, 0]
        if strength is not None:
            value = cast(strength[:, :, t, None], dtype) * value
        memory = memory + key[..., :, None] * value[..., None, :]
        reads.append((query[:, :, None] @ memory)[:, :, 0])
    return cast(torch.stack(reads, dim=2), values.dtype), memory
