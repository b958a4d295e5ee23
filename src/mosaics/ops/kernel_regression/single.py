"""Kernel regression of one query on processors: what is stored is read once, as it is stored, by C++ that is compiled
when it is first wanted."""

from __future__ import annotations

from ctypes import c_int64
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from mosaics.ops import cast, has_numbers
from mosaics.ops.compiling import dense, library, plain, strided
from mosaics.ops.kernel_regression.bandwidth import Bandwidth
from mosaics.ops.kernel_regression.narrow import Narrow
from mosaics.ops.kernel_regression.reach import Reach

SOURCE = Path(__file__).with_suffix(".cpp")
STORED = (torch.float32, torch.bfloat16, torch.int8)  # what a float32 query may be asked of
WORTH = 2**16  # stored numbers; fewer are not worth a second thread


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether this machine can compile and load the loop; the first call does so."""
    return library(SOURCE) is not None


def pays(
    queries: Tensor, keys: Tensor | Narrow, values: Tensor | Narrow, bandwidth: Bandwidth, dropout: float = 0.0
) -> bool:
    """Whether there is one query a row and head, and nothing asked that the loop does not do: gradients, dropout."""
    return queries.shape[2] == 1 and why_not(queries, keys, values, bandwidth, dropout) is None and available()


def why_not(
    queries: Tensor, keys: Tensor | Narrow, values: Tensor | Narrow, bandwidth: Bandwidth, dropout: float
) -> str | None:
    stored = [x.data if isinstance(x, Narrow) else x for x in (keys, values)]
    if queries.shape[2] != 1:
        return f"there are {queries.shape[2]} queries, not one"
    if queries.device.type != "cpu" or not has_numbers(queries):
        return "it reads numbers on a processor, and is compiled by itself"
    if dropout:
        return "there is dropout"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (queries, *stored, *bandwidth)):
        return "it has no backward pass"
    wide, (key, value) = _computed(queries), (x.dtype for x in stored)
    if key != value or key not in (STORED if wide == torch.float32 else (wide,)):
        return f"it does not read {key} and {value} in {wide}"
    return None


def _computed(queries: Tensor) -> torch.dtype:
    return torch.promote_types(queries.dtype, torch.float32)


def kernel_regression(
    queries: Tensor,
    keys: Tensor | Narrow,
    values: Tensor | Narrow,
    bandwidth: Bandwidth,
    reach: Reach,
    *,
    dropout: float = 0.0,
    log_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Equation 4 for one query; see `mosaics.ops.kernel_regression.kernel_regression`.

    Raises:
        ValueError: there is more than one query, something that the loop does not do, or no compiler.
    """
    reason = why_not(queries, keys, values, bandwidth, dropout)
    if reason or not available():
        raise ValueError(
            f"The single form can't be used: {reason or 'there is no C++ compiler'}; leave out the form for another."
        )
    read = OPERATOR if torch.compiler.is_compiling() else _read
    out, logs = read(queries, *parts_of(keys, values), *bandwidth, *reach, log_sum)
    out = cast(out, values.dtype)
    return (out, logs) if log_sum else out


def _read(queries: Tensor, *given: Tensor | int | bool | None) -> tuple[Tensor, Tensor | None]:
    with_all = prepared(queries, *given)
    getattr(library(SOURCE), f"read_{with_all.kind}")(*with_all.given)
    return with_all.out, with_all.logs


class Prepared(NamedTuple):
    """A call of the library: what is to be filled, the kind of its function, its arguments, and tensors that have to
    live until it returns."""

    out: Tensor
    logs: Tensor | None
    kind: str
    given: list[Any]
    kept: list[Tensor | None]


def prepared(
    queries: Tensor,
    keys: Tensor,
    key_scale: Tensor | None,
    values: Tensor,
    value_scale: Tensor | None,
    base: Tensor,
    slope: Tensor | None,
    exponent: Tensor | None,
    delay: int | None,
    window: int | None,
    start: Tensor | None,
    stored: Tensor | None,
    log_sum: bool,
) -> Prepared:
    """The call that reads one query of each row and head."""
    out = torch.empty(*queries.shape[:3], values.shape[3], dtype=_computed(queries))
    logs = torch.empty(queries.shape[:3], dtype=out.dtype) if log_sum else None
    batch, heads, _, width = queries.shape
    kept = [cast(queries, out.dtype).contiguous()]
    given = plain(kept[0])
    for data, scale in ((keys, key_scale), (values, value_scale)):
        data = dense(data)
        kept += [data, scale]
        for part in (data, scale):
            given += [None, None] if part is None else strided(part)
    for x, dtype in (*((x, out.dtype) for x in (base, slope, exponent)), *((x, torch.int64) for x in (start, stored))):
        x = None if x is None else cast(x, dtype).contiguous()
        kept.append(x)
        given += plain(x)
    slots = keys.shape[2]
    read = slots if window is None else min(slots, window)
    threads = torch.get_num_threads() if batch * heads * read * width >= WORTH else 1
    limits = (-1 if x is None else x for x in (delay, window))
    sizes = (c_int64 * 8)(batch, heads, slots, width, values.shape[3], *limits, threads)
    kind = str(kept[1].dtype).removeprefix("torch.")
    return Prepared(out, logs, kind, [sizes, *given, *plain(out, logs)], kept)


def parts_of(keys: Tensor | Narrow, values: Tensor | Narrow) -> list[Tensor | None]:
    """The data and the scale of keys and of values."""
    return [part for x in (keys, values) for part in ((x.data, x.scale) if isinstance(x, Narrow) else (x, None))]


def _operator(queries: Tensor, *given: Tensor | int | bool | None) -> tuple[Tensor, Tensor]:
    """As `_read`, with a tensor without entries in the place of None: that is no answer of an operator."""
    out, logs = _read(queries, *given)
    return out, out.new_empty(0) if logs is None else logs


def _empty(queries: Tensor, values: Tensor, log_sum: bool) -> tuple[Tensor, Tensor]:
    lines, dtype = queries.shape[:3], _computed(queries)
    out = queries.new_empty((*lines, values.shape[3]), dtype=dtype)
    return out, queries.new_empty(lines if log_sum else (0,), dtype=dtype)


OPERATOR = custom_op(
    "mosaics::kernel_regression_single",
    _operator,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor queries, Tensor keys, Tensor? key_scale, Tensor values, Tensor? value_scale, Tensor base, "
    "Tensor? slope, Tensor? exponent, SymInt? delay, SymInt? window, Tensor? start, Tensor? stored, "
    "bool log_sum) -> (Tensor, Tensor)",
)


@OPERATOR.register_fake
def _(queries: Tensor, keys: Tensor, key_scale: Tensor | None, values: Tensor, *rest: Tensor | int | None):
    return _empty(queries, values, rest[-1])
