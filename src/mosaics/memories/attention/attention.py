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
    check_choices,
    check_delay,
    check_deviation,
    head_width,
    init_map,
    linear_flops,
    mean_pairs,
    register,
)
from mosaics.memories.fast_weights.common import ShortConvolution
from mosaics.ops.kernel_regression import (
    ALL_PAIRS,
    Bandwidth,
    Reach,
    kernel_regression,
    merged,
    summary_of,
    weights_at,
    widened,
)
from mosaics.ops.rotary import SCALINGS, frequencies, rotated

POSITIONS = ("rotary", "alibi", "none")


@dataclass
class AttentionState(State):
    """The stored pairs: rotated keys, and values; and the last inputs of the convolution, if there is one."""

    pairs: Pairs
    tail: Tensor | None = None


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
        {"num_attention_heads": 2, "window": 3, "delay": 1, "persistent_tokens": 3},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "positions": "alibi", "persistent_tokens": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "convolution": 4},
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

        So many learned `persistent_tokens` can be read by every position together with the pairs, whatever the window
        and the delay. They have no position: their keys, and the queries that read them, are not turned (with ALiBi
        they are at no distance).

        With a `convolution` each channel of queries, keys and values is mixed over so many tokens, this one and those
        before it, ahead of their positions (Primer, So et al., arXiv 2109.08668; there over 3).
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
        persistent_tokens: int = 0
        convolution: int = 0
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        d, heads = common.hidden_size, options.num_attention_heads
        self.width = head_width(d, heads, options.head_dim)
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
        if options.persistent_tokens < 0:
            raise ValueError(f"persistent_tokens is {options.persistent_tokens}; give 0 or more.")
        if options.convolution < 0:
            raise ValueError(f"convolution is {options.convolution}; give the tokens that it is over, or 0.")
        self.widths = (heads * self.width, pair_heads * self.width, pair_heads * self.width)
        self.convolution = ShortConvolution(sum(self.widths), options.convolution) if options.convolution else None
        shape = (options.persistent_tokens, d)
        self.persistent = nn.Parameter(torch.empty(shape)) if options.persistent_tokens else None

    def initial_state(self) -> AttentionState:
        window = self.options.window
        return AttentionState(self.no_pairs(None if window is None else window - 1))

    def forward(
        self, x: Tensor, layout: Layout, state: AttentionState | None, context: Context
    ) -> tuple[Tensor, AttentionState | None]:
        mixed = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        if self.convolution is not None:
            before = None if state is None else state.tail
            whole, tail = self.convolution(torch.cat(mixed, dim=-1), layout, before)
            mixed = whole.split(self.widths, dim=-1)
            if state is not None:
                state.tail = tail
        queries, keys, values = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in mixed)
        asked, position = queries, layout.position(x.device)
        queries, keys = self._positioned(queries, keys, position)
        if state is not None:
            keys, values = state.pairs.append(keys, values)
        all_keys, all_values = self._shared(keys), self._shared(values)
        train_delay = self.options.train_delay
        delay = (
            self.options.delay if context.draw is None or train_delay is None else context.draw_integer(*train_delay)
        )
        wide = torch.promote_types(queries.dtype, torch.float32)
        scale = Bandwidth(torch.full((self.heads,), 1 / math.sqrt(self.width), dtype=wide, device=x.device))
        stored = None if state is None else state.pairs.stored
        stores = [(queries, all_keys, all_values, scale, Reach(delay, self.options.window, layout.start, stored))]
        if self.persistent is not None:
            stores.append((*self._learned(asked, position), scale, ALL_PAIRS))
        several, dropout = len(stores) > 1, self.read_dropout()
        reads = [kernel_regression(*store, dropout=dropout, log_sum=several) for store in stores]
        read, log_sum = merged(*reads) if several else (reads[0], None)
        if context.reads is not None:
            for number, store in enumerate(stores):
                share = (reads[number][1] - log_sum).exp()[..., None] if several else None
                answer = reads[number] if share is None else share * reads[number][0]
                context.reads.append(self._shown(*store, answer, share))
        if state is not None:
            state.pairs.settle(layout)
        return self.o_proj(read.transpose(1, 2).flatten(2)), state

    def _shown(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: Bandwidth,
        reach: Reach,
        answer: Tensor,
        share: Tensor | None,
    ) -> Read:
        """What was read of one of several stores, whose `share` `(batch, heads, time, 1)` is not 1."""

        def rows(positions: slice) -> tuple[Tensor, int]:
            found, first = weights_at(queries, keys, scale, reach, positions)
            return found if share is None else found * share[:, :, positions], first

        def pull(direction: Tensor, _: slice) -> Tensor:
            return (direction @ self.o_proj.weight.to(direction.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        contextual = reach.delay is not None
        span = reach.span(queries, keys) if contextual else None
        own = dict(span=span, contextual=contextual, values=widened(values), answer=answer, pull=pull)
        if contextual and share is None:
            own["summary"] = summary_of(queries, keys, scale, reach)
        return Read(self.name, self.layer_index, rows, keys.shape[2], **own)

    def _shared(self, x: Tensor) -> Tensor:
        """Keys or values `(batch, heads, ...)` with a head for each of the queries'."""
        shared = self.heads // self.pair_heads
        return x.repeat_interleave(shared, dim=1) if shared > 1 else x

    def _learned(self, queries: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the persistent tokens, which have no position."""
        keys, values = (
            self._shared(proj(self.persistent).unflatten(-1, (-1, self.width)).transpose(0, 1)[None])
            for proj in (self.k_proj, self.v_proj)
        )
        if self.options.positions == "rotary":
            queries = queries * self._angles(queries)[1] ** 2  # as all queries and keys
        if self.options.positions == "alibi":  # they are where the query is
            slopes, parts = self._slopes(queries, position)
            queries = torch.cat([queries, slopes * parts], dim=-1)
            keys = torch.cat([keys, torch.ones_like(keys[..., :2])], dim=-1)
        return queries, *(x.expand(len(queries), -1, -1, -1) for x in (keys, values))

    def _positioned(self, queries: Tensor, keys: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys that know their positions `(batch or 1, time)`, in one of three ways or not at all."""
        if self.options.positions == "none":
            return queries, keys
        if self.options.positions == "rotary":
            angles, factor = self._angles(queries)
            return rotated(queries, position, angles, factor), rotated(keys, position, angles, factor)
        # A slope times how far back a pair lies is a slope times its position, but for what is the same for all pairs.
        slopes, parts = self._slopes(queries, position)
        parts = parts.expand(*keys.shape[:3], 2)
        return torch.cat([queries, slopes], dim=-1), torch.cat([keys, parts], dim=-1)

    def _angles(self, queries: Tensor) -> tuple[Tensor, float]:
        o, wide = self.options, torch.promote_types(queries.dtype, torch.float32)
        scaling = (o.rotary_scaling, o.rotary_factor, o.rotary_trained_length)
        return frequencies(self.width, self.common.rotary_base, *scaling, queries.device, wide)

    def _slopes(self, queries: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes `(batch, heads, time, 2)`, before logits are scaled, and positions `(batch or 1, 1, time, 2)`: two
        numbers hold them also in bfloat16."""
        slopes = slopes_of(self.heads).to(queries) * math.sqrt(self.width)
        parts = torch.stack([position // 256 * 256, position % 256], dim=-1).to(queries.dtype)[:, None]
        return slopes[:, None, None].expand(*queries.shape[:3], 2), parts

    def reset_parameters(self, layer_index: int) -> None:
        """As the maps of Memory Mosaics v2 (Table 6), since the paper gives none for its baseline; persistent tokens
        from N(0, 1); the convolution as PyTorch's."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_map(linear, layer_index, self.options.initializer_range)
        if self.convolution is not None:
            self.convolution.reset_parameters()
        if self.persistent is not None:
            nn.init.normal_(self.persistent)  # as long as what comes from a norm

    def check(self, context_length: int) -> None:
        check_delay(self.name, max([self.options.delay, *(self.options.train_delay or ())]), context_length)

    def reach(self) -> tuple[int | None, int | None]:
        farthest = None if self.options.window is None else self.options.window - 1
        return farthest, farthest

    def activation_bytes(self, element_size: int) -> float:
        stores = 1 if self.persistent is None else 2
        kept = 4 * stores * self.heads * self.width  # turned, repeated, read
        mixed = 0 if self.convolution is None else 2 * sum(self.widths)  # joined, behind the tail
        return super().activation_bytes(element_size) + 4 * kept + element_size * mixed

    def flops(self, context_length: int) -> float:
        pairs = mean_pairs(context_length, self.options.window) + self.options.persistent_tokens
        near = 0 if self.convolution is None else self.convolution.flops()
        return linear_flops(self) + near + 4 * pairs * self.heads * self.width

    def state_bytes(self, context_length: int, element_size: int) -> int:
        pairs = context_length if self.options.window is None else min(context_length, self.options.window - 1)
        positions = pairs * self.pair_heads * 2 * element_size if self.options.positions == "alibi" else 0
        tail = max(0, self.options.convolution - 1) * sum(self.widths) * element_size
        return pairs * self.pair_bytes(self.pair_heads * self.width, self.pair_heads, element_size) + positions + tail


def _check_positions(options: AttentionMemory.Options, common: Common) -> None:
    check_choices(options, positions=POSITIONS)
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
