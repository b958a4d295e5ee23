"""The neural memory of Titans: weights that learn with momentum, and forget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import Common, Context, Layout, register
from mosaics.memories.fast_weights.common import GatedHeads, unit
from mosaics.memories.fast_weights.inner import Learning, LearningState, Maps
from mosaics.ops.inner_loop import Network


@register("titans")
class TitansMemory(GatedHeads, Learning):
    r"""\( S_t = \eta_t S_{t-1} - \theta_t \nabla \|f(k_t; W') - v_t\|^2 \), \( W_t = (1 - \alpha_t) W_{t-1} + S_t \),
    \( y_t = f(q_t; W_t) \): the long-term memory of Titans (Behrouz et al., arXiv 2501.00663, section 3), a linear map
    (`depth` 1) or an MLP in each head; docs/memories/titans.md.

    Raises:
        ValueError: sizes do not fit.
    """

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
        o, heads, width = options, self.heads, self.width
        if min(o.depth, o.expansion, o.chunk) < 1 or o.largest_step <= 0:
            raise ValueError("depth, expansion and chunk have to be at least 1, largest_step above 0.")
        self.rates_proj = nn.Linear(common.hidden_size, (3 if o.momentum else 2) * heads, bias=True)
        self.maps = Maps(heads, [width, *[o.expansion * width] * (o.depth - 1), width], bias=False)
        self.read_scale = nn.Parameter(torch.empty(width))
        self.inner = Network()

    def forward(
        self, x: Tensor, layout: Layout, state: LearningState | None, context: Context
    ) -> tuple[Tensor, LearningState | None]:
        o, wide = self.options, torch.promote_types(x.dtype, torch.float32)
        (queries, keys, values), tail = self.projected(x, layout, state, before=F.silu)
        rates = self.rates_proj(x).to(wide).sigmoid().transpose(1, 2).chunk(3 if o.momentum else 2, dim=1)
        read = self.learnt(
            [unit(queries), unit(keys), values],
            o.largest_step / self.width * rates[0],
            layout.segments(o.chunk, x.device),
            state,
            tail,
            context,
            decay=rates[1],
            momentum=rates[2] if o.momentum else None,
        )
        return self.answered(read, x, self.gate_proj(x)), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike. At first little is forgotten, and
        a step is half the largest; the paper says nothing of either."""
        super().reset_parameters(layer_index)
        with torch.no_grad():
            self.rates_proj.bias[self.heads : 2 * self.heads] = -4.0
        self.maps.reset_parameters()

    def flops(self, context_length: int) -> float:
        """Answers to key and query, the errors' way back, and the share of the chunk's update; reads within a chunk."""
        pairs = self.pair_flops(min(self.options.chunk, context_length))
        return super().flops(context_length) + 10 * self.maps.numbers() + pairs

    def activation_bytes(self, element_size: int) -> float:
        o = self.options
        channels = self.common.hidden_size * (10 + 4 * (o.depth - 1) * o.expansion)
        kept = channels + 8 * self.maps.numbers() / o.chunk + 8 * self.heads * o.chunk
        return super().activation_bytes(element_size) + 4 * kept
