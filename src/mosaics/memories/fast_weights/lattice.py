"""Lattice: a few slots, each of which takes from a token what is orthogonal to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import Common, Context, Layout, State, check_choices, head_width, register
from mosaics.memories.fast_weights.common import GatedHeads, unit
from mosaics.ops.lattice import LOSSES, LatticeState, lattice


@dataclass
class SlotState(State):
    """Slots `(batch, heads, slots, width)` in float32 or wider, at the start of the open chunk and now, and the last
    inputs of the convolution `(batch, size - 1, channels)`."""

    anchor: Tensor | None = None
    current: Tensor | None = None
    tail: Tensor | None = None


@register("lattice")
class LatticeMemory(GatedHeads):
    r"""\( s_i \leftarrow a_t s_i + g_t \frac{c_{t,i}}{\|s_i\|} (I - \phi_i \phi_i^\top) h_t \),
    \( y_t = \sum_i q_{t,i} \phi_i \) with \( \phi_i = s_i / \|s_i\| \) (Karami and Mirrokni, arXiv 2504.05646), whose
    code c and vector h come from the loss that is descended, the `form`; docs/memories/lattice.md.

    Raises:
        ValueError: the form is none of the choices, or sizes do not fit.
    """

    EXAMPLES = (
        {"num_attention_heads": 2, "chunk": 4},
        {"num_attention_heads": 4, "form": "encoding", "chunk": 1, "slots": 5, "convolution": 2},
        {
            "num_attention_heads": 2,
            "form": "similarity",
            "chunk": 5,
            "decay": False,
            "convolution": 0,
            "initializer_range": 0.1,
        },
        {"num_attention_heads": 2, "slots": 12, "chunk": 3, "renormalised": False},
    )

    @dataclass(frozen=True)
    class Options:
        """`form` is `decoding`, `encoding` or `similarity`. Each head has `slots` slots (None: as many as it is
        wide). Gradients are taken at the start of each `chunk` of tokens (1 is the recurrence), where slots are made
        unit vectors again unless they are not `renormalised`. Without `decay` nothing is forgotten but by what is
        written. `convolution` is over so many tokens, 0 without.
        """

        num_attention_heads: int
        form: str = "decoding"
        slots: int | None = None
        chunk: int = 16
        decay: bool = True
        renormalised: bool = True
        convolution: int = 4
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        o, heads = options, options.num_attention_heads
        check_choices(o, form=LOSSES)
        slots = head_width(common.hidden_size, heads) if o.slots is None else o.slots
        if min(slots, o.chunk) < 1:
            raise ValueError("slots and chunk have to be at least 1.")
        super().__init__(options, common, layer_index, key_width=slots)
        self.num_slots = slots
        self.rates_proj = nn.Linear(common.hidden_size, (1 + o.decay) * heads, bias=True)
        self.slots = nn.Parameter(torch.empty(heads, self.num_slots, self.width))
        self.read_scale = nn.Parameter(torch.empty(self.width))

    def initial_state(self) -> SlotState:
        return SlotState()

    def forward(
        self, x: Tensor, layout: Layout, state: SlotState | None, context: Context
    ) -> tuple[Tensor, SlotState | None]:
        o, wide = self.options, torch.promote_types(x.dtype, torch.float32)
        (queries, keys, values), tail = self.projected(x, layout, state, after=F.silu)
        rates = self.rates_proj(x).to(wide).transpose(1, 2).split(self.heads, dim=1)
        before = None
        if state is not None and state.current is not None:
            before = LatticeState(state.anchor, state.current)
        read, after = lattice(
            self.slots,
            unit(queries),
            unit(keys),
            unit(values) if o.form == "encoding" else values,  # there they are what slots map
            rates[0].sigmoid(),
            layout.segments(o.chunk, x.device),
            loss=o.form,
            decay=F.logsigmoid(rates[1]) if o.decay else None,
            renormalised=o.renormalised,
            state=before,
        )
        if context.reads is not None:
            self.show(context, {"step": rates[0].sigmoid(), "decay": rates[1].sigmoid() if o.decay else None})
        if state is not None:
            state.anchor, state.current = (slots.contiguous() for slots in after)
            state.tail = tail
        return self.answered(read, x, F.silu(self.gate_proj(x))), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike. Slots are random unit vectors, a
        step begins at 1/2, and little is forgotten, which the paper does not say."""
        self.reset_maps(layer_index)
        with torch.no_grad():
            self.rates_proj.bias[self.heads :] = 3.0
            nn.init.normal_(self.slots)
            self.slots /= self.slots.norm(dim=-1, keepdim=True)
        if self.convolution is not None:
            self.convolution.reset_parameters()
        nn.init.ones_(self.read_scale)

    def undecayed_parameters(self) -> set[str]:
        """Also the slots, of which directions alone are read."""
        return super().undecayed_parameters() | {"slots"}

    def flops(self, context_length: int) -> float:
        """Six products with all slots, the share of the chunk's update, and what pairs of the chunk weigh."""
        chunk = min(self.options.chunk, context_length)
        pairs = 2 * chunk * self.heads * (5 * self.num_slots + 3 * self.width)
        return super().flops(context_length) + 14 * self.slots.numel() + pairs

    def activation_bytes(self, element_size: int) -> float:
        kept = 12 * self.common.hidden_size + 24 * self.heads * self.num_slots
        kept += 6 * self.slots.numel() / self.options.chunk + 6 * self.heads * self.options.chunk
        return super().activation_bytes(element_size) + 4 * kept

    def numbers(self, context_length: int) -> int:
        return 2 * self.slots.numel()
