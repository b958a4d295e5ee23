"""What memories share that read stored pairs by a local linear fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosaics.memories.attention.attention import AttentionState
from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    Memory,
    Pairs,
    Read,
    State,
    check_deviation,
    head_width,
    init_map,
    linear_flops,
    mean_pairs,
)
from mosaics.memories.fast_weights.common import rms_normed
from mosaics.ops.kernel_regression import Reach, widened
from mosaics.ops.local_linear import local_linear
from mosaics.ops.rotary import frequencies, rotated

UNITS = 1024  # slots whose weights are made at once


@dataclass
class LocalLinearState(AttentionState):
    """Pairs that grow: what is solved with them needs to know how many there are."""

    def reserved(self, capacity: int) -> State:
        raise ValueError("A local linear memory solves with the pairs that there are; use a dynamic cache.")


class LocalLinearMemory(Memory):
    """Pairs of the whole context, each position reading those up to its own; a subclass says how (`asked`).

    Raises:
        ValueError: heads do not divide the width or each other, or the head width is odd.
    """

    adapted = ("q_proj", "v_proj")

    @dataclass(frozen=True)
    class Options:
        """Heads for queries and (fewer, shared) for keys and values. With `rotary` both know their positions; `normed`
        ones have a root mean square of 1 in each head, times a scale that is learned. `initializer_range` is the
        standard deviation of the maps at the start; None for that of Memory Mosaics v2.
        """

        num_attention_heads: int
        num_key_value_heads: int | None = None
        head_dim: int | None = None
        rotary: bool = True
        normed: bool = False
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        d, heads = common.hidden_size, options.num_attention_heads
        self.width = head_width(d, heads, options.head_dim)
        pair_heads = heads if options.num_key_value_heads is None else options.num_key_value_heads
        if pair_heads < 1 or heads % pair_heads:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {pair_heads}.")
        if self.width < 1 or (options.rotary and self.width % 2):
            raise ValueError(f"A head of {self.type} is {self.width} wide; rotary positions need an even width.")
        check_deviation(options.initializer_range)
        self.heads, self.pair_heads = heads, pair_heads
        self.q_proj = nn.Linear(d, heads * self.width, bias=common.bias)
        self.k_proj = nn.Linear(d, pair_heads * self.width, bias=common.bias)
        self.v_proj = nn.Linear(d, pair_heads * self.width, bias=common.bias)
        self.o_proj = nn.Linear(heads * self.width, d, bias=common.bias)
        self.q_scale, self.k_scale = self.scale(), self.scale()

    def scale(self) -> nn.Parameter | None:
        """What multiplies each normed head, if they are."""
        return nn.Parameter(torch.empty(self.width)) if self.options.normed else None

    def asked(self, x: Tensor, layout: Layout) -> dict[str, Any]:
        """The arguments of `local_linear` that say how pairs are read."""
        raise NotImplementedError

    def initial_state(self) -> LocalLinearState:
        return LocalLinearState(Pairs(dtype=self.common.state_dtype))

    def forward(
        self, x: Tensor, layout: Layout, state: AttentionState | None, context: Context
    ) -> tuple[Tensor, AttentionState | None]:
        queries = self.placed(self.q_proj(x), self.q_scale, layout)
        keys = self.placed(self.k_proj(x), self.k_scale, layout)
        values = self.split(self.v_proj(x))
        if state is not None:
            keys, values = state.pairs.append(keys, values)
        shared = self.heads // self.pair_heads
        keys, values = (y.repeat_interleave(shared, dim=1) if shared > 1 else y for y in (keys, values))
        asked = self.asked(x, layout) | {"start": layout.start}
        read, residual = local_linear(queries, keys, values, dropout=self.read_dropout(), **asked)
        if context.reads is not None:
            context.reads.append(self._shown(queries, widened(keys), widened(values), asked, read, residual))
        if state is not None:
            state.pairs.settle(layout)
        return self.o_proj(read.transpose(1, 2).flatten(2)), state

    def _shown(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        asked: dict[str, Any],
        read: Tensor,
        residual: Tensor | None,
    ) -> Read:
        """The weights are what is read of values that are unit vectors, some of them at a time."""
        time, slots = queries.shape[2], keys.shape[2]

        def rows(positions: slice) -> tuple[Tensor, int]:
            begin, end, _ = positions.indices(time)
            some, last = dict(asked), slots - time + end
            if some.get("probe") is not None:
                some["probe"] = some["probe"][:, :, begin:end]
            if some["start"] is not None:
                some["start"] = some["start"][:, begin:end] - begin
            found = []
            for low in range(0, last, UNITS):
                units = torch.eye(last, min(UNITS, last - low), dtype=read.dtype, device=read.device).roll(low, 0)
                units = units.expand(*read.shape[:2], *units.shape)
                found.append(local_linear(queries[:, :, begin:end], keys[:, :, :last], units, **some).read)
            return torch.cat(found, dim=-1), 0

        def pull(direction: Tensor, _: slice) -> Tensor:
            return self.split(direction @ self.o_proj.weight.to(direction.dtype))

        span = Reach(0, start=asked["start"]).span(queries, keys)
        own = dict(span=span, residual=residual, values=values, answer=read, pull=pull)
        return Read(self.name, self.layer_index, rows, slots, **own)

    def split(self, y: Tensor) -> Tensor:
        """`(batch, time, heads * width)` as `(batch, heads, time, width)`."""
        return y.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def placed(self, y: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
        """`y` as `split` gives it, normed if there is a scale, and turned by its positions if they are rotary."""
        y = self.split(y)
        if scale is not None:
            y = rms_normed(y, scale, self.common.norm_eps)
        if not self.options.rotary:
            return y
        wide = torch.promote_types(y.dtype, torch.float32)
        angles, _ = frequencies(self.width, self.common.rotary_base, device=y.device, dtype=wide)
        return rotated(y, layout.position(y.device), angles)

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike."""
        for linear in self.children():
            init_map(linear, layer_index, self.options.initializer_range)
        for name, parameter in self.named_parameters():
            if name.endswith("_scale"):
                nn.init.ones_(parameter)

    def products(self) -> int:
        """How often a vector of a head's width is multiplied with each pair that is read."""
        raise NotImplementedError

    def flops(self, context_length: int) -> float:
        pairs = mean_pairs(context_length, None)
        return linear_flops(self) + 2 * self.products() * pairs * self.heads * self.width

    def activation_bytes(self, element_size: int) -> float:
        # Of queries, keys, values, probe and what was read, turned, normed and repeated.
        return super().activation_bytes(element_size) + 4 * 8 * self.heads * self.width

    def state_bytes(self, context_length: int, element_size: int) -> int:
        return context_length * self.pair_bytes(self.pair_heads * self.width, self.pair_heads, element_size)
