"""The contextual memory of Memory Mosaics v1: fixed decays, a fixed bandwidth, all pairs before a position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosaics.memories.contract import Common, Context, Layout, head_width, register
from mosaics.memories.mosaic.common import ContextualMemory, ContextualState, KeyState, leaky_keys, widened
from mosaics.ops.kernel_regression import Bandwidth

SPEED = 10.0  # v1 keeps its scalars divided by 10, so that they learn ten times as fast


class LeakyKeys(nn.Module):
    """Unit keys of a leaky average with one fixed decay for each head, and the bandwidth that goes with them.

    With λ = 10 |p| and k̃ = W x: k̄_t = Σ_{s ≤ t} exp(-λ (t - s)) k̃_s, k_t = k̄_t / (‖k̄_t‖ + eps), and the bandwidth is
    exp(20 β), clamped (Memory Mosaics v1, section 5: keys exp(10 β) k_t on both sides).

    Args:
        common: what belongs to the whole model.
        heads: number of heads.
        eps: added to the norm.
        max_log_bandwidth: the clamp of the bandwidth's logarithm.

    Raises:
        ValueError: the width is not a multiple of the number of heads, or eps is negative.
    """

    def __init__(self, common: Common, heads: int, eps: float, max_log_bandwidth: float) -> None:
        super().__init__()
        head_width(common.hidden_size, heads)
        if eps < 0:
            raise ValueError(f"unit_norm_eps is {eps}; give 0 or more.")
        self.heads, self.eps, self.max_log_bandwidth = heads, eps, max_log_bandwidth
        self.proj = nn.Linear(common.hidden_size, common.hidden_size, bias=common.bias)
        self.decay = nn.Parameter(torch.empty(heads))  # p
        self.scale = nn.Parameter(torch.empty(heads))  # beta

    def forward(self, x: Tensor, layout: Layout, state: KeyState | None) -> Tensor:
        """Unit keys `(batch, heads, time, width)` of `x` `(batch, time, d)`; `state` is changed in place."""
        raw = self.proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return leaky_keys(raw, *self.recurrence(x), layout, state, self.eps)

    def recurrence(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of gates, all 0, and of decays, `(batch, heads, time)`."""
        log_decay = (-SPEED * widened(self.decay).abs())[:, None].expand(x.shape[0], self.heads, x.shape[1])
        return torch.zeros_like(log_decay), log_decay

    def bandwidth(self) -> Bandwidth:
        """The same for every number of pairs."""
        return Bandwidth((2 * SPEED * widened(self.scale)).clamp(max=self.max_log_bandwidth).exp())

    def reset_parameters(self, initializer_range: float | None) -> None:
        """Decays λ from 0.5 to 5 over the heads, a bandwidth of e²; the map as `reset_map`."""
        reset_map(self.proj, initializer_range)
        with torch.no_grad():
            self.decay.copy_(torch.linspace(0.5, 5, self.heads) / SPEED)
        nn.init.constant_(self.scale, 1 / SPEED)


def reset_map(linear: nn.Linear, initializer_range: float | None, sum_over_layers: int | None = None) -> None:
    """Normal weights and no bias, as v1 starts.

    Args:
        linear: the map.
        initializer_range: standard deviation; None is 1 / sqrt(inputs), as the authors' library.
        sum_over_layers: the number of layers, for a map whose output is added to the residual stream: the variance is
            divided by it, and by 2 more with a given range, as the authors' nano version (which counts both steps).
    """
    std = 1 / math.sqrt(linear.in_features) if initializer_range is None else initializer_range
    if sum_over_layers is not None:
        std /= math.sqrt(sum_over_layers if initializer_range is None else 2 * sum_over_layers)
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


@register("leaky_contextual")
class LeakyContextualMemory(ContextualMemory):
    """Reads the pairs 1 ... t-1 at position t (Memory Mosaics v1, arXiv 2405.06394, section 5).

    Keys are those of `LeakyKeys`; values are exp(10 g) times the unit vector of c ṽ_t + (1 - c) ṽ_{t+1}.

    Raises:
        ValueError: the width is not a multiple of the number of heads, or eps is negative.
    """

    shared_options = ContextualMemory.shared_options | {"unit_norm_eps"}
    adapted = ("key_extractor.proj", "value_proj")
    EXAMPLES = (
        {"num_attention_heads": 2},
        {
            "num_attention_heads": 4,
            "max_log_bandwidth": 3.0,
            "unit_norm_eps": 0.1,
            "initializer_range": 0.1,
        },
    )

    @dataclass(frozen=True)
    class Options:
        """`num_attention_heads` heads; what the authors' two versions differ in has the values of their library, with
        those of their nano version in brackets.

        `max_log_bandwidth` clamps the bandwidth's logarithm (2 ln 65535), `unit_norm_eps` is added to the norms of keys
        and values (1e-10), `initializer_range` is the standard deviation of the maps at the start, None for
        1 / sqrt(inputs) (0.02).
        """

        num_attention_heads: int
        max_log_bandwidth: float = 10.0
        unit_norm_eps: float = 0.0
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        self.key_extractor = LeakyKeys(common, self.heads, options.unit_norm_eps, options.max_log_bandwidth)
        self.unit_norm_eps = options.unit_norm_eps

    def delay(self, context: Context) -> int:
        return 1

    def bandwidth(self) -> Bandwidth:
        return self.key_extractor.bandwidth()

    def keys(self, source: Tensor, layout: Layout, state: ContextualState | None) -> Tensor:
        return self.key_extractor(source, layout, state)

    def recurrence(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self.key_extractor.recurrence(source)

    def value_length(self) -> Tensor:
        return (SPEED * widened(self.value_scale)).exp()

    def reset_parameters(self, layer_index: int) -> None:
        """As the authors' library, or their nano version where `initializer_range` is set."""
        deviation = self.options.initializer_range
        self.key_extractor.reset_parameters(deviation)
        reset_map(self.value_proj, deviation)
        reset_map(self.out_proj, deviation, self.common.num_layers)
        nn.init.uniform_(self.value_mix)
        nn.init.constant_(self.value_scale, -0.5 / SPEED)
