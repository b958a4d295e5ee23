"""The gated recurrence of the keys on processors, step by step in C++ that is compiled when it is first wanted."""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op

from mosaics.ops import cast, has_numbers
from mosaics.ops.compiling import dense, library, plain, straight, strided
from mosaics.ops.leaky_average.state import LeakyAverageState, at_least_float32, floor_of, shortened

SOURCE = Path(__file__).with_suffix(".cpp")
WORTH = 2**15  # numbers; fewer are not worth a second thread


@torch.compiler.assume_constant_result
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
    directions, log_scales, *_ = _averages(*given, None) if straight(*given) else OPERATOR(*given)
    keys = cast(shortened(directions, log_scales, eps), dtype)
    return keys, LeakyAverageState(directions[..., -1, :].clone(), log_scales[..., -1].clone())  # lets go of the others


def _forward(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, direction: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Directions, log scales, and the factors `(batch, heads, time, 2)` of each step, for the backward pass."""
    steps = _empty_steps(inputs)
    return *_averages(inputs, log_gate, log_decay, direction, log_scale, steps), steps


def _averages(
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


def _empty_steps(inputs: Tensor) -> Tensor:
    return inputs.new_empty((*inputs.shape[:3], 2), dtype=torch.float64)


def _backward(
    grad: Tensor | None,
    grad_scales: Tensor | None,
    inputs: Tensor,
    direction: Tensor,
    directions: Tensor,
    steps: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all that `_forward` takes."""
    inputs, direction = dense(inputs), direction.contiguous()
    grad = torch.zeros_like(directions) if grad is None else dense(grad)
    grad_scales = None if grad_scales is None else grad_scales.contiguous()
    grads = _empty_grads(inputs)
    _call(
        "backward",
        inputs,
        *strided(inputs),
        *plain(direction, directions, steps),
        *strided(grad),
        *plain(grad_scales),
        *strided(grads[0]),
        *plain(*grads[1:]),
    )
    return grads


def _empty_grads(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, _, width = inputs.shape
    # The heads of a position side by side, as the map before wants them.
    grad_inputs = inputs.new_empty(inputs.transpose(1, 2).shape).transpose(1, 2)
    shapes = (inputs.shape[:3], inputs.shape[:3], (batch, heads, width), (batch, heads))
    return grad_inputs, *(inputs.new_empty(shape) for shape in shapes)


OPERATOR = custom_op(
    "mosaics::leaky_average_compiled",
    _forward,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor inputs, Tensor log_gate, Tensor log_decay, Tensor direction, Tensor log_scale) "
    "-> (Tensor, Tensor, Tensor)",
)
BACKWARD = custom_op(
    "mosaics::leaky_average_compiled_backward",
    _backward,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor? grad, Tensor? grad_scales, Tensor inputs, Tensor direction, Tensor directions, Tensor steps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@OPERATOR.register_fake
def _(inputs: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.new_empty(inputs.shape), inputs.new_empty(inputs.shape[:3]), _empty_steps(inputs)


@BACKWARD.register_fake
def _(grad: Tensor | None, grad_scales: Tensor | None, inputs: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return _empty_grads(inputs)


def _keep(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    directions, _, steps = output
    ctx.save_for_backward(inputs[0], inputs[3], directions, steps)
    ctx.mark_non_differentiable(steps)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor | None, grad_scales: Tensor | None, _: None) -> tuple[Tensor, ...]:
    return BACKWARD(grad, grad_scales, *ctx.saved_tensors)


OPERATOR.register_autograd(_gradients, setup_context=_keep)


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
