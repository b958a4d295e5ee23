"""Where documents begin, from whatever says so: ids, positions that restart, cumulative lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import may_be


def documents_of(
    shape: tuple[int, int],
    mask: Tensor | None,
    *,
    ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    open_document: Tensor | None = None,
    cached: bool = False,
) -> Tensor | None:
    """An id for each position that changes where a document begins.

    Real tokens alone are compared, each with the real one before it. A document begins where the id is another, where
    the position is not larger (a gap does not begin one), and where the cumulative lengths say so. The first real token
    of a call with a cache goes on with the open document, unless its id is another or its position is 0. Positions that
    never restart say nothing.

    Args:
        shape: batch and time of the call.
        mask: `(batch, time)`, true for real tokens; None: all are.
        ids: `(batch, time)`.
        position_ids: `(time,)`, `(1, time)` or `(batch, time)`.
        cu_seq_lens: `(documents + 1,)`, from 0 to the time, of a batch of one row.
        open_document: `(batch,)`, ids of the documents that an earlier call left open; None counts as 0.
        cached: whether there was an earlier call.

    Returns:
        `(batch, time)` integers, or None where nothing begins.

    Raises:
        ValueError: shapes do not fit, or two of them disagree.
    """
    batch, time = shape
    borders: dict[str, Tensor] = {}
    if position_ids is not None or cu_seq_lens is not None:
        given = position_ids if position_ids is not None else cu_seq_lens
        device = given.device if mask is None else mask.device
        here = torch.arange(time, device=device).expand(batch, time)
        real = torch.ones(batch, time, dtype=torch.bool, device=device) if mask is None else mask.bool()
        # The index of the real token before each position; -1 for the first of a row.
        before = torch.cat([here.new_full((batch, 1), -1), torch.where(real, here, -1).cummax(1).values[:, :-1]], dim=1)
    if position_ids is not None:
        if position_ids.shape not in ((time,), (1, time), (batch, time)):
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}; give one number for each of the {batch} x {time} "
                "positions, or for each of a row."
            )
        positions = position_ids.to(device).expand(batch, time)
        last = positions.gather(1, before.clamp(min=0))
        border = torch.where(before >= 0, positions <= last, (positions == 0) & cached) & real
        if may_be(lambda: border.any()):
            borders["position_ids"] = border
    if cu_seq_lens is not None:
        lens = cu_seq_lens.flatten().to(device)
        if batch != 1 or len(lens) < 2 or lens[0] != 0 or lens[-1] != time or bool((lens.diff() < 0).any()):
            raise ValueError(
                f"cu_seq_lens is {lens.tolist()[:20]} for an input of {batch} x {time}; give one row, and where its "
                "documents begin, from 0 to its length."
            )
        begins = torch.zeros(1, time, dtype=torch.bool, device=device)
        begins[0, lens[1:-1][lens[1:-1] < time]] = True
        # Padding may lie where a document begins: its first real token does.
        number = begins.cumsum(1)
        borders["cu_seq_lens"] = real & (before >= 0) & (number != number.gather(1, before.clamp(min=0)))
    if ids is not None and borders:
        ids = ids.to(device)
        opened = ids.new_zeros(batch) if open_document is None else open_document.to(ids)
        last = torch.where(before >= 0, ids.gather(1, before.clamp(min=0)), opened[:, None])
        borders = {"document_ids": (ids != last) & real & ((before >= 0) | cached)} | borders
    names = list(borders)
    for name in names[1:]:
        if not torch.equal(borders[name], borders[names[0]]):
            raise ValueError(f"{names[0]} and {name} disagree about where documents begin; give one of them.")
    if ids is not None or not borders:
        return ids
    opened = torch.zeros(batch, dtype=torch.long, device=device) if open_document is None else open_document
    return opened[:, None] + borders[names[0]].cumsum(1)
