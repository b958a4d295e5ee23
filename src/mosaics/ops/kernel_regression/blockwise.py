"""Kernel regression in tiles of queries against the slots that they may read, recomputed in the backward pass.

Memory grows with the length, not with its square; windows and document borders cost only what they leave to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mosaics.ops import eager_on_cpu
from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.reach import Reach, is_empty, outside

BLOCK = 128


@eager_on_cpu
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
    """Equation 4 in tiles; see `mosaics.ops.kernel_regression.kernel_regression`."""
    first, end = reach.span(queries, keys)
    beta = bandwidth.at(end - first)
    # beta reaches 148 at 32k pairs: as a bfloat16 it would move a logit by 0.25, so the scaled query stays in float32.
    scaled = beta[..., None].to(_tile_dtype(queries)) * queries
    # A tile of as many queries as the window is wide computes twice what is read; wider ones compute more.
    block = BLOCK if reach.window is None else min(BLOCK, max(reach.window, 32))
    # What is dropped is drawn again in the backward pass, tile by tile, from this seed.
    drop = (dropout, int(torch.randint(2**62, ())) if dropout else 0)
    read, logs = _Blockwise.apply(scaled, keys, values, first, end, block, drop, log_sum)
    return (read, logs) if log_sum else read


def _tile_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tiles(
    first: Tensor, end: Tensor, block: int, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor | None]]:
    """Rows, queries and slots of each tile; -inf where it must not be read, and which of its queries read nothing."""
    time = first.shape[-1]
    for begin in range(0, time, block):
        queries = slice(begin, min(begin + block, time))
        block_first, block_end = first[..., queries], end[..., queries]
        if first.dim() == 1:
            groups = [(slice(None), int(block_first[0]))]
        else:
            lows = block_first.amin(-1).tolist()
            # Rows whose documents begin at one slot are one tile; others are read row by row.
            same = all(low == lows[0] for low in lows)
            groups = [(slice(None), lows[0])] if same else [(slice(r, r + 1), low) for r, low in enumerate(lows)]
        high = int(block_end.max())
        for rows, low in groups:
            if high <= low:
                continue
            tile = (block_first, block_end) if first.dim() == 1 else (block_first[rows], block_end[rows])
            masked, empty = outside(*tile, low, high), is_empty(*tile)[..., None]
            if not bool(empty.any()):
                empty = None
            # Added to the logits: a fifth of the time of a masked fill on a CPU. Who reads nothing is answered 0 below.
            bias = torch.zeros_like(masked, dtype=dtype).masked_fill_(masked, -torch.inf)
            yield rows, queries, slice(low, high), bias if empty is None else bias.masked_fill_(empty, 0.0), empty


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        first: Tensor,
        end: Tensor,
        block: int,
        drop: tuple[float, int],
        log_sum: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.block, ctx.drop = block, drop
        factors = dropout_factors(queries.device, *drop)
        out = torch.zeros(*queries.shape[:-1], values.shape[-1], dtype=values.dtype, device=values.device)
        logs = queries.new_full(queries.shape[:-1], -torch.inf) if log_sum else None
        for rows, here, slots, bias, empty in tiles(first, end, block, queries.dtype):
            logits = _logits(queries[rows, :, here], keys[rows, :, slots], bias)
            weights = _weights(logits, empty)
            if log_sum:
                sums = logits.logsumexp(-1)
                logs[rows, :, here] = sums if empty is None else sums.masked_fill(empty[..., 0], -torch.inf)
            if factors is not None:
                weights *= factors(weights)
            out[rows, :, here] = (weights @ values[rows, :, slots].to(weights.dtype)).to(out.dtype)
        ctx.save_for_backward(queries, keys, values, first, end)
        return out, logs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, grad_logs: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # the caller's backward may run inside one
            return *_gradients(grad, grad_logs, *ctx.saved_tensors, ctx.block, ctx.drop), *[None] * 5


def _gradients(
    grad: Tensor,
    grad_logs: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    end: Tensor,
    block: int,
    drop: tuple[float, int],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _tile_dtype(queries)
    grad_queries = torch.zeros_like(queries)
    grad_keys = torch.zeros_like(keys, dtype=dtype)
    grad_values = torch.zeros_like(values, dtype=dtype)
    factors = dropout_factors(queries.device, *drop)
    for rows, here, slots, bias, empty in tiles(first, end, block, dtype):
        tile_queries, tile_keys = queries[rows, :, here], keys[rows, :, slots].to(dtype)
        weights = _weights(_logits(tile_queries, tile_keys, bias), empty)
        tile_grad = grad[rows, :, here].to(dtype)
        grad_weights = tile_grad @ values[rows, :, slots].to(dtype).mT
        read = weights
        if factors is not None:
            factor = factors(weights)
            read, grad_weights = weights * factor, grad_weights * factor
        grad_values[rows, :, slots] += read.mT @ tile_grad
        grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, dtype)
        if grad_logs is not None:
            grad_logits += weights * grad_logs[rows, :, here, None].to(dtype)
        grad_queries[rows, :, here] = grad_logits @ tile_keys
        grad_keys[rows, :, slots] += grad_logits.mT @ tile_queries
    return grad_queries, grad_keys.to(keys.dtype), grad_values.to(values.dtype)


def _logits(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    return (queries @ keys.to(queries.dtype).mT).add_(bias)


def _weights(logits: Tensor, empty: Tensor | None) -> Tensor:
    weights = logits.softmax(-1)
    return weights if empty is None else weights.masked_fill_(empty, 0.0)


def dropout_factors(device: torch.device, probability: float, seed: int) -> Callable[[Tensor], Tensor] | None:
    """What multiplies the weights of one tile after the other; the same seed gives the same factors.

    On processors a weight is kept by 16 bits of a drawn word, which takes a fifth of the time of `bernoulli_`; the
    probability is then rounded to a multiple of 2^-16.
    """
    if probability == 0:
        return None
    generator = torch.Generator(device).manual_seed(seed)
    kept = 1 - probability
    if device.type != "cpu":
        return lambda weights: torch.empty_like(weights).bernoulli_(kept, generator=generator).div_(kept)
    largest = round(kept * 2**16) - 2**15 - 1

    def factors(weights: Tensor) -> Tensor:
        words = torch.empty(-(-weights.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        is_kept = words.view(torch.int16)[: weights.numel()].view(weights.shape) <= max(largest, -(2**15))
        return is_kept.to(weights.dtype).div_(kept)

    return factors
