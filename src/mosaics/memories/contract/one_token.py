"""A residual step for one position of each row by one call of C++ that is compiled when it is first wanted.

A memory takes part if it declares `one_token`, and brings its part in a C++ file of its own that includes one_token.h.
Nothing is packed or kept between calls: the addresses of all weights are taken anew for every token, so whatever
changes a weight, changes the next token. Where anything is not what it seems (another kind of map or weight, a hook, a
mode of torch) the step is computed as always.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable, Iterable
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from mosaics.memories.contract.context import Context
from mosaics.memories.contract.layout import Layout
from mosaics.memories.contract.memory import Memory
from mosaics.memories.contract.state import State
from mosaics.ops.compiling import library

SOURCE = Path(__file__).with_suffix(".cpp")
ROWS = 8  # more are faster by a product of matrices
KINDS = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}  # as they are called in C++


class Unfit(Exception):
    """A step is not to be computed by one call."""


class Part(NamedTuple):
    """What one memory brings to the call.

    Attributes:
        stages: the addresses of its functions, as `addresses` finds them: the stages of one_token.h, in order.
        record: what each of them is given, numbers and addresses.
        scratch: how many numbers of each row a stage leaves to the next.
        after: what is left to do then; returns the state.
    """

    stages: tuple[int, ...]
    record: list[int]
    scratch: int
    after: Callable[[], State | None] = lambda: None


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "norm", "y")),
        *((name, c_int64) for name in ("batch", "width", "threads", "count")),
        ("norm_eps", c_double),
    ]


def is_untouched(module: nn.Module) -> bool:
    """Whether a module is what its class says: no hook, no other `forward`."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in vars(module)


_PLAIN = (Tensor, nn.Parameter)


def address(x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where the numbers of a tensor lie that is just what is expected, without gaps.

    Raises:
        Unfit: it is not.
    """
    try:
        if type(x) in _PLAIN and x.dtype is dtype and x.is_cpu and x.shape == shape and x.is_contiguous():
            return x.data_ptr()
    except RuntimeError:  # it is sparse, or within `torch.vmap`
        pass
    raise Unfit


def numbers_of(linear: nn.Module | None, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The record of a linear map that is what its weight and bias say.

    Raises:
        Unfit: it is not, or of another shape or dtype.
    """
    if type(linear) is not nn.Linear or not is_untouched(linear):
        raise Unfit
    own = linear._parameters  # an attribute of a module takes long to find
    weight, bias = own.get("weight"), own.get("bias")
    at = 0 if bias is None else address(bias, (outputs,), dtype)
    return address(weight, (outputs, inputs), dtype), at, outputs, inputs


def addresses(source: Path, *names: str) -> tuple[int, ...]:
    """Where functions of a C++ file lie; the first call compiles it.

    Raises:
        Unfit: it can't be compiled and loaded, or has no such function.
    """
    made = library(source)
    if made is None or not all(hasattr(made, name) for name in names):
        raise Unfit
    return tuple(ctypes.cast(getattr(made, name), c_void_p).value for name in names)


def bits(x: float) -> int:
    """A `double` of a record."""
    return int.from_bytes(struct.pack("=d", x), sys.byteorder, signed=True)


@functools.cache
def _function(dtype: torch.dtype) -> Callable | None:
    """That of the step; None where it can't be compiled and loaded."""
    return getattr(library(SOURCE), f"step_{KINDS[dtype]}", None)


def available() -> bool:
    """Whether this machine can compile and load the step; the first call does so."""
    return _function(torch.float32) is not None


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
    norm, memories = step._modules["norm"], step._modules["memories"]._modules.values()
    if modules._has_any_global_hook() or type(norm) is not nn.RMSNorm or not all(map(is_untouched, (norm, *memories))):
        return None
    try:
        return _done(norm, memories, x, layout, states, context)
    except Unfit:
        return None


def _done(
    norm: nn.RMSNorm,
    memories: Iterable[Memory],
    x: Tensor,
    layout: Layout,
    states: list[State | None],
    context: Context,
) -> tuple[Tensor, list[State | None]]:
    batch, _, width = x.shape
    dtype, step = x.dtype, _function(x.dtype)
    if step is None:
        raise Unfit
    given = (address(x, x.shape, dtype), address(norm._parameters.get("weight"), (width,), dtype))
    parts = [memory.one_token(x, layout, state, context) for memory, state in zip(memories, states, strict=True)]
    if None in parts:
        raise Unfit
    y, eps = torch.empty_like(x), torch.finfo(dtype).eps if norm.eps is None else norm.eps
    head = _Step(*given, y.data_ptr(), batch, width, torch.get_num_threads(), len(parts), eps)
    numbers: list[int] = []
    for stages, record, scratch, _ in parts:
        numbers += (len(record), scratch, len(stages), *stages, *record)
    step(ctypes.byref(head), (c_int64 * len(numbers))(*numbers))
    return y, [part.after() for part in parts]


Memory.step_of_one = step_of_one
