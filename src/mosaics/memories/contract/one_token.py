"""A residual step for one position of each row by one call of C++ that is compiled when it is first wanted.

A memory takes part if it declares `one_token`. Nothing is packed or kept between calls: the addresses of all weights
are taken anew for every token, so whatever changes a weight, changes the next token. Where anything is not what it
seems (another kind of map or weight, a hook, a mode of torch) the step is computed as always.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from mosaics.memories.contract.context import Context
from mosaics.memories.contract.helpers import is_plain, is_untouched
from mosaics.memories.contract.layout import Layout
from mosaics.memories.contract.memory import Memory
from mosaics.memories.contract.state import State
from mosaics.ops.compiling import library
from mosaics.ops.kernel_regression import single
from mosaics.ops.leaky_average import compiled as averages
from mosaics.ops.leaky_average.state import floor_of
from mosaics.ops.unit_values import compiled as values
from mosaics.ops.unit_values.naive import SMALLEST

SOURCE = Path(__file__).with_suffix(".cpp")
ROWS = 8  # more are faster by a product of matrices
KINDS = {torch.float32: ("float", "float32"), torch.float64: ("double", "float64")}


class Unfit(Exception):
    """A step is not to be computed by one call."""


class Part(NamedTuple):
    """What one memory brings to the call.

    Attributes:
        numbers: the fields of its record in one_token.cpp.
        kept: tensors that have to live until the call returns.
        after: what is left to do then; returns the state.
    """

    numbers: list[int]
    kept: Sequence[Any] = ()
    after: Callable[[], State | None] = lambda: None


class Contextual(Part):
    """Of a memory with gated keys that reads pairs."""


class FeedForward(Part):
    """Of a gated network."""


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("average", "values", "read", "x", "norm", "y")),
        *((name, c_int64) for name in ("batch", "width", "threads", "contextual", "feed_forward")),
        *((name, c_double) for name in ("norm_eps", "value_eps", "smallest", "floor")),
    ]


def address(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, contiguous: bool = True) -> int:
    """Where the numbers of a tensor lie that is just what is expected.

    Raises:
        Unfit: it is not.
    """
    if type(x) not in (Tensor, nn.Parameter) or x.dtype != dtype or x.shape != shape or x.device.type != "cpu":
        raise Unfit
    if x.layout != torch.strided or (contiguous and not x.is_contiguous()):
        raise Unfit
    try:
        return x.data_ptr()
    except RuntimeError:  # within `torch.vmap`
        raise Unfit from None


def numbers_of(linear: nn.Module, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The record of a linear map that is what its weight and bias say.

    Raises:
        Unfit: it is not, or of another shape or dtype.
    """
    if not is_plain(linear):
        raise Unfit
    bias = linear.bias
    own = 0 if bias is None else address(bias, (outputs,), dtype)
    return address(linear.weight, (outputs, inputs), dtype), own, outputs, inputs


def available() -> bool:
    """Whether this machine can compile and load what is needed; the first call does so."""
    return library(SOURCE) is not None and all(form.available() for form in (single, averages, values))


def step_of_one(
    step: Any, x: Tensor, layout: Layout, states: list[State | None] | None, context: Context
) -> tuple[Tensor, list[State | None]] | None:
    """As `Step.forward`, to about the precision of the dtype; None where it is not for this input."""
    if torch.compiler.is_compiling() or states is None or x.dim() != 3 or x.shape[1] != 1 or x.shape[0] > ROWS:
        return None
    if torch.is_grad_enabled() or step.training or layout.start is not None or layout.length is not None:
        return None
    if context.reads is not None or context.without or x.dtype not in KINDS or x.device.type != "cpu":
        return None
    if torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return None
    norm, memories = step.norm, step.memories.values()
    if modules._has_any_global_hook() or type(norm) is not nn.RMSNorm or not is_untouched(norm, *memories):
        return None
    try:
        return _done(norm, memories, x, layout, states, context) if available() else None
    except Unfit:
        return None


def _done(
    norm: nn.RMSNorm, memories: Any, x: Tensor, layout: Layout, states: list[State | None], context: Context
) -> tuple[Tensor, list[State | None]]:
    batch, _, width = x.shape
    x = x.contiguous()
    given = (address(x, x.shape, x.dtype), address(norm.weight, (width,), x.dtype))
    parts = [memory.one_token(x, layout, state, context) for memory, state in zip(memories, states, strict=True)]
    kind, of_reads = KINDS[x.dtype]
    contextual, others = ([part for part in parts if type(part) is one] for one in (Contextual, FeedForward))
    if len(contextual) + len(others) < len(parts):
        raise Unfit
    y, eps = torch.empty(x.shape, dtype=x.dtype), torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    functions = (
        getattr(library(averages.SOURCE), f"forward_{kind}"),
        getattr(library(values.SOURCE), f"forward_{kind}"),
        getattr(library(single.SOURCE), f"read_{of_reads}"),
    )
    sizes = _Step(
        *(ctypes.cast(function, c_void_p).value for function in functions),
        *given,
        y.data_ptr(),
        batch,
        width,
        torch.get_num_threads(),
        len(contextual),
        len(others),
        eps,
        0.0,
        SMALLEST,
        floor_of(x),
    )
    records = []
    for group in (contextual, others):
        numbers = [number for part in group for number in part.numbers]
        records.append((c_int64 * len(numbers))(*numbers))
    getattr(library(SOURCE), f"step_{kind}")(ctypes.byref(sizes), *records)
    return y, [part.after() for part in parts]


Memory.step_of_one = step_of_one
