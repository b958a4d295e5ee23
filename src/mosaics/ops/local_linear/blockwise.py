"""Local linear attention in tiles of queries, its ridge regressions by conjugate gradients, with a backward pass that
solves once more instead of going through the iterations.

With the weights p of the softmax, their mean and covariance of the keys, m and C, and the probe r = (C + lambda)^-1
(m - q), the answer is sum_j p_j (1 - (k_j - m) . r) v_j: that of the closed form, by Sherman and Morrison, without its
denominator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mosaics.ops.kernel_regression import Reach
from mosaics.ops.kernel_regression.blockwise import dropout_factors, tiles

BLOCK = 128


class _Plan(NamedTuple):
    """What is asked for besides tensors."""

    scale: float
    relative: bool
    iterations: int
    drop: tuple[float, int]


def local_linear(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    probe: Tensor | None,
    ridge: Tensor | None,
    start: Tensor | None,
    scale: float,
    relative: bool,
    iterations: int,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """See `mosaics.ops.local_linear.local_linear`."""
    first, end = Reach(0, start=start).span(queries, keys)
    # What is dropped is drawn again in the backward pass, tile by tile, from this seed.
    drop = (dropout, int(torch.randint(2**62, ())) if dropout else 0)
    plan = _Plan(scale, relative, iterations, drop)
    return _LocalLinear.apply(queries, keys, values, probe, ridge, first, end, plan)


class _Tile:
    """A tile of queries against the slots that they may read.

    Args:
        queries: `(batch, heads, queries, width)`.
        keys: `(batch, heads, slots, width)`.
        bias: -inf where a slot must not be read, else 0.
        ridge: `(heads,)`, or None where nothing is to be solved.
        plan: what else is asked for.
    """

    def __init__(self, queries: Tensor, keys: Tensor, bias: Tensor, ridge: Tensor | None, plan: _Plan) -> None:
        logits = (plan.scale * queries @ keys.mT).add_(bias)
        self.keys, self.iterations = keys, plan.iterations
        self.weights = logits.softmax(-1)
        self.mean = self.weights @ keys
        if ridge is not None:
            # By how much a ridge counts beside weights of sum 1, and the ridge.
            self.share = 1.0 if plan.relative else (-logits.logsumexp(-1, keepdim=True)).exp()
            self.ridge = ridge[:, None, None] * self.share

    def along(self, x: Tensor) -> Tensor:
        """`(k_j - m) . x` for every slot."""
        return x @ self.keys.mT - (x * self.mean).sum(-1, keepdim=True)

    def spread(self, x: Tensor, along: Tensor | None = None) -> Tensor:
        """`(C + lambda) x`."""
        weighed = self.weights * (self.along(x) if along is None else along)
        rest = weighed.sum(-1, keepdim=True) * self.mean  # 0 but for rounding, which would reach the answer times |m|²
        return weighed @ self.keys - rest + self.ridge * x

    def solved(self, target: Tensor) -> Tensor:
        """`(C + lambda)^-1 target` by conjugate gradients (Hestenes and Stiefel, 1952)."""
        found, left, direction = torch.zeros_like(target), target, target
        size = target.square().sum(-1, keepdim=True)
        enough = size * torch.finfo(size.dtype).eps ** 2
        for _ in range(self.iterations):
            turned = self.spread(direction)
            unsolved = size > enough
            step = torch.where(unsolved, size / (direction * turned).sum(-1, keepdim=True), 0.0)
            found, left = found + step * direction, left - step * turned
            before, size = size, left.square().sum(-1, keepdim=True)
            direction = left + torch.where(unsolved, size / before, 0.0) * direction
        return found


class _LocalLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        probe: Tensor | None,
        ridge: Tensor | None,
        first: Tensor,
        end: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor | None]:
        factors = dropout_factors(queries.device, *plan.drop)
        out = values.new_zeros(*queries.shape[:-1], values.shape[-1])
        solve = probe is None
        if solve:
            probe, residual = torch.zeros_like(queries), torch.zeros_like(queries[..., 0])
        for rows, here, slots, bias, _ in tiles(first, end, BLOCK, queries.dtype):
            tile = _Tile(queries[rows, :, here], keys[rows, :, slots], bias, ridge, plan)
            if solve:
                target = tile.mean - queries[rows, :, here]
                probe[rows, :, here] = tile.solved(target)
            own = probe[rows, :, here]
            along = tile.along(own)
            if solve:
                left = (target - tile.spread(own, along)).norm(dim=-1)
                residual[rows, :, here] = left / target.norm(dim=-1).clamp(min=torch.finfo(left.dtype).tiny)
            used = tile.weights * (1 - along)
            if factors is not None:
                used *= factors(used)
            out[rows, :, here] = used @ values[rows, :, slots]
        ctx.plan, ctx.solve = plan, solve
        ctx.save_for_backward(queries, keys, values, probe, ridge, first, end)
        if not solve:
            return out, None
        ctx.mark_non_differentiable(residual)
        return out, residual

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # the caller's backward may run inside one
            return *_gradients(grad, *ctx.saved_tensors, ctx.plan, ctx.solve), None, None, None


def _gradients(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    probe: Tensor,
    ridge: Tensor | None,
    first: Tensor,
    end: Tensor,
    plan: _Plan,
    solve: bool,
) -> tuple[Tensor | None, ...]:
    """Of queries, keys, values, probe and ridge.

    The probe r solves (C + lambda) r = m - q. With g the gradient of r and u = (C + lambda)^-1 g, that of q is -u, and
    that of lambda -u . r.
    """
    factors = dropout_factors(queries.device, *plan.drop)
    grad_queries, grad_probe = torch.zeros_like(queries), torch.zeros_like(probe)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    grad_ridge = torch.zeros_like(ridge) if solve else None
    for rows, here, slots, bias, _ in tiles(first, end, BLOCK, queries.dtype):
        own, own_keys, own_grad = queries[rows, :, here], keys[rows, :, slots], grad[rows, :, here]
        tile, own_probe = _Tile(own, own_keys, bias, ridge, plan), probe[rows, :, here]
        less = 1 - tile.along(own_probe)
        used, error = tile.weights * less, own_grad @ values[rows, :, slots].mT
        if factors is not None:
            factor = factors(used)
            used, error = used * factor, error * factor
        grad_values[rows, :, slots] += used.mT @ own_grad
        error -= (tile.weights * error).sum(-1, keepdim=True)
        toward = -(tile.weights * error) @ own_keys
        if solve:
            toward = tile.solved(toward)
            error += tile.along(toward)
            grad_queries[rows, :, here] -= toward
            grad_keys[rows, :, slots] += (tile.weights * less).mT @ toward
            ridged = -(toward * own_probe).sum(-1, keepdim=True)
            grad_ridge += (tile.share * ridged).sum((0, 2, 3))
        else:
            grad_probe[rows, :, here] = toward
        grad_keys[rows, :, slots] -= (tile.weights * error).mT @ own_probe
        grad_logits = torch._softmax_backward_data(less * error, tile.weights, -1, queries.dtype)
        if solve and not plan.relative:
            grad_logits -= tile.ridge * ridged * tile.weights
        grad_logits *= plan.scale
        grad_queries[rows, :, here] += grad_logits @ own_keys
        grad_keys[rows, :, slots] += grad_logits.mT @ own
    return grad_queries, grad_keys, grad_values, None if solve else grad_probe, grad_ridge
