"""Kernel regression on CUDA through PyTorch's FlexAttention: windows and documents in one compiled kernel."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.reach import Reach, is_empty

BLOCK = 128
SMALLEST = 1e-6  # of what a query may be divided by
HAS_TRITON = find_spec("triton") is not None


def pays(queries: Tensor, values: Tensor) -> bool:
    """Whether the kernel can be compiled for these."""
    wide = min(queries.shape[-1], values.shape[-1]) >= 16
    return queries.is_cuda and HAS_TRITON and wide and queries.dtype != torch.float64


def kernel_regression(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bandwidth: Bandwidth,
    reach: Reach,
    *,
    dropout: float = 0.0,
    log_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Equation 4 through FlexAttention; see `mosaics.ops.kernel_regression.kernel_regression`.

    On a processor it runs unfused, writes out every weight and has no gradient: for tests.

    Raises:
        ValueError: there is dropout.
    """
    if dropout:
        raise ValueError("The flex form has no dropout; use the blockwise form.")
    batch, heads, time = queries.shape[:3]
    first, end = reach.span(queries, keys)
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    beta = bandwidth.at(end - first).to(wide).expand(batch, heads, time)
    # The kernel multiplies its float32 logits by beta: no query is rounded. It gives beta no gradient: that comes
    # through the queries, which are multiplied by 1, as q . dq / beta. A beta near 0 is left to the queries.
    fixed = beta.detach().contiguous()
    if torch.is_grad_enabled() and beta.requires_grad:
        fixed = torch.where(fixed.abs() < SMALLEST, SMALLEST, fixed)
        queries = queries * (beta / fixed).to(queries.dtype)[..., None]
    blocks = _block_mask(first, end, batch, keys.shape[2])
    scale = lambda score, b, h, q, kv: score * fixed[b, h, q]  # noqa: E731
    attend = _compiled() if queries.is_cuda and not torch.compiler.is_compiling() else flex_attention
    common = torch.promote_types(queries.dtype, values.dtype)
    alike = (x.to(common) for x in (queries, keys, values))
    if not log_sum:
        return attend(*alike, score_mod=scale, block_mask=blocks, scale=1.0).to(values.dtype)
    aux = AuxRequest(lse=True)
    read, aux = attend(*alike, score_mod=scale, block_mask=blocks, scale=1.0, return_aux=aux)
    return read.to(values.dtype), aux.lse.to(wide).masked_fill(is_empty(first, end), -torch.inf)


@cache
def _compiled():
    # Models of other sizes are compiled for themselves; beyond the limit every weight would be written out.
    return torch.compile(flex_attention, recompile_limit=64)


def _block_mask(first: Tensor, end: Tensor, batch: int, slots: int) -> BlockMask:
    """The half-open ranges of slots `(time,)` or `(batch, time)` as blocks to read, to mask within, or to leave out.

    What changes from step to step (delay, documents) is in tensors only: nothing is compiled again, and the host waits
    for none of them.
    """
    first, end = (torch.atleast_2d(x).to(torch.int32) for x in (first, end))
    time = first.shape[1]
    missing = -time % BLOCK

    def in_blocks(x: Tensor, beyond: int) -> Tensor:
        return F.pad(x, (0, missing), value=beyond).unflatten(1, (-1, BLOCK))

    low, high = in_blocks(first, slots).amin(-1), in_blocks(end, 0).amax(-1)
    all_from, all_to = in_blocks(first, slots).amax(-1), in_blocks(end, 0).amin(-1)
    block = torch.arange(0, slots, BLOCK, device=first.device, dtype=torch.int32)
    touched = (block < high[..., None]) & (block + BLOCK > low[..., None])
    whole = (block >= all_from[..., None]) & (block + BLOCK <= all_to[..., None])
    # One shape whether or not there are documents: the same compiled kernel.
    first, end = (x.expand(batch, time).contiguous() for x in (first, end))
    return BlockMask.from_kv_blocks(
        *_listed(touched & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, q, kv: (kv >= first[b, q]) & (kv < end[b, q]),
        seq_lengths=(time, slots),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of `blocks` `(batch, queries, slots)` are set in each row, and which, with a dimension for the heads."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
