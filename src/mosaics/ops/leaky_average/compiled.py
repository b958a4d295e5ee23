"""The gated recurrence of the keys on processors, step by step in C++ that is compiled when it is first wanted."""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from pathlib import Path

import torch
from torch import Tensor

from mosaics.ops import cast, has_numbers
from mosaics.ops.compiling import dense, library, plain, strided
from mosaics.ops.leaky_average.state import LeakyAverageState, at_least_float32, floor_of, shortened

SOURCE = Path(__file__).with_suffix(".cpp")
WORTH = 2**15  # numbers; fewer are not worth a second thread


def available() -> bool:
    """Whether this machine can compile and load the loop; the first call does so."""
    return library(SOURCE) is not None


def pays(inputs: Tensor) -> bool:
    """Whether the loop can be used."""
    return inputs.device.type == "cpu" and has_numbers(inputs) and available()


def leaky_average(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, state: LeakyAverageState | None = None, eps: float = 0.0
) -> tuple[Tensor, LeakyAverageState]:
    """Equation 8 of Memory Mosaics v2, one position after the other; see `mosaics.ops.leaky_average.leaky_average`.

    Raises:
        ValueError: the tensors are not on a processor, or the loop can't be compiled here.
    """
    if inputs.device.type != "cpu" or not available():
        raise ValueError("The compiled form works on a processor with a C++ compiler (the log says more); use another.")
    dtype, inputs = inputs.dtype, at_least_float32(inputs)
    if state is None:
        state = LeakyAverageState.empty(inputs)
    given = (inputs, *(cast(x, inputs.dtype) for x in (log_gate, log_decay, *state)))
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        directions, log_scales = _Compiled.apply(*given)
    else:
        directions, log_scales = _forward(*given, None)
    keys = cast(shortened(directions, log_scales, eps), dtype)
    return keys, LeakyAverageState(directions[..., -1, :].clone(), log_scales[..., -1].clone())  # lets go of the others


def _forward(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, direction: Tensor, log_scale: Tensor, steps: Tensor | None
) -> tuple[Tensor, Tensor]:
    inputs, direction, log_scale = dense(inputs), direction.contiguous(), log_scale.contiguous()
    directions = torch.empty(inputs.shape, dtype=inputs.dtype)
    log_scales = torch.empty(inputs.shape[:3], dtype=inputs.dtype)
    _call(
        "forward",
        inputs,
        *strided(inputs, log_gate, log_decay),
        *plain(direction, log_scale, directions, log_scales, steps),
    )
    return directions, log_scales


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, inputs: Tensor, log_gate: Tensor, log_decay: Tensor, direction: Tensor, log_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        steps = inputs.new_empty(*inputs.shape[:3], 2, dtype=torch.float64)
        directions, log_scales = _forward(inputs, log_gate, log_decay, direction, log_scale, steps)
        ctx.save_for_backward(inputs, direction, directions, steps)
        ctx.set_materialize_grads(False)
        return directions, log_scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor | None, grad_scales: Tensor | None) -> tuple[Tensor, ...]:
        inputs, direction, directions, steps = ctx.saved_tensors
        inputs, direction = dense(inputs), direction.contiguous()
        grad = torch.zeros_like(directions) if grad is None else dense(grad)
        grad_scales = None if grad_scales is None else grad_scales.contiguous()
        # The heads of a position side by side, as the map before wants them.
        grad_inputs = inputs.new_empty(inputs.transpose(1, 2).shape).transpose(1, 2)
        grad_gate, grad_decay = (inputs.new_empty(inputs.shape[:3]) for _ in range(2))
        grad_direction, grad_scale = torch.empty_like(direction), direction.new_empty(direction.shape[:2])
        _call(
            "backward",
            inputs,
            *strided(inputs),
            *plain(direction, directions, steps),
            *strided(grad),
            *plain(grad_scales),
            *strided(grad_inputs),
            *plain(grad_gate, grad_decay, grad_direction, grad_scale),
        )
        return grad_inputs, grad_gate, grad_decay, grad_direction, grad_scale


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "time", "width", "threads")),
        ("floor", ctypes.c_double),
    ]


def _call(name: str, inputs: Tensor, *given) -> None:
    threads = torch.get_num_threads() if inputs.numel() >= WORTH else 1
    sizes = _Sizes(*inputs.shape, threads, floor_of(inputs))
    kind = "double" if inputs.dtype == torch.float64 else "float"
    getattr(library(SOURCE), f"{name}_{kind}")(ctypes.byref(sizes), *given)
