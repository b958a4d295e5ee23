"""Softmax attention: the Transformer's contextual memory, as a baseline in the same mosaic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    Memory,
    Pairs,
    Read,
    State,
    check_delay,
    check_deviation,
    init_map,
    linear_flops,
    mean_pairs,
    nearest,
    register,
)
from mosaics.ops.kernel_regression import Bandwidth, kernel_regression, weights
from mosaics.ops.rotary import SCALINGS, frequencies, rotated

POSITIONS = ("rotary", "alibi", "none")


@dataclass
class AttentionState(State):
    """The stored pairs: rotated keys, and values."""

    pairs: Pairs


@register("attention")
class AttentionMemory(Memory):
    """Attention as in Llama: position t reads positions t-window+1 ... t-delay by softmax(q_t k_i /
    sqrt(width)).

    With a delay of 0 and no window it is Llama's own, whose projections have the same names. A window on one and a
    delay on another, side by side, are the long and short attention of Memory Mosaics v2, Figure 5. Other positions
    than rotary ones are what a comparison beyond the training length has to try.

    Raises:
        ValueError: heads do not divide the width or each other, the head width is odd, or the reach is impossible.
    """

    adapted = ("q_proj", "v_proj")
    EXAMPLES = (
        {"num_attention_heads": 2},
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "window": 6,
            "delay": 1,
            "train_delay": [1, 4],
            "initializer_range": 0.1,
        },
        {"num_attention_heads": 2, "positions": "alibi"},
        {"num_attention_heads": 2, "positions": "none", "delay": 2},
        {"num_attention_heads": 2, "rotary_scaling": "linear", "rotary_factor": 2.0},
        {"num_attention_heads": 2, "rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_trained_length": 8},
        {"num_attention_heads": 1, "rotary_scaling": "yarn", "rotary_factor": 2.0, "rotary_trained_length": 64},
    )

    @dataclass(frozen=True)
    class Options:
        """Heads for queries and (fewer, shared) for keys and values; how far back the newest and the oldest readable
        pair lie.

        `delay` is that of evaluation; `train_delay` the range, both ends included, from which training draws.

        `positions` is how queries and keys know where they are: `"rotary"`, `"alibi"` or `"none"`. Rotary positions can
        be stretched to `rotary_factor` times the length trained at: `rotary_scaling` is `"linear"` or `"yarn"`, which
        needs that length (`rotary_trained_length`). `initializer_range` is the standard deviation of the maps at the
        start; None for that of Memory Mosaics v2.
        """

        num_attention_heads: int
        num_key_value_heads: int | None = None
        head_dim: int | None = None
        window: int | None = None
        delay: int = 0
        train_delay: tuple[int, int] | None = None
        positions: str = "rotary"
        rotary_scaling: str | None = None
        rotary_factor: float = 1.0
        rotary_trained_length: int | None = None
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        d, heads = common.hidden_size, options.num_attention_heads
        if heads < 1 or (options.head_dim is None and d % heads):
            raise ValueError(
                f"hidden_size {d} is not a multiple of num_attention_heads {heads}; choose heads that divide it."
            )
        self.width = d // heads if options.head_dim is None else options.head_dim
        pair_heads = heads if options.num_key_value_heads is None else options.num_key_value_heads
        if pair_heads < 1 or heads % pair_heads:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {pair_heads}.")
        _check_positions(options, common)
        check_deviation(options.initializer_range)
        if options.positions == "rotary" and (self.width < 2 or self.width % 2):
            raise ValueError(f"A head of attention is {self.width} wide; rotary positions need an even width.")
        low, high = options.train_delay or (options.delay, options.delay)
        if (
            options.delay < 0
            or low < 0
            or low > high
            or (options.window is not None and options.window <= options.delay)
        ):
            raise ValueError(
                f"An attention has window {options.window}, delay {options.delay}, training delays {low} to {high}; "
                "give delays of at least 0, the smaller first, and a window larger than the delay."
            )
        self.heads, self.pair_heads = heads, pair_heads
        self.q_proj = nn.Linear(d, heads * self.width, bias=common.bias)
        self.k_proj = nn.Linear(d, pair_heads * self.width, bias=common.bias)
        self.v_proj = nn.Linear(d, pair_heads * self.width, bias=common.bias)
        self.o_proj = nn.Linear(heads * self.width, d, bias=common.bias)

    def initial_state(self) -> AttentionState:
        window = self.options.window
        return AttentionState(Pairs(limit=None if window is None else window - 1, dtype=self.common.state_dtype))

    def forward(
        self, x: Tensor, layout: Layout, state: AttentionState | None, context: Context
    ) -> tuple[Tensor, AttentionState | None]:
        queries, keys, values = (
            proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = self._positioned(queries, keys, layout.position(x.device))
        if state is not None:
            keys, values = state.pairs.append(keys, values)
        shared = self.heads // self.pair_heads
        all_keys, all_values = (y.repeat_interleave(shared, dim=1) if shared > 1 else y for y in (keys, values))
        train_delay = self.options.train_delay
        delay = (
            self.options.delay if context.draw is None or train_delay is None else context.draw_integer(*train_delay)
        )
        access = dict(delay=delay, window=self.options.window, start=layout.start)
        wide = torch.promote_types(queries.dtype, torch.float32)
        scale = Bandwidth(torch.full((self.heads,), 1 / math.sqrt(self.width), dtype=wide, device=x.device))
        read = kernel_regression(queries, all_keys, all_values, scale, dropout=self.read_dropout(), **access)
        if context.reads is not None:
            context.reads.append(Read(self.name, self.layer_index, weights(queries, all_keys, scale, **access)))
        if state is not None:
            state.pairs.settle(layout)
        return self.o_proj(read.transpose(1, 2).flatten(2)), state

    def _positioned(self, queries: Tensor, keys: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys that know their positions `(batch or 1, time)`, in one of three ways or not at all."""
        if self.options.positions == "none":
            return queries, keys
        wide = torch.promote_types(queries.dtype, torch.float32)
        if self.options.positions == "rotary":
            o = self.options
            scaling = (o.rotary_scaling, o.rotary_factor, o.rotary_trained_length)
            angles, factor = frequencies(self.width, self.common.rotary_base, *scaling, position.device, wide)
            return rotated(queries, position, angles, factor), rotated(keys, position, angles, factor)
        # A slope times how far back a pair lies is a slope times its position, but for what is the same for all pairs.
        # Two numbers hold a position also in bfloat16.
        slopes = slopes_of(self.heads).to(queries) * math.sqrt(self.width)
        slopes = slopes[:, None, None].expand(*queries.shape[:3], 2)
        parts = torch.stack([position // 256 * 256, position % 256], dim=-1).to(keys.dtype)[:, None]
        parts = parts.expand(*keys.shape[:3], 2)
        return torch.cat([queries, slopes], dim=-1), torch.cat([keys, parts], dim=-1)

    def reset_parameters(self, layer_index: int) -> None:
        """As the maps of Memory Mosaics v2 (Table 6), since the paper gives none for its baseline."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_map(linear, layer_index, self.options.initializer_range)

    def check(self, context_length: int) -> None:
        check_delay(self.name, max([self.options.delay, *(self.options.train_delay or ())]), context_length)

    def reach(self) -> tuple[int | None, int | None]:
        farthest = None if self.options.window is None else self.options.window - 1
        return farthest, farthest

    def activation_bytes(self, element_size: int) -> float:
        return super().activation_bytes(element_size) + 4 * 4 * self.heads * self.width  # turned, repeated, read

    def flops(self, context_length: int) -> float:
        return linear_flops(self) + 4 * mean_pairs(context_length, self.options.window) * self.heads * self.width

    def state_bytes(self, context_length: int, element_size: int) -> int:
        pairs = context_length if self.options.window is None else min(context_length, self.options.window - 1)
        positions = pairs * self.pair_heads * 2 * element_size if self.options.positions == "alibi" else 0
        return pairs * self.pair_bytes(self.pair_heads * self.width, self.pair_heads, element_size) + positions


def _check_positions(options: AttentionMemory.Options, common: Common) -> None:
    if options.positions not in POSITIONS:
        raise ValueError(f"positions is {options.positions!r}; {nearest(options.positions, POSITIONS)}")
    if options.rotary_scaling not in (None, *SCALINGS):
        raise ValueError(f"rotary_scaling is {options.rotary_scaling!r}; choose {' or '.join(SCALINGS)}, or null.")
    if options.rotary_factor < 1:
        raise ValueError(f"rotary_factor is {options.rotary_factor}; give 1 or more.")
    if options.rotary_scaling == "yarn" and (options.rotary_trained_length or 0) < 1:
        raise ValueError("YaRN needs rotary_trained_length, the positions that were trained at; give at least 1.")
    if options.positions == "alibi" and common.state_dtype is not None:
        raise ValueError("ALiBi keeps positions in its keys, which fewer bits would round; leave out state_dtype.")


def slopes_of(heads: int) -> Tensor:
    """The slopes of ALiBi (Press et al., arXiv 2108.12409): 2^(-8/n), 2^(-16/n) ...; for n that are no power of 2 those
    of the power below, and every other one of twice that power."""
    power = 2 ** int(math.log2(heads))
    own = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    more = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return torch.tensor((own + more)[:heads], dtype=torch.float64)
