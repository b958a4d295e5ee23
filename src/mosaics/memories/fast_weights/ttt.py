"""TTT-Linear and TTT-MLP: weights that take a step of gradient descent with every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import Common, Context, Layout, check_choices, register
from mosaics.memories.fast_weights.common import ShortConvolution
from mosaics.memories.fast_weights.inner import Learning, LearningState, Maps
from mosaics.ops.inner_loop import Loss, Network
from mosaics.ops.rotary import frequencies, rotated

NETWORKS = ("linear", "mlp")
ROTARY_BASE = 10000.0  # positions are those in a chunk


@register("ttt")
class TTTMemory(Learning):
    r"""\( W_t = W' - \rho_t \sum_{s \le t} \theta_s \nabla \ell_s(W') \), \( y_t = q_t + LN(f(q_t; W_t)) \), where f is
    a linear map or an MLP and \( \ell = \frac12 \|LN(f(k)) - (v - k)\|^2 \) (Sun et al., arXiv 2407.04620, and the
    authors' code, which decides where both differ; docs/memories/ttt.md).

    Raises:
        ValueError: an option is none of the choices, or sizes do not fit.
    """

    EXAMPLES = (
        {"num_attention_heads": 2, "chunk": 4},
        {
            "num_attention_heads": 4,
            "network": "mlp",
            "chunk": 5,
            "base_rate": 0.1,
            "convolution": 3,
            "gate": True,
            "initializer_range": 0.1,
        },
    )

    @dataclass(frozen=True)
    class Options:
        """`network` is `linear` or `mlp` (4 times as wide inside). Gradients are taken at the start of each `chunk` of
        tokens. `base_rate` is the largest inner learning rate (1 for the linear one and 0.1 for the MLP in the paper).
        With a `convolution` over so many tokens, queries and keys come from one map through one convolution each (the
        authors' Mamba backbone); `gate` multiplies what was read with gelu of a map of the input.
        """

        num_attention_heads: int
        network: str = "linear"
        chunk: int = 16
        base_rate: float = 1.0
        convolution: int = 0
        gate: bool = False
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        o, d, heads = options, common.hidden_size, options.num_attention_heads
        check_choices(o, network=NETWORKS)
        if heads < 1 or d % (2 * heads):
            raise ValueError(f"hidden_size {d} is not a multiple of twice num_attention_heads {heads}.")
        if o.chunk < 1 or o.base_rate <= 0:
            raise ValueError("chunk has to be at least 1, and base_rate above 0.")
        self.heads, self.width = heads, d // heads
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=common.bias) for _ in range(3))
        if o.convolution:
            self.q_convolution, self.k_convolution = (ShortConvolution(d, o.convolution, bias=True) for _ in range(2))
        else:
            self.k_proj = nn.Linear(d, d, bias=common.bias)
        self.gate_proj = nn.Linear(d, d, bias=common.bias) if o.gate else None
        self.rate_proj = nn.Linear(d, heads, bias=True)
        self.place_rates = nn.Parameter(torch.empty(o.chunk))
        inner = [] if o.network == "linear" else [4 * self.width]
        self.maps = Maps(heads, [self.width, *inner, self.width], bias=True)
        self.norm_scale, self.norm_shift = (nn.Parameter(torch.empty(heads, self.width)) for _ in range(2))
        self.read_scale, self.read_shift = (nn.Parameter(torch.empty(d)) for _ in range(2))
        self.inner = Network("gelu_tanh", bias=True, residual=True, normed=True, loss=Loss(half=True))

    def forward(
        self, x: Tensor, layout: Layout, state: LearningState | None, context: Context
    ) -> tuple[Tensor, LearningState | None]:
        o, wide = self.options, torch.promote_types(x.dtype, torch.float32)
        tail = None
        if o.convolution:
            shared = self.q_proj(x)
            old = None if state is None else state.tail
            queries, tail = self.q_convolution(shared, layout, old)
            keys, _ = self.k_convolution(shared, layout, old)
        else:
            queries, keys = self.q_proj(x), self.k_proj(x)
        queries, keys, values = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(wide) for y in (queries, keys, self.v_proj(x))
        )
        segments = layout.segments(o.chunk, x.device)
        angles, _ = frequencies(self.width, ROTARY_BASE, device=x.device, dtype=wide)
        queries, keys = (_turned(y, segments.position, angles) for y in (queries, keys))
        step = o.base_rate * self.rate_proj(x).to(wide).sigmoid().transpose(1, 2) / self.width
        places = torch.arange(1, o.chunk + 1, device=x.device, dtype=wide)
        scale = (1 / places + self.place_rates.to(wide)).clamp(min=0)
        norm = self.norm_scale[:, None].to(wide), self.norm_shift[:, None].to(wide)
        read = self.learnt([queries, keys, values], step, segments, state, tail, context, norm=norm, scale=scale)
        read = read.transpose(1, 2).flatten(2)
        read = _layer_normed(read, self.read_scale.to(wide), self.read_shift.to(wide)).to(x.dtype)
        if self.gate_proj is not None:
            read = F.gelu(self.gate_proj(x), approximate="tanh") * read
        return self.o_proj(read), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; what is inside as the authors."""
        self.reset_maps(layer_index)
        nn.init.normal_(self.rate_proj.weight, std=0.02)
        for convolution in self.convolutions():
            convolution.reset_parameters()
        self.maps.reset_parameters(0.02)
        nn.init.zeros_(self.place_rates)
        for scale, shift in ((self.norm_scale, self.norm_shift), (self.read_scale, self.read_shift)):
            nn.init.ones_(scale)
            nn.init.zeros_(shift)

    def undecayed_parameters(self) -> set[str]:
        return super().undecayed_parameters() | {"norm_scale", "norm_shift"}

    def flops(self, context_length: int) -> float:
        """Answers to key and query, the errors' way back, and the share of the chunk's update; reads within a chunk."""
        numbers = self.maps.numbers()
        pairs = 4 * min(self.options.chunk, context_length) * (numbers // self.width)
        return super().flops(context_length) + 8 * numbers + pairs

    def activation_bytes(self, element_size: int) -> float:
        d = self.common.hidden_size * (1 if self.options.network == "linear" else 6)
        kept = 24 * d + 5 * self.maps.numbers() / self.options.chunk + 4 * self.heads * self.options.chunk
        return super().activation_bytes(element_size) + 4 * kept


def _turned(x: Tensor, position: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions of the pairs (2 i, 2 i + 1), as the authors have them."""
    halves = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    first, second = rotated(halves, position, angles).chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def _layer_normed(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * scale + shift
