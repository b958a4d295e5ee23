"""Values that look one position ahead, in as few passes over memory as can be: each writes over what it has read."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import has_numbers
from mosaics.ops.unit_values.naive import SMALLEST


def pays(raw: Tensor) -> bool:
    """Whether there are numbers to write over."""
    return has_numbers(raw)


def unit_values(raw: Tensor, mix: Tensor, length: Tensor, *, eps: float = 0.0) -> Tensor:
    """Equation 9 of Memory Mosaics v2; see `mosaics.ops.unit_values.unit_values`."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (raw, mix, length)):
        return _UnitValues.apply(raw, mix, length, eps)
    return _values(raw, mix, length, eps)[0].to(raw.dtype)


def _widened(x: Tensor, like: Tensor) -> Tensor:
    """`x` `(heads,)` beside the norms of `like`, in float32 or wider."""
    return x.to(torch.promote_types(like.dtype, torch.float32))[:, None, None]


def _values(raw: Tensor, mix: Tensor, length: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The values in float32 or wider, and the norms `(batch, heads, time, 1)` before: infinite where it counts as 0."""
    mix, length = _widened(mix, raw), _widened(length, raw)
    raw = raw.to(mix.dtype)
    values = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    torch.lerp(raw[:, :, 1:], raw[:, :, :-1], mix, out=values[:, :, :-1])
    torch.mul(raw[:, :, -1:], mix, out=values[:, :, -1:])
    norms = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    norms.masked_fill_(norms <= SMALLEST, torch.inf)
    return values.mul_(length / (norms + eps)), norms


class _UnitValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw: Tensor, mix: Tensor, length: Tensor, eps: float) -> Tensor:
        values, norms = _values(raw, mix, length, eps)
        values = values.to(raw.dtype)
        ctx.save_for_backward(raw, mix, length, values, norms)
        ctx.eps = eps
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With g the gradient of a value v and n the norm before, that of the mixed value is l / (n + eps) g - (g v) /
        (l n) v."""
        raw, mix, length, values, norms = ctx.saved_tensors
        dtypes = raw.dtype, mix.dtype, length.dtype
        mix, length = _widened(mix, raw), _widened(length, raw)
        raw, values, grad = (x.to(mix.dtype) for x in (raw, values, grad))
        work = torch.mul(grad, values, out=torch.empty_like(raw))
        along = work.sum(-1, keepdim=True) / length.clamp(min=torch.finfo(length.dtype).tiny)
        grad_length = along.sum((0, 2, 3))
        mixed = torch.mul(values, along.neg_().div_(norms)).addcmul_(grad, length / (norms + ctx.eps))

        torch.sub(raw[:, :, :-1], raw[:, :, 1:], out=work[:, :, :-1])
        work[:, :, -1:] = raw[:, :, -1:]
        grad_mix = work.mul_(mixed).sum((0, 2, 3))

        torch.lerp(mixed[:, :, :-1], mixed[:, :, 1:], mix, out=work[:, :, 1:])
        torch.mul(mixed[:, :, :1], mix, out=work[:, :, :1])
        return *(x.to(dtype) for x, dtype in zip((work, grad_mix, grad_length), dtypes, strict=True)), None
