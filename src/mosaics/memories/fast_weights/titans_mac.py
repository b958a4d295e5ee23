"""Titans with the memory as context (MAC): attention within a segment reads what the neural memory says of its tokens,
and the memory learns what attention read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.attention.attention import AttentionState
from mosaics.memories.contract import Common, Context, Layout, State, init_map, linear_flops, register
from mosaics.memories.fast_weights.common import ShortConvolution, rms_normed, unit
from mosaics.memories.fast_weights.inner import LearningState
from mosaics.memories.fast_weights.titans import TitansMemory
from mosaics.memories.fast_weights.titans_mag import GatedAttention, GatedState


@dataclass
class OpenedState(State):
    """A map of the neural memory when the open segment began, `(batch, heads, inputs, outputs)`."""

    weights: Tensor | None = None


@dataclass
class ContextState(GatedState):
    """Also the maps that the open segment asks, and the last inputs of the questions' convolution."""

    opened: list[OpenedState] = field(default_factory=list)
    tail: Tensor | None = None


@register("titans_mac")
class TitansMAC(GatedAttention):
    r"""\( h_t = f(q_t; M_{i-1}) \), \( y_t = \mathrm{norm}(\mathrm{Attn}([P; h_{\le t}; x_{\le t}])) \), \( o_t = y_t
    \odot \mathrm{SiLU}(\mathrm{norm}(m_t)) \) within the i-th segment of the document, where m is what the `titans`
    memory M, which learns from y, reads (Behrouz et al., arXiv 2501.00663, section 4.1); docs/memories/titans.md.

    As printed, a token sees what was retrieved for later tokens of its segment; here only up to itself.

    Raises:
        ValueError: sizes do not fit.
    """

    EXAMPLES = (
        {"num_attention_heads": 2, "chunk": 4, "segment": 8},
        {
            "num_attention_heads": 4,
            "chunk": 3,
            "depth": 1,
            "expansion": 3,
            "largest_step": 0.05,
            "momentum": False,
            "convolution": 0,
            "initializer_range": 0.1,
            "segment": 7,
            "persistent_tokens": 0,
        },
    )

    @dataclass(frozen=True)
    class Options(TitansMemory.Options):
        """Those of a `titans` memory; `segment` tokens of the document are read by attention together, with
        `persistent_tokens`. The paper gives neither number (4 persistent tokens in public code).
        """

        segment: int = 64
        persistent_tokens: int = 4

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        if options.segment < 1:
            raise ValueError(f"segment is {options.segment}; give at least 1.")
        # Beside each token stands what was retrieved for it.
        super().__init__(options, common, layer_index, window=2 * options.segment)
        d = common.hidden_size
        self.retrieve_proj = nn.Linear(d, d, bias=common.bias)
        self.retrieve_convolution = ShortConvolution(d, options.convolution) if options.convolution else None
        self.retrieved_scale = nn.Parameter(torch.empty(d // options.num_attention_heads))

    def initial_state(self) -> ContextState:
        opened = [OpenedState() for _ in self.learning.maps.weights]
        return ContextState(self.attention.initial_state(), self.learning.initial_state(), opened)

    def forward(
        self, x: Tensor, layout: Layout, state: ContextState | None, context: Context
    ) -> tuple[Tensor, ContextState | None]:
        now = self.initial_state() if state is None else state
        attention, learning = None if state is None else now.attention, now.learning
        opened = [part.weights for part in now.opened]
        asked, tail = F.silu(self.retrieve_proj(x)), None
        if self.retrieve_convolution is not None:
            asked, tail = self.retrieve_convolution(asked, layout, now.tail)
        padded = F.pad(torch.cat([x, asked], dim=-1), (0, 0, 0, 1))
        # Of what is read within a segment nothing is shown: its places are none of the context.
        unseen, answers, places, shown = replace(context, reads=None), [], [], []
        self.learning.name = self.name
        for call, index in layout.calls(self.options.segment, x.device):
            own, queries = padded.gather(1, index[..., None].expand(-1, -1, padded.shape[2])).chunk(2, dim=-1)
            opened = self._opened(call, opened, learning)
            # In this order, causal attention reads of both what belongs to no later token.
            pairs = torch.stack([self._retrieved(queries, opened), own], dim=2).flatten(1, 2)
            read, attention = self.attended(pairs, self._of_pairs(call, attention), attention, unseen)
            own = context if context.reads is None else replace(context, reads=[])
            learnt, learning = self.learning(read[:, 1::2], call, learning, own)
            answers.append(read[:, 1::2] * self.gate(learnt))
            places.append(index)
            if context.reads is not None:
                shown.append(own.reads[0].traces)
        if context.reads is not None:
            index = torch.cat(places, dim=1)[:, None].expand(-1, self.options.num_attention_heads, -1)
            traces = {name: torch.cat([one[name] for one in shown], dim=2) for name in shown[0]}
            rows = {name: x.new_zeros(*x.shape[:2], layout.time + 1).scatter(2, index, x) for name, x in traces.items()}
            self.show(context, {name: x[..., :-1] for name, x in rows.items()})
        answer, place = torch.cat(answers, dim=1), torch.cat(places, dim=1)[..., None]
        whole = answer.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2])
        answer = whole.scatter(1, place.expand_as(answer), answer)[:, :-1]
        if state is not None:
            state = ContextState(attention, learning, [OpenedState(weights) for weights in opened], tail)
        return answer, state

    def _opened(self, call: Layout, opened: Sequence[Tensor | None], learning: LearningState) -> list[Tensor]:
        """The maps at the start of the segment that each row is in, after those of the segment before."""
        before, batch, found = -call.start[:, 0], call.batch, []
        there = before >= 0 if call.length is None else call.length > 0
        opens = (there & (before % self.options.segment == 0))[:, None, None, None]
        begins = (there & (before == 0))[:, None, None, None]
        for initial, kept, current in zip(self.learning.maps.weights, opened, learning.maps, strict=True):
            initial = initial.to(torch.promote_types(initial.dtype, torch.float32)).expand(batch, *initial.shape)
            if kept is not None:
                kept = torch.where(opens, current.current, kept)
            found.append(initial if kept is None else torch.where(begins, initial, kept))
        return found

    def _retrieved(self, queries: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What maps answer to `(batch, time, d)`, in that shape."""
        heads, wide = self.options.num_attention_heads, weights[0].dtype
        asked = unit(queries.unflatten(-1, (heads, -1)).transpose(1, 2).to(wide))
        read = self.learning.inner.answer(asked, weights, None)
        read = rms_normed(read, self.retrieved_scale, self.common.norm_eps)
        return read.to(queries.dtype).transpose(1, 2).flatten(2)

    def _of_pairs(self, call: Layout, state: AttentionState | None) -> Layout:
        """The layout of retrieved vectors and tokens in turn, for which the segment is the document."""
        length = None if call.length is None else 2 * call.length
        start = None if state is None else -2 * (-call.start[:, :1] % self.options.segment)
        return Layout(call.batch, 2 * call.time, None if start is None else start.expand(-1, 2 * call.time), length)

    def reset_parameters(self, layer_index: int) -> None:
        """As the two memories in it, the map of the questions as theirs."""
        super().reset_parameters(layer_index)
        init_map(self.retrieve_proj, layer_index, self.options.initializer_range)
        if self.retrieve_convolution is not None:
            self.retrieve_convolution.reset_parameters()
        nn.init.ones_(self.retrieved_scale)

    def reach(self) -> tuple[int, None]:
        """What is asked here lies in an earlier segment, of which there is what the neural memory learnt alone."""
        return self.options.segment + 3, None

    def flops(self, context_length: int) -> float:
        """Attention has two vectors a token."""
        attention = 2 * self.attention.flops(2 * min(context_length, self.options.segment))
        retrieved = linear_flops(self.retrieve_proj) + 2 * self.learning.maps.numbers()
        convolution = 0 if self.retrieve_convolution is None else self.retrieve_convolution.flops()
        return self.learning.flops(context_length) + attention + retrieved + convolution

    def activation_bytes(self, element_size: int) -> float:
        d = self.common.hidden_size
        more = element_size * 2 * d + 4 * d * (4 + 2 * self.options.depth * self.options.expansion)
        return super().activation_bytes(element_size) + self.attention.activation_bytes(element_size) + more

    def state_bytes(self, context_length: int, element_size: int) -> int:
        if not context_length:
            return 0
        inner = self.learning.state_bytes(context_length, element_size)
        inner += self.attention.state_bytes(2 * context_length, element_size)
        tail = max(self.options.convolution - 1, 0) * self.common.hidden_size * element_size
        return inner + self.learning.maps.numbers() * max(4, element_size) + tail
