"""The gated recurrence of the keys as one kernel forward and one backward, written in Triton.

Nothing else needs Triton: this file is imported when the form is first used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaics.ops.leaky_average.state import LeakyAverageState, floor_of, shortened

CHUNK = 32
LAUNCH = dict(num_warps=8, num_stages=2)  # with 4 warps the backward kernel runs out of registers
INTERPRETED = triton.knobs.runtime.interpret


def leaky_average(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, state: LeakyAverageState | None = None, eps: float = 0.0
) -> tuple[Tensor, LeakyAverageState]:
    """Equation 8 in chunks of `CHUNK` positions, one program for each row and head; see
    `mosaics.ops.leaky_average.leaky_average`.

    Raises:
        ValueError: the tensors are not on a GPU, and Triton does not interpret.
    """
    if not (inputs.is_cuda or INTERPRETED):
        raise ValueError(
            f"The triton form runs on CUDA, not on {inputs.device.type}; use the chunked form (or, for tests, set "
            "TRITON_INTERPRET=1 before Triton is imported)."
        )
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    log_gate, log_decay = log_gate.to(dtype).contiguous(), log_decay.to(dtype).contiguous()
    if state is None:
        state = LeakyAverageState.empty(log_gate[..., None].expand(inputs.shape))
    direction, log_scale = (x.to(dtype).contiguous() for x in state)
    if inputs.stride(-1) != 1:
        inputs = inputs.contiguous()
    # The kernel rounds the keys, unless they have still to be shortened.
    rounded = eps == 0
    directions, log_scales, direction, log_scale, _, _ = _averages(
        inputs, log_gate, log_decay, direction, log_scale, rounded
    )
    keys = shortened(directions, log_scales, eps).to(inputs.dtype)
    return keys, LeakyAverageState(direction, log_scale)


@triton.jit
def _weights(gate, decay, scale, SIZE: tl.constexpr):
    """Weights of a chunk's inputs `(t, i)` and of what came before it `(t,)`, and the logarithm they are divided by.

    The sum of the decays i+1 ... t is added up for itself and is no difference of longer sums: nothing cancels in
    float32, and a decay of -inf forgets without being a case of its own.
    """
    at = tl.arange(0, SIZE)
    logs = gate[None, :] + tl.cumsum(tl.where(at[:, None] > at[None, :], decay[:, None], 0.0), 0)
    logs = tl.where(at[:, None] >= at[None, :], logs, -float("inf"))
    first = scale + tl.cumsum(decay, 0)
    most = tl.maximum(tl.max(logs, 1), first)
    shift = tl.where(most == -float("inf"), 0.0, most)
    return tl.exp(logs - shift[:, None]), tl.exp(first - shift), most


@triton.jit
def _directions(weights, first, inputs, direction, FLOOR: tl.constexpr):
    """Directions of the averages, their norms, and what the averages are multiplied by to get directions."""
    average = tl.dot(weights, inputs, input_precision="ieee") + first[:, None] * direction[None, :]
    norm = tl.sqrt(tl.sum(average * average, 1))
    inverse = tl.where(norm > FLOOR, 1 / tl.maximum(norm, FLOOR), 0.0)
    return average * inverse[:, None], norm, inverse


@triton.jit
def _forward(
    inputs,
    log_gate,
    log_decay,
    direction,
    log_scale,
    keys,
    log_scales,
    last_direction,
    last_scale,
    chunk_directions,
    chunk_scales,
    heads,
    time,
    width,
    stride_row,
    stride_head,
    stride_time,
    FLOOR: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    inputs += (program // heads) * stride_row + (program % heads) * stride_head
    chunks = tl.cdiv(time, SIZE)
    at, column = tl.arange(0, SIZE), tl.arange(0, WIDTH)
    newest = at == SIZE - 1
    inside = column < width
    d = tl.load(direction + program * width + column, mask=inside, other=0.0)
    s = tl.load(log_scale + program)
    for chunk in range(0, chunks):
        begun = program * chunks + chunk
        tl.store(chunk_directions + begun * width + column, d, mask=inside)
        tl.store(chunk_scales + begun, s)
        here = chunk * SIZE + at.to(tl.int64)
        real = here < time
        # Beyond the end the gate is 0 and the decay 1: the last row of a chunk is always what the next starts from.
        gate = tl.load(log_gate + program * time + here, mask=real, other=-float("inf"))
        decay = tl.load(log_decay + program * time + here, mask=real, other=0.0)
        tile = real[:, None] & inside[None, :]
        x = tl.load(inputs + here[:, None] * stride_time + column[None, :], mask=tile, other=0.0).to(gate.dtype)
        weights, first, most = _weights(gate, decay, s, SIZE)
        directions, norm, _ = _directions(weights, first, x, d, FLOOR)
        scales = most + tl.log(tl.maximum(norm, FLOOR))
        where = program * time + here
        tl.store(keys + where[:, None] * width + column[None, :], directions.to(keys.dtype.element_ty), mask=tile)
        tl.store(log_scales + where, scales, mask=real)
        d = tl.sum(tl.where(newest[:, None], directions, 0.0), 0)
        s = tl.sum(tl.where(newest, scales, 0.0), 0)
    tl.store(last_direction + program * width + column, d, mask=inside)
    tl.store(last_scale + program, s)


@triton.jit
def _backward(
    inputs,
    log_gate,
    log_decay,
    chunk_directions,
    chunk_scales,
    grad_keys,
    grad_scales,
    grad_last_direction,
    grad_last_scale,
    grad_inputs,
    grad_gate,
    grad_decay,
    grad_direction,
    grad_scale,
    heads,
    time,
    width,
    stride_row,
    stride_head,
    stride_time,
    FLOOR: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    inputs += (program // heads) * stride_row + (program % heads) * stride_head
    chunks = tl.cdiv(time, SIZE)
    at, column = tl.arange(0, SIZE), tl.arange(0, WIDTH)
    newest = at == SIZE - 1
    inside = column < width
    # Gradients of what a chunk hands on to the next.
    grad_d = tl.load(grad_last_direction + program * width + column, mask=inside, other=0.0)
    grad_s = tl.load(grad_last_scale + program)
    for index in range(0, chunks):
        chunk = chunks - 1 - index
        begun = program * chunks + chunk
        d = tl.load(chunk_directions + begun * width + column, mask=inside, other=0.0)
        s = tl.load(chunk_scales + begun)
        here = chunk * SIZE + at.to(tl.int64)
        real = here < time
        gate = tl.load(log_gate + program * time + here, mask=real, other=-float("inf"))
        decay = tl.load(log_decay + program * time + here, mask=real, other=0.0)
        tile = real[:, None] & inside[None, :]
        x = tl.load(inputs + here[:, None] * stride_time + column[None, :], mask=tile, other=0.0).to(gate.dtype)
        weights, first, _ = _weights(gate, decay, s, SIZE)
        directions, _, inverse = _directions(weights, first, x, d, FLOOR)

        where = program * time + here
        grad = tl.load(grad_keys + where[:, None] * width + column[None, :], mask=tile, other=0.0).to(gate.dtype)
        grad += tl.where(newest[:, None], grad_d[None, :], 0.0)
        along = tl.load(grad_scales + where, mask=real, other=0.0) + tl.where(newest, grad_s, 0.0)
        along -= tl.sum(grad * directions, 1)
        grad_average = (grad + directions * along[:, None]) * inverse[:, None]
        grad_x = tl.dot(tl.trans(weights), grad_average, input_precision="ieee")
        grad_logs = weights * tl.dot(grad_average, tl.trans(x), input_precision="ieee")
        grad_first = first * tl.sum(grad_average * d[None, :], 1)
        # The decay of j is in the logarithms of all pairs with i < j <= t.
        earlier = (at[:, None] < at[None, :]).to(gate.dtype)
        through = tl.dot(grad_logs, earlier, input_precision="ieee") + grad_first[:, None]
        through = tl.where(at[:, None] >= at[None, :], through, 0.0)
        grad_x = grad_x.to(grad_inputs.dtype.element_ty)
        tl.store(grad_inputs + where[:, None] * width + column[None, :], grad_x, mask=tile)
        tl.store(grad_gate + where, tl.sum(grad_logs, 0), mask=real)
        tl.store(grad_decay + where, tl.sum(through, 0), mask=real)
        grad_d = tl.sum(first[:, None] * grad_average, 0)
        grad_s = tl.sum(grad_first, 0)
    tl.store(grad_direction + program * width + column, grad_d, mask=inside)
    tl.store(grad_scale + program, grad_s)


def _launch(kernel, inputs: Tensor, *tensors: Tensor) -> None:
    batch, heads, time, width = inputs.shape
    with torch.cuda.device_of(inputs):
        kernel[(batch * heads,)](
            inputs,
            *tensors,
            heads,
            time,
            width,
            *inputs.stride()[:3],
            FLOOR=floor_of(tensors[0]),
            SIZE=CHUNK,
            WIDTH=max(16, triton.next_power_of_2(width)),
            **LAUNCH,
        )


# Opaque to torch.compile, which then has nothing to trace into.
@torch.library.custom_op("mosaics::leaky_average", mutates_args=())
def _averages(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, direction: Tensor, log_scale: Tensor, rounded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Directions `(batch, heads, time, width)` and log scales `(batch, heads, time)` of all averages, the last of each,
    and those that each chunk begins with: all that the backward pass needs, a `CHUNK`-th of the directions."""
    out = _shapes(inputs, log_gate, log_decay, direction, log_scale, rounded)
    _launch(_forward, inputs, log_gate, log_decay, direction, log_scale, *out)
    return out


@_averages.register_fake
def _shapes(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, direction: Tensor, log_scale: Tensor, rounded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, time, width = inputs.shape
    chunks = -(-time // CHUNK)
    return (
        inputs.new_empty(inputs.shape, dtype=inputs.dtype if rounded else log_gate.dtype),
        torch.empty_like(log_gate),
        torch.empty_like(direction),
        torch.empty_like(log_scale),
        direction.new_empty(batch, heads, chunks, width),
        direction.new_empty(batch, heads, chunks),
    )


@torch.library.custom_op("mosaics::leaky_average_backward", mutates_args=())
def _gradients(
    inputs: Tensor,
    log_gate: Tensor,
    log_decay: Tensor,
    chunk_directions: Tensor,
    chunk_scales: Tensor,
    grad_keys: Tensor,
    grad_scales: Tensor,
    grad_direction: Tensor,
    grad_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs, the gates, the decays, and the state before the first position."""
    out = _gradient_shapes(inputs, log_gate, log_decay, None, None, None, None, grad_direction, grad_scale)
    tensors = log_gate, log_decay, chunk_directions, chunk_scales
    grads = (x.contiguous() for x in (grad_keys, grad_scales, grad_direction, grad_scale))
    _launch(_backward, inputs, *tensors, *grads, *out)
    return out


@_gradients.register_fake
def _gradient_shapes(
    inputs, log_gate, log_decay, chunk_directions, chunk_scales, grad_keys, grad_scales, grad_direction, grad_scale
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        inputs.new_empty(inputs.shape),
        torch.empty_like(log_gate),
        torch.empty_like(log_decay),
        grad_direction.new_empty(grad_direction.shape),
        grad_scale.new_empty(grad_scale.shape),
    )


def _keep(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[4:])


def _differentiate(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(*ctx.saved_tensors, *grads[:4]), None


_averages.register_autograd(_differentiate, setup_context=_keep)
