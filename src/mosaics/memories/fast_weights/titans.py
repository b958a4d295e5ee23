"""The neural memory of Titans: weights that learn with momentum, and forget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    Memory,
    check_deviation,
    init_map,
    linear_flops,
    register,
)
from mosaics.memories.fast_weights.common import ShortConvolution, rms_normed, unit
from mosaics.memories.fast_weights.inner import LearningState, Maps
from mosaics.ops.inner_loop import Network, inner_loop


@register("titans")
class TitansMemory(Memory):
    r"""\( S_t = \eta_t S_{t-1} - \theta_t \nabla \|f(k_t; W') - v_t\|^2 \), \( W_t = (1 - \alpha_t) W_{t-1} + S_t \),
    \( y_t = f(q_t; W_t) \): the long-term memory of Titans (Behrouz et al., arXiv 2501.00663, section 3), a linear map
    (`depth` 1) or an MLP in each head; docs/memories/titans.md.

    Raises:
        ValueError: sizes do not fit.
    """

    adapted = ("q_proj", "v_proj")
    EXAMPLES = (
        {"num_attention_heads": 2, "chunk": 4, "depth": 2},
        {
            "num_attention_heads": 4,
            "chunk": 1,
            "depth": 1,
            "expansion": 3,
            "largest_step": 0.05,
            "momentum": False,
            "convolution": 2,
            "initializer_range": 0.1,
        },
    )

    @dataclass(frozen=True)
    class Options:
        """The network has `depth` maps, `expansion` times as wide inside as a head. Gradients are taken at the start of
        each `chunk` of tokens (1 is the recurrence). Step sizes reach up to `largest_step` over a head's width, which
        the paper does not give (0.1 in public code, whose loss is a mean); without `momentum` eta is 0. `convolution`
        is over so many tokens, 0 without.
        """

        num_attention_heads: int
        depth: int = 2
        expansion: int = 2
        chunk: int = 16
        largest_step: float = 0.1
        momentum: bool = True
        convolution: int = 4
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        o, d, heads = options, common.hidden_size, options.num_attention_heads
        if heads < 1 or d % heads:
            raise ValueError(
                f"hidden_size {d} is not a multiple of num_attention_heads {heads}; choose heads that divide it."
            )
        if min(o.depth, o.expansion, o.chunk) < 1 or o.convolution < 0 or o.largest_step <= 0:
            raise ValueError("depth, expansion and chunk have to be at least 1, largest_step above 0.")
        check_deviation(o.initializer_range)
        self.heads, width = heads, d // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d, bias=common.bias) for _ in range(3))
        self.gate_proj, self.o_proj = (nn.Linear(d, d, bias=common.bias) for _ in range(2))
        self.convolution = ShortConvolution(3 * d, o.convolution) if o.convolution else None
        self.rates_proj = nn.Linear(d, (3 if o.momentum else 2) * heads, bias=True)
        self.maps = Maps(heads, [width, *[o.expansion * width] * (o.depth - 1), width], bias=False)
        self.read_scale = nn.Parameter(torch.empty(width))
        self.inner = Network()

    def initial_state(self) -> LearningState:
        return self.maps.initial_state()

    def forward(
        self, x: Tensor, layout: Layout, state: LearningState | None, context: Context
    ) -> tuple[Tensor, LearningState | None]:
        o, wide, tail = self.options, torch.promote_types(x.dtype, torch.float32), None
        width = self.common.hidden_size // self.heads
        mixed = F.silu(torch.cat([proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1))
        if self.convolution is not None:
            mixed, tail = self.convolution(mixed, layout, None if state is None else state.tail)
        queries, keys, values = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(wide) for y in mixed.chunk(3, dim=-1)
        )
        rates = self.rates_proj(x).to(wide).sigmoid().transpose(1, 2).chunk(3 if o.momentum else 2, dim=1)
        step, watched = o.largest_step / width * rates[0], None if context.reads is None else {}
        read, after = inner_loop(
            list(self.maps.weights),
            unit(queries),
            unit(keys),
            values,
            step,
            layout.segments(o.chunk, x.device),
            network=self.inner,
            decay=rates[1],
            momentum=rates[2] if o.momentum else None,
            state=None if state is None else state.inner(),
            watched=watched,
        )
        if watched is not None:
            momentum = rates[2] if o.momentum else None
            self.show(context, {"step": step, "forgotten": rates[1], "momentum": momentum} | watched)
        read = rms_normed(read, self.read_scale, self.common.norm_eps).to(x.dtype).transpose(1, 2).flatten(2)
        if state is not None:
            state.keep(after, tail)
        return self.o_proj(read * self.gate_proj(x)), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike. At first little is forgotten, and
        a step is half the largest; the paper says nothing of either."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            init_map(linear, layer_index, self.options.initializer_range)
        with torch.no_grad():
            self.rates_proj.bias[self.heads : 2 * self.heads] = -4.0
        if self.convolution is not None:
            self.convolution.reset_parameters()
        self.maps.reset_parameters()
        nn.init.ones_(self.read_scale)

    def reach(self) -> tuple[int, None]:
        """What it learns later wears out what it learnt before."""
        return 1, None

    def flops(self, context_length: int) -> float:
        """Answers to key and query, the errors' way back, and the share of the chunk's update; reads within a chunk."""
        numbers, chunk = self.maps.numbers(), min(self.options.chunk, context_length)
        pairs = 4 * chunk * sum(self.heads * sum(w.shape[1:]) for w in self.maps.weights)
        convolution = 0 if self.convolution is None else self.convolution.flops()
        return linear_flops(self) + 10 * numbers + pairs + convolution

    def activation_bytes(self, element_size: int) -> float:
        o = self.options
        channels = self.common.hidden_size * (10 + 4 * (o.depth - 1) * o.expansion)
        kept = channels + 8 * self.maps.numbers() / o.chunk + 8 * self.heads * o.chunk
        return super().activation_bytes(element_size) + 4 * kept

    def state_bytes(self, context_length: int, element_size: int) -> int:
        if not context_length:
            return 0
        tail = max(self.options.convolution - 1, 0) * 3 * self.common.hidden_size * element_size
        return 3 * self.maps.numbers() * max(4, element_size) + tail
