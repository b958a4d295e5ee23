"""Titans with the memory as a gate (MAG): what attention reads in a window, times what the neural memory reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.attention.attention import AttentionMemory, AttentionState
from mosaics.memories.contract import Common, Context, Layout, Memory, State, register
from mosaics.memories.fast_weights.common import rms_normed
from mosaics.memories.fast_weights.inner import LearningState
from mosaics.memories.fast_weights.titans import TitansMemory


@dataclass
class GatedState(State):
    """The states of attention and of the neural memory."""

    attention: AttentionState
    learning: LearningState


class GatedAttention(Memory):
    """Attention with persistent tokens and a `titans` memory, whose answers are multiplied: what MAG and MAC share.

    Args:
        options: this memory's `Options`; those that a `titans` memory has are handed to it.
        common: what belongs to the whole model.
        layer_index: the block's index, from 0.
        window: of the attention.
    """

    adapted = ("q_proj", "v_proj")

    def __init__(self, options: TitansMemory.Options, common: Common, layer_index: int, window: int) -> None:
        super().__init__(options, common, layer_index)
        own, heads = TitansMemory.Options.__dataclass_fields__, options.num_attention_heads
        self.learning = TitansMemory(
            TitansMemory.Options(**{k: v for k, v in asdict(options).items() if k in own}), common, layer_index
        )
        attention = AttentionMemory.Options(
            heads,
            window=window,
            persistent_tokens=options.persistent_tokens,
            initializer_range=options.initializer_range,
        )
        self.attention = AttentionMemory(attention, common, layer_index)
        self.attention_scale, self.learning_scale = (nn.Parameter(torch.empty(common.hidden_size)) for _ in range(2))

    def initial_state(self) -> GatedState:
        return GatedState(self.attention.initial_state(), self.learning.initial_state())

    def attended(
        self, x: Tensor, layout: Layout, state: AttentionState | None, context: Context
    ) -> tuple[Tensor, AttentionState | None]:
        """What attention reads, normed, and its state."""
        self.attention.name = self.name
        own = context if context.reads is None else replace(context, reads=[])
        read, state = self.attention(x, layout, state, own)
        normed = rms_normed(read, self.attention_scale, self.common.norm_eps)
        if context.reads is not None:
            size = (read.square().mean(-1, keepdim=True) + self.common.norm_eps).rsqrt()
            for one in own.reads:
                context.reads.append(one.times(size * self.attention_scale))
        return normed, state

    def gate(self, learnt: Tensor) -> Tensor:
        """What the neural memory read, normed and through SiLU: what attention read is multiplied by it."""
        return F.silu(rms_normed(learnt, self.learning_scale, self.common.norm_eps))

    def reset_parameters(self, layer_index: int) -> None:
        """As the two memories in it; the scales of the norms are 1."""
        self.learning.reset_parameters(layer_index)
        self.attention.reset_parameters(layer_index)
        nn.init.ones_(self.attention_scale)
        nn.init.ones_(self.learning_scale)

    def activation_bytes(self, element_size: int) -> float:
        inner = self.learning.activation_bytes(element_size) + self.attention.activation_bytes(element_size)
        return inner + 6 * element_size * self.common.hidden_size


@register("titans_mag")
class TitansMAG(GatedAttention):
    r"""\( o_t = \mathrm{norm}(y_t) \odot \mathrm{SiLU}(\mathrm{norm}(m_t)) \), where y is what attention reads in a
    window and of persistent tokens, and m what the `titans` memory reads (Behrouz et al., arXiv 2501.00663, section
    4.2); docs/memories/titans.md.

    Raises:
        ValueError: sizes do not fit.
    """

    EXAMPLES = (
        {"num_attention_heads": 2, "chunk": 4, "window": 6},
        {
            "num_attention_heads": 4,
            "chunk": 1,
            "depth": 1,
            "expansion": 3,
            "largest_step": 0.05,
            "momentum": False,
            "convolution": 2,
            "initializer_range": 0.1,
            "window": 3,
            "persistent_tokens": 0,
        },
    )

    @dataclass(frozen=True)
    class Options(TitansMemory.Options):
        """Those of a `titans` memory; attention reads the tokens of a `window`, the own one included, and
        `persistent_tokens`, of which the paper does not say how many (4 in public code).
        """

        window: int = 64
        persistent_tokens: int = 4

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index, options.window)

    def forward(
        self, x: Tensor, layout: Layout, state: GatedState | None, context: Context
    ) -> tuple[Tensor, GatedState | None]:
        attention, learning = (None, None) if state is None else (state.attention, state.learning)
        self.learning.name = self.name
        own = context if context.reads is None else replace(context, reads=[])
        read, attention = self.attended(x, layout, attention, own)
        learnt, learning = self.learning(x, layout, learning, context)
        gate = self.gate(learnt)
        if context.reads is not None:
            for one in own.reads:
                context.reads.append(one.times(gate))
        return read * gate, None if state is None else GatedState(attention, learning)

    def reach(self) -> tuple[int, None]:
        """What is in the window is found exactly, and what is asked here lies beyond it."""
        return self.options.window + 3, None

    def flops(self, context_length: int) -> float:
        return self.learning.flops(context_length) + self.attention.flops(context_length)

    def state_bytes(self, context_length: int, element_size: int) -> int:
        parts = (self.learning, self.attention)
        return sum(part.state_bytes(context_length, element_size) for part in parts)
