"""The memories of Atlas: weights that learn from a window of tokens, of polynomials of keys, and by Muon."""

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
    check_deviation,
    init_map,
    linear_flops,
    nearest,
    register,
)
from mosaics.memories.fast_weights.common import ShortConvolution, rms_normed, unit
from mosaics.memories.fast_weights.inner import LearningState, Maps
from mosaics.ops.inner_loop import Loss, Network, inner_loop
from mosaics.ops.polynomial import polynomial

NETWORKS = ("linear", "mlp", "gated")
LOSSES = ("l2", "dot")
GATES = ("source", "place")
EXPANSION = 4  # the inner network is so many times as wide inside as a head


@register("omega")
class OmegaMemory(Memory):
    r"""\( S_t = \theta_t S_{t-1} - \sum_{i=t-c+1}^t \gamma^{(t)}_i \nabla \ell(W'_i; \phi(k_i), v_i) \),
    \( W_t = \alpha_t W_{t-1} + \eta_t N(S_t) \), \( y_t = f(\phi(q_t); W_t) \): the Omega rule of Atlas (Behrouz et
    al., arXiv 2505.23735) with polynomials \( \phi \) and Newton–Schulz N: OmegaNet, Atlas, Atlas++, DLA and SWLA;
    docs/memories/atlas.md.

    Raises:
        ValueError: an option is none of the choices, or sizes do not fit.
    """

    adapted = ("q_proj", "v_proj")
    EXAMPLES = (
        {"num_attention_heads": 4, "window": 3, "chunk": 4},
        {
            "num_attention_heads": 4,
            "network": "gated",
            "window": 2,
            "chunk": 5,
            "momentum": True,
            "orthogonal": 5,
            "largest_step": 0.1,
            "initializer_range": 0.1,
        },
        {
            "num_attention_heads": 2,
            "network": "linear",
            "loss": "dot",
            "degree": 1,
            "window": 2,
            "gates": "place",
            "chunk": 1,
            "convolution": 2,
        },
        {"num_attention_heads": 2, "loss": "dot", "degree": 1, "window": 1, "momentum": True, "chunk": 3},
    )

    @dataclass(frozen=True)
    class Options:
        """`network` is `linear`, `mlp` or `gated`, the latter with a residual and 4 times as wide inside as a head;
        keys and queries are taken to monomials up to `degree` (1: as they are). `loss` is `l2` or `dot`. The `window`
        has so many tokens, whose `gates` are of themselves (`source`) or of the place that looks back at them
        (`place`). Gradients are taken at the start of each `chunk` of tokens (1 is the recurrence); with `orthogonal`
        iterations of Newton–Schulz (5 is Muon's number; 0: none) a step has the size of the rate, whatever the error.
        Rates reach up to `largest_step`. `convolution` is over so many tokens, 0 without.
        """

        num_attention_heads: int
        network: str = "mlp"
        loss: str = "l2"
        degree: int = 2
        window: int = 8
        gates: str = "source"
        chunk: int = 16
        momentum: bool = False
        orthogonal: int = 0
        largest_step: float = 0.01
        convolution: int = 4
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        o, d, heads = options, common.hidden_size, options.num_attention_heads
        for name, known in (("network", NETWORKS), ("loss", LOSSES), ("gates", GATES)):
            if getattr(o, name) not in known:
                raise ValueError(f"{name} is {getattr(o, name)!r}; {nearest(getattr(o, name), known)}")
        if heads < 1 or d % heads:
            raise ValueError(
                f"hidden_size {d} is not a multiple of num_attention_heads {heads}; choose heads that divide it."
            )
        if min(o.degree, o.window, o.chunk) < 1 or min(o.convolution, o.orthogonal) < 0 or o.largest_step <= 0:
            raise ValueError("degree, window and chunk have to be at least 1, largest_step above 0.")
        check_deviation(o.initializer_range)
        self.heads, width = heads, d // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d, bias=common.bias) for _ in range(3))
        self.gate_proj, self.o_proj = (nn.Linear(d, d, bias=common.bias) for _ in range(2))
        self.convolution = ShortConvolution(3 * d, o.convolution) if o.convolution else None
        self.shares = [1, 1, *([1] if o.momentum else []), 1 if o.gates == "source" else o.window]
        self.rates_proj = nn.Linear(d, sum(self.shares) * heads, bias=True)
        if o.degree > 1:
            self.coefficient_roots = nn.Parameter(torch.empty(o.degree + 1))
        features = width if o.degree == 1 else math.comb(width + o.degree, o.degree)
        inner = [] if o.network == "linear" else [EXPANSION * width]
        self.maps = Maps(heads, [features, *inner, width], bias=False, beside=2 if o.network == "gated" else 1)
        self.read_scale = nn.Parameter(torch.empty(width))
        activation = "geglu" if o.network == "gated" else "gelu"
        self.inner = Network(activation, residual=o.network != "linear", loss=Loss(o.loss))

    def initial_state(self) -> LearningState:
        return self.maps.initial_state()

    def forward(
        self, x: Tensor, layout: Layout, state: LearningState | None, context: Context
    ) -> tuple[Tensor, LearningState | None]:
        o, wide, tail = self.options, torch.promote_types(x.dtype, torch.float32), None
        mixed = torch.cat([proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        if self.convolution is not None:
            mixed, tail = self.convolution(mixed, layout, None if state is None else state.tail)
        queries, keys, values = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(wide) for y in mixed.chunk(3, dim=-1)
        )
        queries, keys = unit(queries), unit(keys)
        if o.degree > 1:
            roots = self.coefficient_roots.to(wide)
            queries, keys = polynomial(queries, roots), polynomial(keys, roots)
        rates = self.rates_proj(x).to(wide).sigmoid().transpose(1, 2)
        rates = rates.split([self.heads * n for n in self.shares], dim=1)
        gates, window, watched = rates[-1] / o.window, None, None if context.reads is None else {}
        if o.gates == "place":
            window = gates.unflatten(1, (self.heads, -1)).transpose(2, 3)
            gates = torch.ones_like(gates[:, : self.heads])
        elif o.window > 1:
            window = torch.ones_like(gates[..., None]).expand(-1, -1, -1, o.window)
        read, after = inner_loop(
            list(self.maps.weights),
            queries,
            keys,
            values,
            gates,
            layout.segments(o.chunk, x.device),
            network=self.inner,
            decay=rates[1],
            momentum=rates[2] if o.momentum else None,
            window=window,
            rate=o.largest_step * rates[0],
            orthogonal=o.orthogonal,
            state=None if state is None else state.inner(),
            watched=watched,
        )
        if watched is not None:
            momentum = rates[2] if o.momentum else None
            shown = {"step": o.largest_step * rates[0], "forgotten": rates[1], "momentum": momentum}
            self.show(context, shown | watched)
        read = rms_normed(read, self.read_scale, self.common.norm_eps).to(x.dtype).transpose(1, 2).flatten(2)
        if state is not None:
            state.keep(after, tail)
        return self.o_proj(read * self.gate_proj(x)), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; coefficients 1/i!, as the paper.
        At first little is forgotten, and rates and gates are half the largest; the paper says nothing of these."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            init_map(linear, layer_index, self.options.initializer_range)
        with torch.no_grad():
            self.rates_proj.bias[self.heads : 2 * self.heads] = -4.0
            for number in range(self.options.degree + 1 if self.options.degree > 1 else 0):
                self.coefficient_roots[number] = 1 / math.sqrt(math.factorial(number))
        if self.convolution is not None:
            self.convolution.reset_parameters()
        self.maps.reset_parameters()
        nn.init.ones_(self.read_scale)

    def reach(self) -> tuple[int, None]:
        """What it learns later wears out what it learnt before."""
        return 1, None

    def flops(self, context_length: int) -> float:
        """Answers to key and query, the errors' way back, and the share of the chunk's update; reads within a chunk.
        With Newton–Schulz, the weights of every token."""
        o, numbers, chunk = self.options, self.maps.numbers(), min(self.options.chunk, context_length)
        tokens = chunk + o.window - 1
        pairs = 4 * tokens * sum(self.heads * sum(w.shape[1:]) for w in self.maps.weights)
        made = 0.0
        if o.orthogonal:
            made = 2 * (tokens + chunk) * numbers
            for number, (rows, columns) in enumerate(w.shape[1:] for w in self.maps.weights):
                halves = self.inner.halves(number, len(self.maps.weights))
                short, long = sorted((rows, columns // halves))
                made += 2 * self.heads * halves * o.orthogonal * short**2 * (2 * long + short)
        convolution = 0 if self.convolution is None else self.convolution.flops()
        return linear_flops(self) + 10 * numbers + pairs + made + convolution

    def activation_bytes(self, element_size: int) -> float:
        o, d = self.options, self.common.hidden_size
        channels = 10 * d + 4 * self.heads * sum(sum(w.shape[1:]) for w in self.maps.weights)
        kept = channels + 3 * self.maps.numbers() / o.chunk + 8 * self.heads * (o.chunk + o.window)
        return super().activation_bytes(element_size) + 4 * kept

    def state_bytes(self, context_length: int, element_size: int) -> int:
        if not context_length:
            return 0
        o, maps = self.options, self.maps.weights
        tail = max(o.convolution - 1, 0) * 3 * self.common.hidden_size * element_size
        older = (o.window - 1) * self.heads * sum(sum(w.shape[1:]) for w in maps)
        return (3 * self.maps.numbers() + older) * max(4, element_size) + tail
