"""Linear attention, retention, GLA, DeltaNet, Gated DeltaNet and Kimi Delta Attention: one memory with options."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    State,
    check_choices,
    head_width,
    register,
)
from mosaics.memories.fast_weights.common import (
    FastWeights,
    ShortConvolution,
    reset_decay,
    rms_normed,
    unit,
    without_padding,
)
from mosaics.ops.delta_rule import WRITES, delta_rule
from mosaics.ops.rotary import frequencies, rotated

DECAYS = ("none", "fixed", "head", "channel", "low_rank")
FEATURES = ("none", "silu", "elu")
GATES = ("none", "silu", "sigmoid")
GATE_NORM = 16  # of GLA: the logarithm of a decay is log sigmoid(...) / 16


@dataclass
class FastWeightState(State):
    """The weights `(batch, heads, width, value width)` in float32 or wider, and the last inputs of the convolutions
    `(batch, size - 1, channels)`."""

    weights: Tensor | None = None
    tail: Tensor | None = None


@register("delta_rule")
class DeltaRuleMemory(FastWeights):
    r"""A matrix for each head, which every token corrects or adds to: \( S_t = \tilde S_t + \beta_t k_t (v_t - \tilde
    S_t^\top k_t)^\top \), \( y_t = S_t^\top q_t / \sqrt{d_k} \); docs/memories/delta-rule.md has the systems.

    Raises:
        ValueError: an option is none of the choices, sizes do not fit, or rotary positions have an odd width.
    """

    EXAMPLES = (
        {
            "num_attention_heads": 2,
            "write": "delta",
            "decay": "head",
            "unit_keys": True,
            "convolution": 4,
            "gate": "silu",
        },
        {"num_attention_heads": 2, "feature": "elu", "normalised": True, "read_norm": False},
        {"num_attention_heads": 4, "decay": "fixed", "rotary": True, "gate": "silu", "value_width": 6},
        {
            "num_attention_heads": 2,
            "decay": "low_rank",
            "rank": 3,
            "key_width": 6,
            "gate": "silu",
            "initializer_range": 0.1,
        },
        {
            "num_attention_heads": 2,
            "write": "delta",
            "decay": "channel",
            "unit_keys": True,
            "convolution": 2,
            "feature": "silu",
            "gate": "sigmoid",
            "rank": 5,
        },
    )

    @dataclass(frozen=True)
    class Options:
        """What tells the systems apart.

        `key_width` and `value_width` are of a head (by default hidden size / heads). `write` is `delta` or `hebbian`,
        `decay` `none`, `fixed` (1 - 2^(-5-h), RetNet), `head` (Mamba-2's and Gated DeltaNet's), `channel` (KDA's) or
        `low_rank` (GLA's); maps of the last two go through `rank`. `convolution` is over so many tokens, 0 without;
        `feature` is applied to queries, keys and (but for `elu`, which is elu + 1) values; `unit_keys` makes keys and
        queries unit vectors. `normalised` divides a read by the sum of its weights (linear attention); `read_norm` is
        an RMS norm of every head's read, `gate` of what it is multiplied by.
        """

        num_attention_heads: int
        key_width: int | None = None
        value_width: int | None = None
        write: str = "hebbian"
        decay: str = "none"
        rank: int = 16
        convolution: int = 0
        feature: str = "none"
        unit_keys: bool = False
        normalised: bool = False
        rotary: bool = False
        read_norm: bool = True
        gate: str = "none"
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        o, d = options, common.hidden_size
        check_choices(o, write=WRITES, decay=DECAYS, feature=FEATURES, gate=GATES)
        heads = o.num_attention_heads
        self.heads, self.width = heads, head_width(d, heads, o.key_width)
        self.value_width = head_width(d, heads, o.value_width)
        sizes = {"key_width": o.key_width, "value_width": o.value_width, "rank": o.rank}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; give at least 1.")
        if o.rotary and self.width % 2:
            raise ValueError(f"A head's keys are {self.width} wide; rotary positions need an even width.")
        keys, values, bias = heads * self.width, heads * self.value_width, common.bias
        self.q_proj, self.k_proj = nn.Linear(d, keys, bias=bias), nn.Linear(d, keys, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(d, values, bias=bias), nn.Linear(values, d, bias=bias)
        self.convolution = ShortConvolution(2 * keys + values, o.convolution) if o.convolution else None
        self.strength_proj = nn.Linear(d, heads, bias=bias) if o.write == "delta" else None
        self.gate_proj = nn.Linear(d, values, bias=bias) if o.gate != "none" else None
        if o.read_norm:
            self.read_scale = nn.Parameter(torch.empty(self.value_width))
        if o.decay == "head":
            self.decay_proj = nn.Linear(d, heads, bias=False)
        elif o.decay in ("channel", "low_rank"):
            self.decay_proj = nn.Sequential(nn.Linear(d, o.rank, bias=False), nn.Linear(o.rank, keys, bias=False))
        if o.decay in ("head", "channel"):
            self.decay_rate = nn.Parameter(torch.empty(heads))
        if o.decay in ("head", "channel", "low_rank"):
            self.decay_bias = nn.Parameter(torch.empty(heads if o.decay == "head" else keys))

    def initial_state(self) -> FastWeightState:
        return FastWeightState()

    def forward(
        self, x: Tensor, layout: Layout, state: FastWeightState | None, context: Context
    ) -> tuple[Tensor, FastWeightState | None]:
        o = self.options
        mixed = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        tail = None
        if self.convolution is not None:
            widths = [part.shape[-1] for part in mixed]
            convolved, tail = self.convolution(torch.cat(mixed, dim=-1), layout, None if state is None else state.tail)
            mixed = F.silu(convolved).split(widths, dim=-1)
        elif o.feature == "silu":
            mixed = [F.silu(part) for part in mixed]
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixed)
        if o.feature == "elu":
            queries, keys = F.elu(queries) + 1, F.elu(keys) + 1
        if o.rotary:
            wide = torch.promote_types(queries.dtype, torch.float32)
            angles, _ = frequencies(self.width, self.common.rotary_base, device=x.device, dtype=wide)
            position = layout.position(x.device)
            queries, keys = rotated(queries, position, angles), rotated(keys, position, angles)
        if o.unit_keys:
            queries, keys = unit(queries), unit(keys)
        queries, keys = queries * self.width**-0.5, without_padding(keys, layout)
        if o.normalised:  # what the weights sum to is what is read of a 1
            values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        strength = None if self.strength_proj is None else self.strength_proj(x).sigmoid().transpose(1, 2)
        decay = self._log_decay(x, layout)
        weights = None if state is None else state.weights
        read, weights = delta_rule(
            queries, keys, values, decay, strength, weights, start=layout.start, write=o.write
        )  # fmt: skip
        if context.reads is not None:
            self.show(context, {"strength": strength, "decay": None if decay is None else decay.exp()})
        if o.normalised:
            read, total = read[..., :-1], read[..., -1:]
            read = read / (total + 1e-10)
        if o.read_norm:
            read = rms_normed(read, self.read_scale, self.common.norm_eps)
        read = read.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            read = read * (F.silu(gate) if o.gate == "silu" else gate.sigmoid())
        if state is not None:
            state.weights, state.tail = weights, tail
        return self.o_proj(read), state

    def _log_decay(self, x: Tensor, layout: Layout) -> Tensor | None:
        """`(batch, heads, time)`, or `(batch, heads, time, width)`; 0 at padding."""
        kind, wide = self.options.decay, torch.promote_types(x.dtype, torch.float32)
        if kind == "none":
            return None
        if kind == "fixed":
            numbers = torch.arange(self.heads, device=x.device, dtype=wide)
            decay = torch.log1p(-(2.0 ** (-5 - numbers)))[:, None].expand(x.shape[0], -1, x.shape[1])
            return without_padding(decay, layout)
        raw = self.decay_proj(x).to(wide) + self.decay_bias.to(wide)
        if kind == "low_rank":
            decay = F.logsigmoid(raw) / GATE_NORM
        else:
            rates = self.decay_rate.to(wide).exp()
            rates = rates if kind == "head" else rates.repeat_interleave(self.width)
            decay = -rates * F.softplus(raw)
        decay = decay.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return without_padding(decay[..., 0] if kind == "head" else decay, layout)

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; decays as their papers say."""
        super().reset_parameters(layer_index)
        if self.options.read_norm:
            nn.init.ones_(self.read_scale)
        if self.options.decay == "low_rank":
            nn.init.zeros_(self.decay_bias)
        elif self.options.decay in ("head", "channel"):
            reset_decay(self.decay_rate, self.decay_bias)

    def flops(self, context_length: int) -> float:
        read = 2 + 2 + 2 * (self.options.write == "delta") + (self.options.decay != "none")
        return super().flops(context_length) + read * self.numbers(context_length)

    def activation_bytes(self, element_size: int) -> float:
        channels = self.heads * (2 * self.width + self.value_width)
        of_channels = self.options.decay in ("channel", "low_rank")
        pairs = self.heads * (16 * self.width if of_channels else 4 * 64)
        return super().activation_bytes(element_size) + 4 * (4 * channels + pairs)

    def numbers(self, context_length: int) -> int:
        return self.heads * self.width * (self.value_width + self.options.normalised)
