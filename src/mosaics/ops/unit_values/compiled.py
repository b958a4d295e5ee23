"""Values that look one position ahead on processors, in one pass of C++ that is compiled when it is first wanted."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64
from pathlib import Path

import torch
from torch import Tensor

from mosaics.ops import cast, has_numbers
from mosaics.ops.compiling import dense, library, plain, strided
from mosaics.ops.unit_values.naive import SMALLEST

SOURCE = Path(__file__).with_suffix(".cpp")
WORTH = 2**15  # numbers; fewer are not worth a second thread


def available() -> bool:
    """Whether this machine can compile and load the loop; the first call does so."""
    return library(SOURCE) is not None


def pays(raw: Tensor) -> bool:
    """Whether the loop can be used."""
    return raw.device.type == "cpu" and has_numbers(raw) and available()


def unit_values(raw: Tensor, mix: Tensor, length: Tensor, *, eps: float = 0.0) -> Tensor:
    """Equation 9 of Memory Mosaics v2; see `mosaics.ops.unit_values.unit_values`.

    Raises:
        ValueError: the tensors are not on a processor, or the loop can't be compiled here.
    """
    if raw.device.type != "cpu" or not available():
        raise ValueError("The compiled form works on a processor with a C++ compiler (the log says more); use another.")
    dtype, wide = raw.dtype, torch.promote_types(raw.dtype, torch.float32)
    raw, mix, length = (cast(x, wide) for x in (raw, mix, length))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (raw, mix, length)):
        return cast(_Compiled.apply(raw, mix, length, eps), dtype)
    return cast(_forward(raw, mix, length, eps, None), dtype)


def _forward(raw: Tensor, mix: Tensor, length: Tensor, eps: float, norms: Tensor | None) -> Tensor:
    raw, mix, length = dense(raw), mix.contiguous(), length.contiguous()
    values = torch.empty(raw.shape, dtype=raw.dtype)
    _call("forward", raw, eps, *strided(raw), *plain(mix, length, values, norms))
    return values


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw: Tensor, mix: Tensor, length: Tensor, eps: float) -> Tensor:
        norms = raw.new_empty(raw.shape[:3])
        values = _forward(raw, mix, length, eps, norms)
        ctx.save_for_backward(raw, mix, length, values, norms)
        ctx.eps = eps
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        raw, mix, length, values, norms = ctx.saved_tensors
        raw, mix, length, grad = dense(raw), mix.contiguous(), length.contiguous(), dense(grad)
        # The heads of a position side by side, as the map before wants them.
        grad_raw = raw.new_empty(raw.transpose(1, 2).shape).transpose(1, 2)
        grad_mix, grad_length = (raw.new_empty(raw.shape[:2]) for _ in range(2))
        _call(
            "backward",
            raw,
            ctx.eps,
            *strided(raw),
            *plain(mix, length, values, norms),
            *strided(grad, grad_raw),
            *plain(grad_mix, grad_length),
        )
        return grad_raw, grad_mix.sum(0), grad_length.sum(0), None


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "time", "width", "threads")),
        *((name, c_double) for name in ("eps", "smallest")),
    ]


def _call(name: str, raw: Tensor, eps: float, *given) -> None:
    threads = torch.get_num_threads() if raw.numel() >= WORTH else 1
    sizes = _Sizes(*raw.shape, threads, eps, SMALLEST)
    kind = "double" if raw.dtype == torch.float64 else "float"
    getattr(library(SOURCE), f"{name}_{kind}")(ctypes.byref(sizes), *given)
