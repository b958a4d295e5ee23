"""Fast weights in chunks: within a chunk as products of small matrices, from chunk to chunk by their states.

A chunk may be cut anywhere: the result is that of the recurrence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops import cast, has_numbers, widest

CHUNK, CHUNK_OF_CHANNELS = 64, 16  # decays of their own for every channel take CHUNK times the memory, unless mild
LEAST = -200.0  # exp of it is 0 beside anything
MILD = -80.0  # decays of a chunk that come to no more are parted into two factors, each within float32


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
    dtype, given = torch.promote_types(keys.dtype, torch.float32), values.dtype
    batch, heads, time, width = keys.shape
    channels = log_decay is not None and log_decay.dim() == 4
    mild = channels and _is_mild(log_decay)
    size = min(CHUNK_OF_CHANNELS if channels and not mild else CHUNK, time)
    chunks = -(-time // size)
    missing = chunks * size - time

    def cut(x: Tensor) -> Tensor:
        """`(batch, heads, chunks, size, ...)`; what is missing at the end is 0, which changes nothing."""
        x = F.pad(x, (*[0] * (2 * (x.dim() - 3)), 0, missing)) if missing else x
        return x.unflatten(2, (chunks, size))

    queries, keys, values = (cut(cast(x, dtype)) for x in (queries, keys, values))
    visible = torch.ones(size, size, dtype=torch.bool, device=keys.device).tril()
    carried = kept = None
    if start is not None:
        start = F.pad(start, (0, missing), mode="replicate") if missing else start
        start = start.view(batch, 1, chunks, size)
        position = torch.arange(chunks * size, device=keys.device).view(chunks, size)
        visible = visible & (position[:, None, :] >= start[..., None])
        carried = (start < position[:, :1])[..., None]  # whether what came before the chunk is of its document
        kept = (position >= start[..., -1:])[..., None]  # whether it is of the document that is open at the chunk's end

    # What a position finds of another's write, of what came before, and what is left of a write at the end.
    readers = (queries, keys) if write == "delta" else (queries,)
    if log_decay is None:
        found = [x @ keys.mT * visible.to(dtype) for x in readers]
        since = keys.new_ones(1, 1, 1, 1, 1)
        until, closing = since, since[..., 0]
    else:
        sums = cut(log_decay.to(widest(log_decay)).clamp(min=LEAST)).cumsum(3)
        if mild:
            # Counted from the chunk's start, so that nothing of a later position enters, not even a rounding.
            left, right = sums.exp().to(dtype), keys * (-sums).exp().to(dtype)
            found = [((x * left) @ right.mT).masked_fill(~visible, 0.0) for x in readers]
        elif channels:
            between = (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(~visible[..., None], -torch.inf)
            between = between.to(dtype).exp()
            found = [(x[..., :, None, :] * between * keys[..., None, :, :]).sum(-1) for x in readers]
        else:
            sums = sums[..., None]
            between = (sums - sums.mT).masked_fill(~visible, -torch.inf).to(dtype).exp()
            found = [x @ keys.mT * between for x in readers]
        since, until = (x.to(dtype).exp() for x in (sums, sums[..., -1:, :] - sums))
        closing = since[..., -1, :]
    if carried is not None:
        since, until, closing = since * carried, until * kept, closing * carried[..., -1, :]

    before, after = queries * since, (keys * until).mT
    written = values if strength is None else cut(cast(strength, dtype))[..., None] * values
    if write == "delta":
        rates = keys.new_ones(1) if strength is None else cut(cast(strength, dtype))[..., None]
        lower = (rates * found[1]).tril(-1)
        right = torch.cat([written, rates * keys * since], dim=-1)
        solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
        written, seen = solved.split([values.shape[-1], width], dim=-1)

    memory = keys.new_zeros(batch, heads, width, values.shape[-1]) if state is None else state
    closing = closing.expand(batch, heads, chunks, closing.shape[-1])[..., None]
    memories, writes = [], []
    for chunk in range(chunks):
        memories.append(memory)
        new = written[:, :, chunk]
        if write == "delta":
            new = new - seen[:, :, chunk] @ memory
        writes.append(new)
        memory = closing[:, :, chunk] * memory + after[:, :, chunk] @ new
    answers = before @ torch.stack(memories, dim=2) + found[0] @ torch.stack(writes, dim=2)
    return cast(answers.flatten(2, 3)[:, :, :time], given), memory


def _is_mild(log_decay: Tensor) -> bool:
    """Whether no channel decays by more than `MILD` in any chunk of `CHUNK` positions; not asked of what is traced."""
    if torch.compiler.is_compiling() or not has_numbers(log_decay):
        return False
    with torch.no_grad():
        least = log_decay.min() if log_decay.numel() else log_decay.new_zeros(())
        if bool(least * CHUNK >= MILD):
            return True
        cut = F.pad(log_decay, (0, 0, 0, -log_decay.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK))
        return bool((cut.sum(3) >= MILD).all())
