"""Mixture-of-Memories: fast weights that every token writes to some of, and shared ones that all write to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    Read,
    State,
    check_choices,
    head_width,
    linear_flops,
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
from mosaics.memories.fast_weights.delta_rule import FastWeightState
from mosaics.ops.delta_rule import delta_rule

BALANCES = ("joint", "layers")


@dataclass
class MixtureState(State):
    """The states of the routed memories, `(batch, memories, ...)` in each tensor, and of the shared one; and how many
    tokens of the open document each of the routed has, `(batch, memories)`."""

    routed: FastWeightState
    shared: FastWeightState
    tokens: Tensor | None = None


@register("mom")
class MixtureOfMemories(FastWeights):
    r"""\( o_t = \sum_{m \in \mathrm{top}_k} g_t^m\, {S_t^m}^\top q_t^m + {S_t^0}^\top q_t^0 \) with \( g_t \) the k
    largest of \( \mathrm{softmax}(W x_t) \) over their sum: a token is written, by the gated delta rule, to the k
    memories that it is routed to and to a shared one (Du et al., arXiv 2502.13685); docs/memories/mom.md.

    Raises:
        ValueError: sizes do not fit, or the balance is none of the choices.
    """

    adapted = ("q_proj", "o_proj")
    EXAMPLES = (
        {"num_attention_heads": 2},
        {
            "num_attention_heads": 4,
            "memories": 3,
            "routed": 1,
            "single_maps": True,
            "key_width": 6,
            "value_width": 5,
            "convolution": 2,
            "balance": "layers",
            "balance_scale": 0.1,
            "initializer_range": 0.1,
        },
        {"num_attention_heads": 2, "memories": 3, "routed": 3, "shared": False, "balance": "layers"},
    )

    @dataclass(frozen=True)
    class Options:
        """A token goes to `routed` of `memories`, and with `shared` to one more that all tokens go to. Each has maps of
        its own for keys, values, strengths and decays, or all have those of `single_maps`.

        `key_width` and `value_width` are of a head (by default hidden size / heads), `convolution` is over so many
        tokens of a memory. The loss that evens out the use of the memories counts `balance_scale` times: `joint` is of
        all layers together, `layers` the mean of one for each layer and document (docs/memories/mom.md).
        """

        num_attention_heads: int
        memories: int = 4
        routed: int = 2
        shared: bool = True
        single_maps: bool = False
        key_width: int | None = None
        value_width: int | None = None
        convolution: int = 4
        balance: str = "joint"
        balance_scale: float = 0.01
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        o, d, heads, bias = options, common.hidden_size, options.num_attention_heads, common.bias
        self.heads, self.width = heads, head_width(d, heads, o.key_width)
        self.value_width = head_width(d, heads, o.value_width)
        if min(self.width, self.value_width, o.convolution) < 1:
            raise ValueError("key_width, value_width and convolution have to be at least 1.")
        if not 1 <= o.routed <= o.memories:
            raise ValueError(f"routed is {o.routed}; give from 1 to as many as there are memories, {o.memories}.")
        check_choices(o, balance=BALANCES)
        if o.balance_scale < 0:
            raise ValueError(f"balance_scale is {o.balance_scale}; give 0 or more.")
        keys, values = heads * self.width, heads * self.value_width
        self.widths = [keys, values, heads, heads]  # keys, values, strengths, decays
        sets = 1 if o.single_maps else o.memories + o.shared
        self.router = nn.Linear(d, o.memories, bias=False)
        self.q_proj, self.gate_proj = nn.Linear(d, keys, bias=bias), nn.Linear(d, values, bias=bias)
        self.pair_projs = nn.ModuleList(nn.Linear(d, sum(self.widths), bias=bias) for _ in range(sets))
        self.o_proj = nn.Linear(values, d, bias=bias)
        self.convolution = ShortConvolution(2 * keys + values, o.convolution)
        self.decay_rate, self.decay_bias = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.read_scale = nn.Parameter(torch.empty(self.value_width))

    def initial_state(self) -> MixtureState:
        return MixtureState(FastWeightState(), FastWeightState())

    def forward(
        self, x: Tensor, layout: Layout, state: MixtureState | None, context: Context
    ) -> tuple[Tensor, MixtureState | None]:
        o, before = self.options, state or self.initial_state()
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # a rounded choice would be another
            probability = F.linear(x.to(wide), self.router.weight.to(wide)).softmax(-1)
        if context.reads is not None:
            context.reads.append(Read(self.name, self.layer_index, maps={"routing": probability}))
        weight, which = probability.topk(o.routed, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        if self.training and o.balance_scale:
            self._balance(probability, weight, which, layout, context)
        chosen = torch.zeros_like(probability, dtype=torch.bool).scatter(-1, which, True).transpose(1, 2)
        subset = layout.subset(chosen, before.tokens)

        queries = self.q_proj(x)
        if o.single_maps:
            pairs = self.pair_projs[0](x)
            own = subset.gather(pairs)
        else:
            routed = zip(self.pair_projs, subset.gather(x).unbind(1), strict=False)
            own = torch.stack([proj(part) for proj, part in routed], dim=1)
            pairs = self.pair_projs[-1](x) if o.shared else None
        rows = FastWeightState(*(None if y is None else y.flatten(0, 1) for y in vars(before.routed).values()))
        read, rows = self._read(subset.gather(queries).flatten(0, 1), own.flatten(0, 1), subset.layout, rows)
        read = subset.at(read.unflatten(0, own.shape[:2]), which)
        read = (read * weight[..., None, None].to(read.dtype)).sum(2)
        shared = before.shared
        if o.shared:
            everything, shared = self._read(queries, pairs, layout, shared)
            read = read + everything
        read = rms_normed(read, self.read_scale, self.common.norm_eps).flatten(2) * F.silu(self.gate_proj(x))
        if state is not None:
            rows.map(lambda y: y.unflatten(0, own.shape[:2]))
            state.routed, state.shared, state.tokens = rows, shared, subset.tokens
        return self.o_proj(read), state

    def _read(
        self, queries: Tensor, pairs: Tensor, layout: Layout, state: FastWeightState
    ) -> tuple[Tensor, FastWeightState]:
        """What fast weights answer, `(rows, time, heads, value width)`, and how they are then."""
        keys, values, strength, decay = pairs.split(self.widths, dim=-1)
        inputs = torch.cat([queries, keys, values], dim=-1)
        convolved, tail = self.convolution(inputs, layout, state.tail)
        mixed = F.silu(convolved).split([self.widths[0], *self.widths[:2]], dim=-1)
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixed)
        wide = torch.promote_types(pairs.dtype, torch.float32)
        decay = -self.decay_rate.to(wide).exp() * F.softplus(decay.to(wide) + self.decay_bias.to(wide))
        read, weights = delta_rule(
            unit(queries) * self.width**-0.5,
            without_padding(unit(keys), layout),
            values,
            without_padding(decay.transpose(1, 2), layout),
            strength.sigmoid().transpose(1, 2),
            state.weights,
            start=layout.start,
        )
        return read.transpose(1, 2), FastWeightState(weights, tail)

    def _balance(self, probability: Tensor, weight: Tensor, which: Tensor, layout: Layout, context: Context) -> None:
        """Adds what this layer changes of the loss of the layers so far, so that the sum over all is that of all."""
        o = self.options
        picked = torch.zeros_like(probability).scatter(-1, which, 1.0)
        if o.balance == "layers":
            probability = torch.zeros_like(probability).scatter(-1, which, weight)
        document = torch.zeros_like(which[..., 0])  # of all rows together
        if o.balance == "layers":
            first = layout.is_first
            document = document + torch.arange(len(which), device=which.device)[:, None]
            if first is not None:
                first = first.clone()
                first[:, 0] = True
                document = first.flatten().cumsum(0).view(first.shape) - 1
        real = torch.ones_like(document, dtype=torch.bool) if layout.is_padding is None else ~layout.is_padding
        document, both = document[real], torch.stack([picked, probability], dim=-1)[real]
        count = int(document.max()) + 1 if document.numel() else 1
        sums = both.new_zeros(count, *both.shape[1:]).index_add(0, document, both)
        tokens = both.new_zeros(count).index_add(0, document, torch.ones_like(document, dtype=both.dtype))
        shares = sums / tokens.clamp(min=1)[:, None, None]
        if o.balance == "layers":
            now = shares.prod(-1).sum() / (tokens > 0).sum().clamp(min=1)
        else:
            now = shares[0]
        # Layer by layer: the sum so far, and of how many.
        name = f"mom {o.balance} {o.memories}"
        before, layers = context.stream.get(name), context.stream.get(f"{name} layers")
        total = now if before is None else before + now
        number = torch.ones((), device=now.device) if layers is None else layers + 1

        def loss(total: Tensor, number: Tensor) -> Tensor:
            mean = total / number
            return o.balance_scale * o.memories * (mean if o.balance == "layers" else mean.prod(-1).sum())

        added = loss(total, number)
        context.auxiliary_losses.append(added if before is None else added - loss(before, layers))
        context.stream |= {name: total, f"{name} layers": number}

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; decays as Mamba-2's."""
        super().reset_parameters(layer_index)
        reset_decay(self.decay_rate, self.decay_bias)
        nn.init.ones_(self.read_scale)

    def flops(self, context_length: int) -> float:
        """Of what a token goes to; the rows of the routed memories are filled up to the longest besides."""
        o = self.options
        active = o.routed + o.shared
        pairs = 2 * self.pair_projs[0].weight.numel()
        maps = linear_flops(self) - len(self.pair_projs) * pairs + (1 if o.single_maps else active) * pairs
        return maps + active * (7 * self.heads * self.width * self.value_width + self.convolution.flops())

    def activation_bytes(self, element_size: int) -> float:
        """As measured, with memories that are used alike."""
        o = self.options
        active = o.routed + o.shared
        channels = 2 * self.widths[0] + self.widths[1]
        maps = (3 + active) * self.common.hidden_size + 3 * self.widths[1] + active * sum(self.widths)
        return element_size * maps + active * 4 * (12 * channels + self.heads * 4 * 64)

    def state_bytes(self, context_length: int, element_size: int) -> int:
        if not context_length:
            return 0
        o, channels = self.options, 2 * self.widths[0] + self.widths[1]
        tail = (o.convolution - 1) * channels * element_size
        weights = self.heads * self.width * self.value_width * max(4, element_size)
        return (o.memories + o.shared) * (weights + tail) + 8 * o.memories
