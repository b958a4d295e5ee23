"""The Transformers of Atlas: a deep memory whose keys have infinitely many features, asked by their kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    Pairs,
    State,
    check_choices,
    mean_pairs,
    register,
)
from mosaics.memories.fast_weights.atlas import EXPANSION, LOSSES
from mosaics.memories.fast_weights.common import GatedHeads, unit
from mosaics.ops.deep_attention import DeepState, deep_attention
from mosaics.ops.inner_loop import Loss, Network

NETWORKS = ("linear", "mlp")
SMALLEST = 1e-20  # square of a read that is normed: reads of no near key are small, and all that there is


@dataclass
class DeepAttentionState(State):
    """Keys and, as their values, errors and shares; beside them what `DeepState` has, and the last inputs of the
    convolution `(batch, size - 1, channels)`."""

    pairs: Pairs = field(default_factory=Pairs)
    now: Tensor | None = None
    opened: Tensor | None = None
    current: Tensor | None = None
    anchor: Tensor | None = None
    inputs: Tensor | None = None
    sent: Tensor | None = None
    tail: Tensor | None = None

    def reserved(self, capacity: int) -> State:
        raise ValueError("A deep attention reads the pairs that there are; use a dynamic cache.")

    def inner(self) -> DeepState | None:
        """As the op takes it."""
        if self.now is None:
            return None
        begin, end = self.pairs.used - self.pairs.kept, self.pairs.used
        errors, shares = self.pairs.values[:, :, begin:end].tensor_split([-2], dim=-1)
        rest = (self.now, self.opened, self.current, self.anchor, self.inputs, self.sent)
        return DeepState(self.pairs.keys[:, :, begin:end], errors, shares, *rest)

    def keep(self, inner: DeepState, layout: Layout, tail: Tensor | None) -> None:
        """Take over what the op gave."""
        self.pairs.append(inner.keys, torch.cat([inner.errors, inner.shares], dim=-1))
        self.pairs.settle(layout)
        for name in ("now", "opened", "current", "anchor", "inputs", "sent"):
            x = getattr(inner, name)
            setattr(self, name, None if x is None else x.contiguous())
        self.tail = tail


@register("deep_attention")
class DeepAttentionMemory(GatedHeads):
    r"""\( M_t = \alpha_t M_{t-1} - \eta_t \sum_{i=t-c+1}^t \gamma_i \nabla \ell(M'_i; \phi^*(k_i), v_i) \), \( y_t =
    f(\phi^*(q_t); M_t) \) with \( \phi^*(q) \cdot \phi^*(k) = e^{s (q \cdot k - 1)} \) of unit vectors:
    DeepTransformer, SWDT and Dot of Atlas (Behrouz et al., arXiv 2505.23735); docs/memories/atlas.md.

    Raises:
        ValueError: an option is none of the choices, or sizes do not fit.
    """

    EXAMPLES = (
        {"num_attention_heads": 2, "chunk": 4},
        {
            "num_attention_heads": 4,
            "loss": "l2",
            "window": 3,
            "decay": False,
            "chunk": 5,
            "largest_step": 0.1,
            "initializer_range": 0.1,
        },
        {"num_attention_heads": 2, "network": "linear", "loss": "l2", "window": 6, "chunk": 3, "convolution": 0},
    )

    @dataclass(frozen=True)
    class Options:
        """`network` is `linear` or `mlp`, the latter 4 times as wide inside as a head; `loss` is `dot` or `l2`. Every
        token steps down the gradients of a `window` of so many, each taken at the start of its `chunk`. With `decay`
        older ones fade. Rates reach up to `largest_step`. `convolution` is over so many tokens, 0 without.
        """

        num_attention_heads: int
        network: str = "mlp"
        loss: str = "dot"
        window: int = 1
        decay: bool = True
        chunk: int = 16
        largest_step: float = 0.02
        convolution: int = 4
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        o, heads = options, self.heads
        check_choices(o, network=NETWORKS, loss=LOSSES)
        if min(o.window, o.chunk) < 1 or o.largest_step <= 0:
            raise ValueError("window and chunk have to be at least 1, largest_step above 0.")
        self.rates_proj = nn.Linear(common.hidden_size, (2 + o.decay) * heads, bias=True)
        self.sharpness = nn.Parameter(torch.empty(heads))
        self.read_scale = nn.Parameter(torch.empty(self.width))
        self.second = None
        if o.network != "linear":
            self.second = nn.Parameter(torch.empty(heads, EXPANSION * self.width, self.width))
        self.inner = Network(loss=Loss(o.loss))
        self.units = self.width if self.second is None else EXPANSION * self.width

    def initial_state(self) -> DeepAttentionState:
        return DeepAttentionState()

    def forward(
        self, x: Tensor, layout: Layout, state: DeepAttentionState | None, context: Context
    ) -> tuple[Tensor, DeepAttentionState | None]:
        o, wide = self.options, torch.promote_types(x.dtype, torch.float32)
        (queries, keys, values), tail = self.projected(x, layout, state)
        sharpness = self.sharpness.to(wide).exp()
        rate, gate, *decay = self.rates_proj(x).to(wide).transpose(1, 2).chunk(2 + o.decay, dim=1)
        gate, rate = gate.sigmoid(), o.largest_step * rate.sigmoid()
        log_decay = F.logsigmoid(-decay[0]) if o.decay else None
        if context.reads is not None:
            self.show(context, {"step": rate, "gate": gate, "kept": None if log_decay is None else log_decay.exp()})
        gate = gate / o.window
        read, after = deep_attention(
            self.second,
            unit(queries),
            unit(keys),
            values,
            gate,
            layout.segments(o.chunk, x.device),
            network=self.inner,
            window=torch.ones_like(gate[..., None]).expand(-1, -1, -1, o.window),
            rate=rate,
            log_decay=log_decay,
            scale=sharpness,
            shift=sharpness,
            start=layout.start,
            state=None if state is None else state.inner(),
        )
        if state is not None:
            state.keep(after, layout, tail)
        return self.answered(read, x, self.gate_proj(x), SMALLEST), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; the second map normal with 1 /
        sqrt(inputs), the kernel as sharp as attention's with keys of norm sqrt(width). At first hardly anything is
        forgotten, and rates and gates are half the largest; the paper says nothing of these."""
        super().reset_parameters(layer_index)
        if self.options.decay:
            with torch.no_grad():
                self.rates_proj.bias[2 * self.heads :] = -6.0
        nn.init.constant_(self.sharpness, 0.5 * math.log(self.width))
        if self.second is not None:
            nn.init.normal_(self.second, std=1 / math.sqrt(self.second.shape[1]))

    def _second_numbers(self) -> int:
        return 0 if self.second is None else self.second.numel()

    def flops(self, context_length: int) -> float:
        """Queries and keys against the pairs before their chunk, queries against those of their own; the second map's
        answers, the way back and its update; reads within a chunk."""
        o, chunk = self.options, min(self.options.chunk, context_length)
        pairs = (2 * mean_pairs(context_length, None) + chunk) * self.heads * (self.width + self.units)
        inner = self.units * self.width if self.second is not None else 0
        within = 2 * self.heads * (chunk + o.window) * (self.units + self.width) if inner else 0
        return super().flops(context_length) + 2 * pairs + 8 * self._second_numbers() + within

    def activation_bytes(self, element_size: int) -> float:
        o, d = self.options, self.common.hidden_size
        kept = 10 * d + self.heads * (2 * self.units + 8 * o.window) + 3 * self._second_numbers() / o.chunk
        return super().activation_bytes(element_size) + 4 * kept

    def numbers(self, context_length: int) -> int:
        window, heads = self.options.window, self.heads
        pairs = context_length * heads * (self.width + self.units + 2)
        older = 0 if self.second is None else (window - 1) * (self.units + self.width)
        return pairs + 2 * self._second_numbers() + heads * (older + 2 * (window + 1))
