"""The layers of Miras: weights that learn by any of several losses, and are kept in any of several ways."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import Common, Context, Layout, register
from mosaics.memories.fast_weights.common import GatedHeads, unit
from mosaics.memories.fast_weights.inner import Learning, LearningState, Maps
from mosaics.ops.inner_loop import Loss, Network, Retention

EXPANSION = 4  # the inner network is so many times as wide inside as a head


@register("miras")
class MirasMemory(GatedHeads, Learning):
    r"""\( A_t = \alpha_t A_{t-1} - \eta_t \nabla \ell(W'; k_t, v_t) \), \( W_t = R(A_t) \), \( y_t = f(q_t; W_t) \)
    with \( f(x) = x + LN(W_1\, gelu(W_2 x)) \) in each head, a loss and a retention R (Behrouz et al., arXiv
    2504.13173, section 5: Moneta, Yaad, Memora); docs/memories/miras.md.

    Raises:
        ValueError: an option is none of the choices, or sizes do not fit.
    """

    EXAMPLES = (
        {"num_attention_heads": 2, "chunk": 4, "loss": "l_p", "retention": "l_q"},
        {"num_attention_heads": 4, "chunk": 1, "loss": "huber", "depth": 1, "rank": 3, "base_step": 0.05},
        {
            "num_attention_heads": 2,
            "chunk": 5,
            "retention": "kl",
            "weight_scale": 2.0,
            "base_step": 0.1,
            "channels": False,
            "convolution": 2,
            "initializer_range": 0.1,
        },
        {
            "num_attention_heads": 2,
            "chunk": 3,
            "loss": "l_p",
            "loss_power": 1.5,
            "sharpness": 5.0,
            "retention": "l_q_minimiser",
            "retention_power": 2.5,
        },
        {
            "num_attention_heads": 2,
            "chunk": 4,
            "loss": "huber_coordinates",
            "retention": "elastic_net",
            "threshold": 0.01,
            "residual": False,
        },
    )

    @dataclass(frozen=True)
    class Options:
        """`loss` and `retention` are those of `mosaics.ops.inner_loop`, `loss_power` p and `retention_power` q of `l_p`
        and `l_q`, `sharpness` that of the smooth sign, `weight_scale` c of `kl` (None: the root of the inputs),
        `threshold` that of elastic nets. The network has `depth` maps, 4 times as wide inside as a head; without
        `residual` it is the maps alone. Gradients are taken at the start of each `chunk` of tokens (1 is the
        recurrence). Retention, step and delta are those of each channel of a head (of each head without `channels`),
        from the input through `rank` numbers; steps are `base_step` over a head's width, times a softplus.
        `convolution` is over so many tokens, 0 without.
        """

        num_attention_heads: int
        loss: str = "l2"
        loss_power: float = 3.0
        sharpness: float = 10.0
        retention: str = "l2"
        retention_power: float = 4.0
        weight_scale: float | None = None
        threshold: float = 1e-3
        depth: int = 2
        residual: bool = True
        chunk: int = 16
        channels: bool = True
        rank: int = 32
        base_step: float = 0.02
        convolution: int = 4
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        o, d, heads, width = options, common.hidden_size, self.heads, self.width
        if min(o.depth, o.chunk, o.rank) < 1 or o.base_step <= 0:
            raise ValueError("depth, chunk and rank have to be at least 1, base_step above 0.")
        smooth = {"sharpness": o.sharpness, "smoothing": 1e-6}
        loss = Loss(o.loss, power=o.loss_power, **(smooth if o.loss in ("l_p", "huber") else {}))
        self.inner = Network(residual=o.residual, normed=o.residual, loss=loss, eps=common.norm_eps)
        self.retention = Retention(o.retention, o.retention_power, o.weight_scale, threshold=o.threshold)
        rates = {"retain": o.channels, "step": o.channels}
        if loss.takes_delta:
            rates["delta"] = o.channels and not loss.of_the_norm
        self.rates = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(d, o.rank, bias=False), nn.Linear(o.rank, d if of_channels else heads))
                for name, of_channels in rates.items()
            }
        )
        self.maps = Maps(heads, [width, *[EXPANSION * width] * (o.depth - 1), width], bias=False)
        if o.residual:
            self.norm_scale, self.norm_shift = (nn.Parameter(torch.empty(heads, width)) for _ in range(2))
        self.read_scale = nn.Parameter(torch.empty(width))

    def forward(
        self, x: Tensor, layout: Layout, state: LearningState | None, context: Context
    ) -> tuple[Tensor, LearningState | None]:
        o, wide = self.options, torch.promote_types(x.dtype, torch.float32)
        (queries, keys, values), tail = self.projected(x, layout, state)
        rates = {
            name: proj(x).to(wide).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name, proj in self.rates.items()
        }
        norm = None
        if o.residual:
            norm = self.norm_scale[:, None].to(wide), self.norm_shift[:, None].to(wide)
        read = self.learnt(
            [unit(queries), unit(keys), values],
            o.base_step / self.width * F.softplus(rates["step"]),
            layout.segments(o.chunk, x.device),
            state,
            tail,
            context,
            retention=self.retention,
            decay=torch.sigmoid(-rates["retain"]),
            delta=F.softplus(rates["delta"]) if "delta" in rates else None,
            norm=norm,
        )
        return self.answered(read, x, self.gate_proj(x)), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike. At first little is forgotten and
        deltas are near 1; the paper says nothing of either."""
        super().reset_parameters(layer_index)
        first = {"retain": 6.0, "step": 0.0, "delta": math.log(math.e - 1)}
        for name, proj in self.rates.items():
            nn.init.constant_(proj[1].bias, first[name])
        # Of shares and of weights between 0 and 1, what is learnt are logarithms.
        self.maps.reset_parameters(1.0 if self.options.retention in ("kl", "logit") else None)
        if self.options.residual:
            nn.init.ones_(self.norm_scale)
            nn.init.zeros_(self.norm_shift)

    def undecayed_parameters(self) -> set[str]:
        return super().undecayed_parameters() | ({"norm_scale", "norm_shift"} if self.options.residual else set())

    def flops(self, context_length: int) -> float:
        """Answers to key and query, the errors' way back, and the share of the chunk's update; reads within a chunk.
        With a retention that is not linear, the weights of every token."""
        numbers, chunk = self.maps.numbers(), min(self.options.chunk, context_length)
        made = 0 if self.retention.linear else (2 * chunk + 10) * numbers
        return super().flops(context_length) + 10 * numbers + self.pair_flops(chunk) + made

    def activation_bytes(self, element_size: int) -> float:
        o, d = self.options, self.common.hidden_size
        inner = (o.depth - 1) * EXPANSION * d
        kept = 24 * d + 8 * inner + 8 * self.maps.numbers() / o.chunk
        kept += o.chunk * (d * (5 if o.channels else 1) + 4 * self.heads)
        return super().activation_bytes(element_size) + 4 * kept
