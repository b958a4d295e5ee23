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
    Memory,
    Pairs,
    State,
    check_deviation,
    init_map,
    linear_flops,
    mean_pairs,
    nearest,
    register,
)
from mosaics.memories.fast_weights.atlas import EXPANSION, LOSSES
from mosaics.memories.fast_weights.common import ShortConvolution, rms_normed, unit
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
class DeepAttentionMemory(Memory):
    r"""\( M_t = \alpha_t M_{t-1} - \eta_t \sum_{i=t-c+1}^t \gamma_i \nabla \ell(M'_i; \phi^*(k_i), v_i) \), \( y_t =
    f(\phi^*(q_t); M_t) \) with \( \phi^*(q) \cdot \phi^*(k) = e^{s (q \cdot k - 1)} \) of unit vectors:
    DeepTransformer, SWDT and Dot of Atlas (Behrouz et al., arXiv 2505.23735); docs/memories/atlas.md.

    Raises:
        ValueError: an option is none of the choices, or sizes do not fit.
    """

    adapted = ("q_proj", "v_proj")
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
        o, d, heads = options, common.hidden_size, options.num_attention_heads
        for name, known in (("network", NETWORKS), ("loss", LOSSES)):
            if getattr(o, name) not in known:
                raise ValueError(f"{name} is {getattr(o, name)!r}; {nearest(getattr(o, name), known)}")
        if heads < 1 or d % heads:
            raise ValueError(
                f"hidden_size {d} is not a multiple of num_attention_heads {heads}; choose heads that divide it."
            )
        if min(o.window, o.chunk) < 1 or o.convolution < 0 or o.largest_step <= 0:
            raise ValueError("window and chunk have to be at least 1, convolution 0 or more, largest_step above 0.")
        check_deviation(o.initializer_range)
        self.heads, self.width = heads, d // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d, bias=common.bias) for _ in range(3))
        self.gate_proj, self.o_proj = (nn.Linear(d, d, bias=common.bias) for _ in range(2))
        self.convolution = ShortConvolution(3 * d, o.convolution) if o.convolution else None
        self.rates_proj = nn.Linear(d, (2 + o.decay) * heads, bias=True)
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
        o, wide, tail = self.options, torch.promote_types(x.dtype, torch.float32), None
        mixed = torch.cat([proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        if self.convolution is not None:
            mixed, tail = self.convolution(mixed, layout, None if state is None else state.tail)
        queries, keys, values = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(wide) for y in mixed.chunk(3, dim=-1)
        )
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
        read = rms_normed(read, self.read_scale, SMALLEST).to(x.dtype).transpose(1, 2).flatten(2)
        if state is not None:
            state.keep(after, layout, tail)
        return self.o_proj(read * self.gate_proj(x)), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; the second map normal with 1 /
        sqrt(inputs), the kernel as sharp as attention's with keys of norm sqrt(width). At first hardly anything is
        forgotten, and rates and gates are half the largest; the paper says nothing of these."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            init_map(linear, layer_index, self.options.initializer_range)
        if self.options.decay:
            with torch.no_grad():
                self.rates_proj.bias[2 * self.heads :] = -6.0
        nn.init.constant_(self.sharpness, 0.5 * math.log(self.width))
        if self.convolution is not None:
            self.convolution.reset_parameters()
        if self.second is not None:
            nn.init.normal_(self.second, std=1 / math.sqrt(self.second.shape[1]))
        nn.init.ones_(self.read_scale)

    def reach(self) -> tuple[int, None]:
        """What it learns later wears out what it learnt before."""
        return 1, None

    def _second_numbers(self) -> int:
        return 0 if self.second is None else self.second.numel()

    def flops(self, context_length: int) -> float:
        """Queries and keys against the pairs before their chunk, queries against those of their own; the second map's
        answers, the way back and its update; reads within a chunk."""
        o, chunk = self.options, min(self.options.chunk, context_length)
        pairs = (2 * mean_pairs(context_length, None) + chunk) * self.heads * (self.width + self.units)
        inner = self.units * self.width if self.second is not None else 0
        within = 2 * self.heads * (chunk + o.window) * (self.units + self.width) if inner else 0
        convolution = 0 if self.convolution is None else self.convolution.flops()
        return linear_flops(self) + 2 * pairs + 8 * self._second_numbers() + within + convolution

    def activation_bytes(self, element_size: int) -> float:
        o, d = self.options, self.common.hidden_size
        kept = 10 * d + self.heads * (2 * self.units + 8 * o.window) + 3 * self._second_numbers() / o.chunk
        return super().activation_bytes(element_size) + 4 * kept

    def state_bytes(self, context_length: int, element_size: int) -> int:
        if not context_length:
            return 0
        o, heads = self.options, self.heads
        pairs = context_length * heads * (self.width + self.units + 2)
        older = 0 if self.second is None else (o.window - 1) * (self.units + self.width)
        numbers = pairs + 2 * self._second_numbers() + heads * (older + 2 * (o.window + 1))
        tail = max(o.convolution - 1, 0) * 3 * self.common.hidden_size * element_size
        return numbers * max(4, element_size) + tail
