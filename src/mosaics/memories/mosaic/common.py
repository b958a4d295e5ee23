"""What contextual memories share: keys of leaky averages, values that look ahead, the read; and what v2 adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    Memory,
    Pairs,
    Read,
    State,
    Store,
    check_deviation,
    head_width,
    init_map,
    linear_flops,
    mean_pairs,
)
from mosaics.memories.contract import one_token as one
from mosaics.memories.contract.state import shared
from mosaics.ops.kernel_regression import Bandwidth, Reach, kernel_regression, single, summary_of, weights_at
from mosaics.ops.kernel_regression import widened as plain
from mosaics.ops.leaky_average import LeakyAverageState, leaky_average
from mosaics.ops.leaky_average import compiled as averages
from mosaics.ops.leaky_average.state import floor_of
from mosaics.ops.unit_values import compiled as lengths
from mosaics.ops.unit_values import unit_values
from mosaics.ops.unit_values.naive import SMALLEST

SOURCE = Path(__file__).with_suffix(".cpp")  # of one token


@dataclass
class KeyState(State):
    """The leaky average behind the keys, as direction and log scale; None before the first token."""

    direction: Tensor | None = None
    log_scale: Tensor | None = None


@dataclass
class ContextualState(KeyState):
    """What a contextual memory carries: the average behind its keys, the last raw value, and the stored pairs; and the
    store of documents that were read before, if there is one."""

    raw_value: Tensor | None = None
    pairs: Pairs = field(default_factory=Pairs)
    store: State | None = shared()  # a `Store`, or what is read as one


def leaky_keys(
    raw: Tensor, log_gate: Tensor, log_decay: Tensor, layout: Layout, state: KeyState | None, eps: float = 0.0
) -> Tensor:
    """Unit keys `(batch, heads, time, width)`: the leaky average of `raw` within each document, padding kept out.

    Args:
        raw: `(batch, heads, time, width)`.
        log_gate: `(batch, heads, time)`.
        log_decay: `(batch, heads, time)`.
        layout: what each position is.
        state: continued and changed in place; None when nothing follows.
        eps: added to the norm.
    """
    if (first := layout.is_first) is not None:
        log_decay = log_decay.masked_fill(first[:, None], -torch.inf)
    if (padding := layout.is_padding) is not None:
        log_gate = log_gate.masked_fill(padding[:, None], -torch.inf)
        log_decay = log_decay.masked_fill(padding[:, None], 0.0)
    before = None if state is None or state.direction is None else LeakyAverageState(state.direction, state.log_scale)
    keys, after = leaky_average(raw, log_gate, log_decay, before, eps=eps)
    if state is not None:
        state.direction, state.log_scale = after
    return keys


def mapped(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """What linear maps make of the same `x` `(batch, time, inputs)`: by one product, so that there is one gradient of
    `x`, where they are plain and `x` has so many positions that this is worth a copy of the weights."""
    many = not torch.compiler.is_exporting() and x.numel() >= x.shape[-1] ** 2  # one graph serves few and many
    if many and all(map(is_plain, linears)) and len({(m.weight.dtype, m.weight.device) for m in linears}) == 1:
        biases = [m.bias for m in linears if m.bias is not None]
        if len(biases) in (0, len(linears)):
            bias = torch.cat(biases) if biases else None
            together = F.linear(x, torch.cat([m.weight for m in linears]), bias)
            return together.split([m.out_features for m in linears], dim=-1)
    return [linear(x) for linear in linears]


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear map is what its weight and bias say: no adapter, quantised or sharded weight, no hook."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return (
        type(linear) is nn.Linear
        and type(linear.weight) in (nn.Parameter, Tensor)
        and not any(hooks)
        and "forward" not in vars(linear)
    )


class ContextualMemory(Memory):
    """Kernel regression over the pairs of the context (Memory Mosaics v2, equations 4 and 9).

    Values mix a position with the next one. A subclass makes the keys, the bandwidth and the length of the values, and
    says which pairs a position may read: `window` and `delay`.

    Raises:
        ValueError: the width is not a multiple of the number of heads.
    """

    adapted = ("key_proj", "value_proj")
    window: int | None = None
    unit_norm_eps: float = 0.0

    def __init__(self, options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        d, heads = common.hidden_size, options.num_attention_heads
        head_width(d, heads)
        self.heads = heads
        self.value_proj = nn.Linear(d, d, bias=common.bias)
        self.out_proj = nn.Linear(d, d, bias=common.bias)
        # Per head: the share of the own position in a value, and what makes the length of the values.
        self.value_mix = nn.Parameter(torch.empty(heads))
        self.value_scale = nn.Parameter(torch.empty(heads))

    def delay(self, context: Context) -> int:
        """How far back the newest readable pair lies in this pass."""
        raise NotImplementedError

    def initial_state(self) -> ContextualState:
        return ContextualState(pairs=self.no_pairs(None if self.window is None else self.window - 1))

    def bandwidth(self) -> Bandwidth:
        """beta as a function of the number of pairs."""
        raise NotImplementedError

    def maps(self, x: Tensor) -> tuple[Any, Tensor]:
        """What `keys` is made from, and the raw values `(batch, time, d)`."""
        return x, self.value_proj(x)

    def keys(self, source: Any, layout: Layout, state: ContextualState | None) -> Tensor:
        """Unit keys `(batch, heads, time, width)` from what `maps` gave."""
        raise NotImplementedError

    def value_length(self) -> Tensor:
        """The norm of the values, `(heads,)`, in float32 or wider."""
        raise NotImplementedError

    def values(self, raw: Tensor, layout: Layout, state: ContextualState | None) -> Tensor:
        """Values `(batch, heads, time, width)` (equation 9), one more at the front when an earlier call left its last
        one open.

        The last is made without its successor: nothing may read it before a later call completes it.
        """
        raw = self._split(raw)
        if state is not None:
            if state.raw_value is not None:
                raw = torch.cat([state.raw_value, raw], dim=2)
            last = layout.align(raw)[:, :, -1:]
            state.raw_value = last.clone(memory_format=torch.contiguous_format)  # lets go of the others
        return unit_values(raw, self.value_mix, self.value_length(), eps=self.unit_norm_eps)

    def forward(
        self, x: Tensor, layout: Layout, state: ContextualState | None, context: Context
    ) -> tuple[Tensor, ContextualState | None]:
        source, raw_values = self.maps(x)
        queries = keys = self.keys(source, layout, state)
        values = self.values(raw_values, layout, state)
        if state is not None:
            keys, values = state.pairs.append(keys, values)
        read = self._read(queries, keys, values, source, layout, state, context)
        if state is not None:
            state.pairs.settle(layout)
        return self.out_proj(read.transpose(1, 2).flatten(2)), state

    def _read(
        self,
        queries: Tensor,
        keys: Any,
        values: Any,
        source: Any,
        layout: Layout,
        state: ContextualState | None,
        context: Context,
    ) -> Tensor:
        stored = None if state is None else state.pairs.stored
        reach = Reach(self.delay(context), self.window, layout.start, stored)
        bandwidth, dropout = self.bandwidth(), self.read_dropout()
        if state is not None and state.store is not None:
            whose = (self.name, self.layer_index)
            return state.store.read_beside(queries, keys, values, bandwidth, reach, context, whose, dropout=dropout)
        read = kernel_regression(queries, keys, values, bandwidth, reach, dropout=dropout)
        if context.reads is not None:
            context.reads.append(self._shown(queries, keys, values, read, reach, source))
        return read

    def _shown(self, queries: Tensor, keys: Any, values: Any, read: Tensor, reach: Reach, source: Any) -> Read:
        """The read, with the bandwidth that follows from how many pairs each position may read."""
        bandwidth, (first, end) = self.bandwidth(), reach.span(queries, keys)
        beta = bandwidth.at(end - first).expand(queries.shape[:3])
        own = dict(values=plain(values), answer=read, traces={"bandwidth": beta} | self.traces(source))
        own["recurrence"] = self.recurrence(source)
        own["summary"] = summary_of(queries, keys, bandwidth, reach)
        own["pull"] = lambda direction, _: self._split(direction @ self.out_proj.weight.to(direction.dtype))
        rows = partial(weights_at, queries, keys, bandwidth, reach)
        return Read(self.name, self.layer_index, rows, keys.shape[2], (first, end), **own)

    def traces(self, source: Any) -> dict[str, Tensor]:
        """What `keys` is made from, as numbers over time."""
        return {}

    def recurrence(self, source: Any) -> tuple[Tensor, Tensor] | None:
        """Logarithms of the gates and decays `(batch, heads, time)` of the average that the keys are, if they are."""
        return None

    def document_store(self, state: ContextualState) -> Store | None:
        """All pairs but that of the end-of-text, whose value was never complete; none of a window."""
        return Store.of(state.pairs) if self.window is None else None

    def united_state(self, stores: Sequence[Store]) -> ContextualState:
        state = self.initial_state()
        if stores:
            state.store = stores[0].united(stores)
        return state

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def flops(self, context_length: int) -> float:
        return linear_flops(self) + 4 * mean_pairs(context_length, self.window) * self.common.hidden_size

    def activation_bytes(self, element_size: int) -> float:
        return self.common.hidden_size * (26 + 6.5 * element_size)  # measured on a block of v2, in both precisions

    def reach(self) -> tuple[int | None, int | None]:
        farthest = None if self.window is None else self.window - 1
        return farthest, farthest

    def state_bytes(self, context_length: int, element_size: int) -> int:
        pairs = context_length if self.window is None else min(context_length, self.window - 1)
        d = self.common.hidden_size
        return pairs * self.pair_bytes(d, self.heads, element_size) + d * element_size + key_state_bytes(d, self.heads)


class GatedContextualMemory(ContextualMemory):
    """Keys of gated leaky averages, a bandwidth that grows with the number of pairs (Memory Mosaics v2, equations 6 and
    8)."""

    def __init__(self, options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        check_deviation(options.initializer_range)
        d = common.hidden_size
        self.key_proj = nn.Linear(d, d, bias=common.bias)
        self.key_gate = nn.Linear(d, self.heads, bias=common.bias)
        self.key_decay = nn.Linear(d, self.heads, bias=common.bias)
        # Logarithms of beta_0 and beta_1, and alpha, per head.
        self.bandwidth_base = nn.Parameter(torch.empty(self.heads))
        self.bandwidth_slope = nn.Parameter(torch.empty(self.heads))
        self.bandwidth_exponent = nn.Parameter(torch.empty(self.heads))

    def bandwidth(self) -> Bandwidth:
        """beta(n), with the clamps of Table 6."""
        return Bandwidth(
            widened(self.bandwidth_base).clamp(max=10).exp(),
            widened(self.bandwidth_slope).clamp(max=10).exp(),
            widened(self.bandwidth_exponent).abs().clamp(max=1),
        )

    def maps(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        *source, raw_values = mapped(x, self.key_proj, self.key_gate, self.key_decay, self.value_proj)
        return tuple(source), raw_values

    def keys(self, source: tuple[Tensor, Tensor, Tensor], layout: Layout, state: ContextualState | None) -> Tensor:
        return leaky_keys(self._split(source[0]), *self.recurrence(source), layout, state)

    def recurrence(self, source: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        _, gate, decay = source
        return gate.mT, -decay.mT.abs()

    def traces(self, source: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        log_gate, log_decay = self.recurrence(source)
        return {"log gate": log_gate, "decay": log_decay.exp()}

    def value_length(self) -> Tensor:
        return widened(self.value_scale).clamp(max=15).exp()

    def one_token(self, x: Tensor, layout: Layout, state: ContextualState, context: Context) -> one.Part | None:
        batch, _, d = x.shape
        pairs, dtype, heads = state.pairs, x.dtype, self.heads
        if type(pairs) is not Pairs or state.store is not None or state.raw_value is None or not pairs.kept:
            return None
        if self.training or not _is_as_written(type(self)) or not _WRITTEN.isdisjoint(vars(self)):
            return None
        keys, values = pairs.keys, pairs.values
        if keys.dtype != dtype or keys.requires_grad or values.requires_grad:
            return None
        pairs.make_room(1)
        keys, values, used, kept, width = pairs.keys, pairs.values, pairs.used, pairs.kept, d // heads
        shape = (batch, heads, keys.shape[2], width)
        skipped = (used - kept) * width * dtype.itemsize
        buffers = [one.address(buffer, shape, dtype) + skipped for buffer in (keys, values)]
        before = (state.direction, state.log_scale, state.raw_value)
        shapes = ((batch, heads, width), (batch, heads), (batch, heads, 1, width))
        dtypes = (wide := torch.promote_types(dtype, torch.float32), wide, dtype)
        after = [torch.empty(shape, dtype=own) for shape, own in zip(shapes, dtypes, strict=True)]
        linears, vectors, (stages, called) = self._modules, self._parameters, _functions(dtype)
        numbers = [*called]
        for name, outputs in (("key_proj", d), ("key_gate", heads), ("key_decay", heads), ("value_proj", d)):
            numbers += one.numbers_of(linears.get(name), outputs, d, dtype)
        numbers += one.numbers_of(linears.get("out_proj"), d, d, dtype)
        for name in _VECTORS:
            numbers.append(one.address(vectors.get(name), (heads,), dtype))
        for tensor, shape, own in zip(before, shapes, dtypes, strict=True):
            numbers.append(one.address(tensor, shape, own))
        numbers += [tensor.data_ptr() for tensor in after]
        numbers += buffers
        numbers += (*keys.stride()[:3], *values.stride()[:3])
        numbers += (heads, kept + 1, self.delay(context), -1 if self.window is None else self.window)

        def done() -> ContextualState:
            state.direction, state.log_scale, state.raw_value = after
            pairs.used = used + 1
            pairs.settle(layout)
            return state

        return one.Part(stages, numbers, 3 * d + 2 * heads, done)

    def reset_parameters(self, layer_index: int) -> None:
        """Table 6, but for the scale of the values: exp(theta), as exp(|theta|) could never move from 0."""
        for linear in (self.key_proj, self.key_gate, self.key_decay, self.value_proj, self.out_proj):
            init_map(linear, layer_index, self.options.initializer_range)
        nn.init.constant_(self.bandwidth_base, 1.5)
        nn.init.constant_(self.bandwidth_slope, 1.5)
        nn.init.constant_(self.bandwidth_exponent, 1 / 3)
        nn.init.uniform_(self.value_mix)
        nn.init.zeros_(self.value_scale)


_VECTORS = ("value_mix", "value_scale", "bandwidth_base", "bandwidth_slope", "bandwidth_exponent")
_WRITTEN = frozenset(("forward", "maps", "keys", "values", "value_length", "bandwidth", "_read", "_split"))
_WRITTEN |= {"recurrence", "read_dropout", "unit_norm_eps"}


@cache
def _functions(dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The stages of one token, and with what a record of them begins.

    Raises:
        Unfit: they can't be compiled and loaded.
    """
    wide = torch.promote_types(dtype, torch.float32)
    stages = one.addresses(SOURCE, *(f"{name}_{one.KINDS[dtype]}" for name in ("maps", "reads", "out")))
    forward, read = f"forward_{one.KINDS[wide]}", f"read_{str(dtype).removeprefix('torch.')}"
    ops = (averages.SOURCE, forward), (lengths.SOURCE, forward), (single.SOURCE, read)
    called = [address for source, name in ops for address in one.addresses(source, name)]
    return stages, (*called, one.bits(SMALLEST), one.bits(floor_of(torch.empty(0, dtype=wide))))


@cache
def _is_as_written(kind: type[GatedContextualMemory]) -> bool:
    """Whether a class computes what `GatedContextualMemory` does."""
    return all(getattr(kind, name) is getattr(GatedContextualMemory, name) for name in _WRITTEN)


def key_state_bytes(hidden_size: int, heads: int) -> int:
    """Bytes of a `KeyState` of one sequence: float32 whatever the dtype of the model."""
    return 4 * (hidden_size + heads)


def widened(x: Tensor) -> Tensor:
    """`x` in float32 or wider."""
    return x if x.dtype.itemsize >= 4 else x.float()
