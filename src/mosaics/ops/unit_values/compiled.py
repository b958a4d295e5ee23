"""Values that look one position ahead on processors, in one pass of C++ that is compiled when it is first wanted."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op

from mosaics.ops import cast, has_numbers
from mosaics.ops.compiling import dense, library, plain, straight, strided
from mosaics.ops.unit_values.naive import SMALLEST

SOURCE = Path(__file__).with_suffix(".cpp")
WORTH = 2**15  # numbers; fewer are not worth a second thread


@torch.compiler.assume_constant_result
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
    if straight(raw, mix, length):
        return cast(_values(raw, mix, length, eps, None), dtype)
    return cast(OPERATOR(raw, mix, length, eps)[0], dtype)


def _forward(raw: Tensor, mix: Tensor, length: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The values, and the norms `(batch, heads, time)` before."""
    norms = raw.new_empty(raw.shape[:3])
    return _values(raw, mix, length, eps, norms), norms


def _values(raw: Tensor, mix: Tensor, length: Tensor, eps: float, norms: Tensor | None) -> Tensor:
    raw, mix, length = dense(raw), mix.contiguous(), length.contiguous()
    values = torch.empty(raw.shape, dtype=raw.dtype)
    _call("forward", raw, eps, *strided(raw), *plain(mix, length, values, norms))
    return values


def _backward(
    grad: Tensor, raw: Tensor, mix: Tensor, length: Tensor, values: Tensor, norms: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the raw values, and those of shares and lengths `(batch, heads)` row by row."""
    raw, mix, length, grad = dense(raw), mix.contiguous(), length.contiguous(), dense(grad)
    grads = _empty_grads(raw)
    _call(
        "backward",
        raw,
        eps,
        *strided(raw),
        *plain(mix, length, values, norms),
        *strided(grad, grads[0]),
        *plain(*grads[1:]),
    )
    return grads


def _empty_grads(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The heads of a position side by side, as the map before wants them.
    grad_raw = raw.new_empty(raw.transpose(1, 2).shape).transpose(1, 2)
    return grad_raw, raw.new_empty(raw.shape[:2]), raw.new_empty(raw.shape[:2])


OPERATOR = custom_op(
    "mosaics::unit_values_compiled",
    _forward,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor raw, Tensor mix, Tensor length, float eps) -> (Tensor, Tensor)",
)
BACKWARD = custom_op(
    "mosaics::unit_values_compiled_backward",
    _backward,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor raw, Tensor mix, Tensor length, Tensor values, Tensor norms, float eps) "
    "-> (Tensor, Tensor, Tensor)",
)


@OPERATOR.register_fake
def _(raw: Tensor, mix: Tensor, length: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return raw.new_empty(raw.shape), raw.new_empty(raw.shape[:3])


@BACKWARD.register_fake
def _(grad: Tensor, raw: Tensor, *rest: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_grads(raw)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_raw, grad_mix, grad_length = BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
    return grad_raw, grad_mix.sum(0), grad_length.sum(0), None


OPERATOR.register_autograd(_gradients, setup_context=_keep)


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
