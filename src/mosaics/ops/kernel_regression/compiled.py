"""Kernel regression on processors as one C++ kernel, compiled when it is first wanted."""

from __future__ import annotations

import math
from ctypes import c_int64
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op

from mosaics.ops import has_numbers
from mosaics.ops.compiling import dense, library, plain, strided
from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.reach import Reach, is_empty

SOURCE = Path(__file__).with_suffix(".cpp")

# No logit is larger than |beta| times the product of two norms, so exponentials need no maximum (the README has more).
PLAIN = 60.0  # up to here a sum of very many exponentials is a float32
SHIFTED = 40.0  # what the largest possible logit is moved to if it is larger
ENOUGH = math.exp(-40.0)  # a sum of exponentials from here on does not notice that none is taken below e^-80


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether this machine can compile and load the kernel; the first call does so."""
    return library(SOURCE) is not None


def pays(queries: Tensor) -> bool:
    """Whether the kernel can be used."""
    return queries.device.type == "cpu" and has_numbers(queries) and available()


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
    """Equation 4 in tiles that stay in the cache of a core; see `mosaics.ops.kernel_regression.kernel_regression`.

    Raises:
        ValueError: the tensors are not on a processor, there is dropout, or the kernel can't be compiled here.
    """
    if queries.device.type != "cpu" or dropout:
        raise ValueError("The compiled form works on a processor and without dropout; use the blockwise form.")
    if not available():
        raise ValueError("The compiled form needs a C++ compiler (the log says more); use the blockwise form.")
    batch, heads, time = queries.shape[:3]
    first, end = reach.span(queries, keys)
    # beta reaches 148 at 32k pairs: as a bfloat16 it would move a logit by 0.25, so all is float32 at least.
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    beta = bandwidth.at(end - first).to(dtype).expand(batch, heads, time)
    wide = (x.to(dtype) for x in (queries, keys, values))
    read, *_, logs = OPERATOR(*wide, beta, first, end, log_sum)
    return (read.to(values.dtype), logs) if log_sum else read.to(values.dtype)


def _forward(
    queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, first: Tensor, end: Tensor, log_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is read; for the backward pass of each query the sum of exponentials and what was taken from its logits; the
    logarithm of the sum of weights, without entries where it is not asked for."""
    queries, keys, values = (dense(x) for x in (queries, keys, values))
    beta, first, end = beta.contiguous(), first.contiguous(), end.contiguous()
    shift = _shift(queries, keys, beta, end)
    out, total, _, logs = _empty(queries, values, log_sum)
    given = (queries, keys, values, beta, shift, first, end, out, total)
    _call("forward", *given, None, False)
    if not bool((total >= ENOUGH).all()):
        # Nothing that is stored is near some query: its logits are all far below what they might be.
        far, largest = total < ENOUGH, torch.zeros_like(total)
        _call("forward", *given[:4], torch.zeros_like(shift), *given[5:8], largest, far, True)
        shift.copy_(torch.where(far, largest, shift))
        _call("forward", *given, far, False)
    if log_sum:
        torch.add(shift, total.log(), out=logs).masked_fill_(is_empty(first, end), -torch.inf)
    return out, total, shift, logs


def _empty(queries: Tensor, values: Tensor, log_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, time = queries.shape[:3]
    # The heads of a position side by side, as the map that follows wants them.
    out = values.new_empty(batch, time, heads, values.shape[3]).transpose(1, 2)
    lines = (batch, heads, time)
    return out, queries.new_empty(lines), queries.new_empty(lines), queries.new_empty(lines if log_sum else (0,))


def _backward(
    grad: Tensor | None,
    grad_logs: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor,
    first: Tensor,
    end: Tensor,
    out: Tensor,
    total: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, values and beta."""
    queries, keys, values = (dense(x) for x in (queries, keys, values))
    beta, first, end = beta.contiguous(), first.contiguous(), end.contiguous()
    grad = torch.zeros_like(out) if grad is None else dense(grad)
    if grad_logs is not None:
        grad_logs = grad_logs.masked_fill(is_empty(first, end), 0).contiguous()
    grads = _empty_grads(queries, keys, values, beta)
    _call("backward", queries, keys, values, beta, shift, first, end, out, total, grad, grad_logs, *grads)
    return grads


def _empty_grads(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


OPERATOR = custom_op(
    "mosaics::kernel_regression_compiled",
    _forward,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor queries, Tensor keys, Tensor values, Tensor beta, Tensor first, Tensor end, bool log_sum) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
BACKWARD = custom_op(
    "mosaics::kernel_regression_compiled_backward",
    _backward,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor? grad, Tensor? grad_logs, Tensor queries, Tensor keys, Tensor values, Tensor beta, Tensor first, "
    "Tensor end, Tensor out, Tensor total, Tensor shift) -> (Tensor, Tensor, Tensor, Tensor)",
)


@OPERATOR.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, first: Tensor, end: Tensor, log_sum: bool):
    return _empty(queries, values, log_sum)


@BACKWARD.register_fake
def _(grad, grad_logs, queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, *rest: Tensor):
    return _empty_grads(queries, keys, values, beta)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, log_sum = inputs
    ctx.save_for_backward(*tensors, *output[:3])
    ctx.mark_non_differentiable(*(output[1:3] if log_sum else output[1:]))
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    return *BACKWARD(grad, others[-1], *ctx.saved_tensors), None, None, None


OPERATOR.register_autograd(_gradients, setup_context=_keep)


def _shift(queries: Tensor, keys: Tensor, beta: Tensor, end: Tensor) -> Tensor:
    """`(batch, heads, time)`: what to take from a query's logits, so that no exponential overflows. It follows from the
    norms of the query and of the keys before it, so that no answer depends on what comes later."""
    norms = torch.linalg.vector_norm(keys, dim=-1)
    asked = norms if queries is keys else torch.linalg.vector_norm(queries, dim=-1)
    last = (end - 1).clamp(min=0).expand(queries.shape[0], queries.shape[2])
    longest = norms.cummax(-1).values.gather(-1, last[:, None].expand_as(beta))
    bound = (beta * asked * longest).abs_()
    return torch.where(bound <= PLAIN, 0.0, bound - SHIFTED)


def _call(name: str, queries: Tensor, keys: Tensor, values: Tensor, *rest: Tensor | bool | None) -> None:
    """Call the C++ function: after the sizes every tensor's address, and of those with a width the strides too."""
    first = rest[2]
    lines = first.shape[0] if first.dim() == 2 else 1
    width, value_width, threads = queries.shape[3], values.shape[3], torch.get_num_threads()
    given = [(c_int64 * 8)(*queries.shape[:3], keys.shape[2], width, value_width, lines, threads)]
    for x in (queries, keys, values, *rest):
        if isinstance(x, bool):
            given.append(int(x))
        else:
            given += strided(x) if x is not None and x.dim() == 4 else plain(x)
    kind = "double" if queries.dtype == torch.float64 else "float"
    getattr(library(SOURCE), f"{name}_{kind}")(*given)
