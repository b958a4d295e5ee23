"""The memories of Atlas: weights that learn from a window of tokens, of polynomials of keys, and by Muon."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosaics.memories.contract import Common, Context, Layout, check_choices, register
from mosaics.memories.fast_weights.common import GatedHeads, unit
from mosaics.memories.fast_weights.inner import Learning, LearningState, Maps
from mosaics.ops.inner_loop import Loss, Network
from mosaics.ops.polynomial import polynomial

NETWORKS = ("linear", "mlp", "gated")
LOSSES = ("l2", "dot")
GATES = ("source", "place")
EXPANSION = 4  # the inner network is so many times as wide inside as a head


@register("omega")
class OmegaMemory(GatedHeads, Learning):
    r"""\( S_t = \theta_t S_{t-1} - \sum_{i=t-c+1}^t \gamma^{(t)}_i \nabla \ell(W'_i; \phi(k_i), v_i) \),
    \( W_t = \alpha_t W_{t-1} + \eta_t N(S_t) \), \( y_t = f(\phi(q_t); W_t) \): the Omega rule of Atlas (Behrouz et
    al., arXiv 2505.23735) with polynomials \( \phi \) and Newton–Schulz N: OmegaNet, Atlas, Atlas++, DLA and SWLA;
    docs/memories/atlas.md.

    Raises:
        ValueError: an option is none of the choices, or sizes do not fit.
    """

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
        o, heads, width = options, self.heads, self.width
        check_choices(o, network=NETWORKS, loss=LOSSES, gates=GATES)
        if min(o.degree, o.window, o.chunk) < 1 or o.orthogonal < 0 or o.largest_step <= 0:
            raise ValueError("degree, window and chunk have to be at least 1, largest_step above 0.")
        self.shares = [1, 1, *([1] if o.momentum else []), 1 if o.gates == "source" else o.window]
        self.rates_proj = nn.Linear(common.hidden_size, sum(self.shares) * heads, bias=True)
        if o.degree > 1:
            self.coefficient_roots = nn.Parameter(torch.empty(o.degree + 1))
        features = width if o.degree == 1 else math.comb(width + o.degree, o.degree)
        inner = [] if o.network == "linear" else [EXPANSION * width]
        self.maps = Maps(heads, [features, *inner, width], bias=False, beside=2 if o.network == "gated" else 1)
        self.read_scale = nn.Parameter(torch.empty(width))
        activation = "geglu" if o.network == "gated" else "gelu"
        self.inner = Network(activation, residual=o.network != "linear", loss=Loss(o.loss))

    def forward(
        self, x: Tensor, layout: Layout, state: LearningState | None, context: Context
    ) -> tuple[Tensor, LearningState | None]:
        o, wide = self.options, torch.promote_types(x.dtype, torch.float32)
        (queries, keys, values), tail = self.projected(x, layout, state)
        queries, keys = unit(queries), unit(keys)
        if o.degree > 1:
            roots = self.coefficient_roots.to(wide)
            queries, keys = polynomial(queries, roots), polynomial(keys, roots)
        rates = self.rates_proj(x).to(wide).sigmoid().transpose(1, 2)
        rates = rates.split([self.heads * n for n in self.shares], dim=1)
        gates, window = rates[-1] / o.window, None
        if o.gates == "place":
            window = gates.unflatten(1, (self.heads, -1)).transpose(2, 3)
            gates = torch.ones_like(gates[:, : self.heads])
        elif o.window > 1:
            window = torch.ones_like(gates[..., None]).expand(-1, -1, -1, o.window)
        read = self.learnt(
            [queries, keys, values],
            gates,
            layout.segments(o.chunk, x.device),
            state,
            tail,
            context,
            decay=rates[1],
            momentum=rates[2] if o.momentum else None,
            window=window,
            rate=o.largest_step * rates[0],
            orthogonal=o.orthogonal,
        )
        return self.answered(read, x, self.gate_proj(x)), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; coefficients 1/i!, as the paper.
        At first little is forgotten, and rates and gates are half the largest; the paper says nothing of these."""
        super().reset_parameters(layer_index)
        with torch.no_grad():
            self.rates_proj.bias[self.heads : 2 * self.heads] = -4.0
            for number in range(self.options.degree + 1 if self.options.degree > 1 else 0):
                self.coefficient_roots[number] = 1 / math.sqrt(math.factorial(number))
        self.maps.reset_parameters()

    def flops(self, context_length: int) -> float:
        """Answers to key and query, the errors' way back, and the share of the chunk's update; reads within a chunk.
        With Newton–Schulz, the weights of every token."""
        o, numbers, chunk = self.options, self.maps.numbers(), min(self.options.chunk, context_length)
        tokens = chunk + o.window - 1
        made = 0.0
        if o.orthogonal:
            made = 2 * (tokens + chunk) * numbers
            for number, (rows, columns) in enumerate(w.shape[1:] for w in self.maps.weights):
                halves = self.inner.halves(number, len(self.maps.weights))
                short, long = sorted((rows, columns // halves))
                made += 2 * self.heads * halves * o.orthogonal * short**2 * (2 * long + short)
        return super().flops(context_length) + 10 * numbers + self.pair_flops(tokens) + made

    def activation_bytes(self, element_size: int) -> float:
        o, d = self.options, self.common.hidden_size
        channels = 10 * d + 4 * self.heads * sum(sum(w.shape[1:]) for w in self.maps.weights)
        kept = channels + 3 * self.maps.numbers() / o.chunk + 8 * self.heads * (o.chunk + o.window)
        return super().activation_bytes(element_size) + 4 * kept

    def numbers(self, context_length: int) -> int:
        older = (self.options.window - 1) * self.heads * sum(sum(w.shape[1:]) for w in self.maps.weights)
        return super().numbers(context_length) + older
