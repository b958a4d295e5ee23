"""Local linear attention: a ridge regression of values on keys around every query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.attention.common import LocalLinearMemory
from mosaics.memories.contract import Common, Layout, register
from mosaics.ops.local_linear import ITERATIONS


@register("lla")
class LocalLinearAttentionMemory(LocalLinearMemory):
    r"""Position t reads the intercept of \( \min_{b, W} \sum_{j \le t} p_j \|v_j - b - W (k_j - q_t)\|^2 + \lambda
    \|W\|^2 \), p the softmax of \( q_t \cdot k_j / \sqrt{width} \): local linear attention (Zuo et al., arXiv
    2510.01450), docs/memories/local-linear-attention.md.

    The regressions are solved by conjugate gradients; `read_weights` says what was left unsolved of each.

    Raises:
        ValueError: heads do not divide the width or each other, the head width is odd, or there are no iterations or
            no ridge.
    """

    EXAMPLES = (
        {"num_attention_heads": 2},
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "rotary": False,
            "normed": False,
            "iterations": 6,
            "initial_ridge": 0.3,
            "initializer_range": 0.1,
        },
    )

    @dataclass(frozen=True)
    class Options(LocalLinearMemory.Options):
        """Heads for queries and (fewer, shared) for keys and values. With `rotary` both know their positions; `normed`
        ones have a root mean square of 1 in each head, times a scale that is learned. The ridge, learned for each
        head, begins with `initial_ridge` (of weights whose sum is 1); each regression gets so many `iterations` of
        conjugate gradients, forwards and backwards. `initializer_range` is the standard deviation of the maps at the
        start; None for that of Memory Mosaics v2.
        """

        normed: bool = True
        initial_ridge: float = 1.0
        iterations: int = ITERATIONS

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        if options.iterations < 1 or options.initial_ridge <= 0:
            raise ValueError(
                f"lla has {options.iterations} iterations and begins with a ridge of {options.initial_ridge}; give at "
                "least 1, and a ridge above 0."
            )
        self.ridge = nn.Parameter(torch.empty(self.heads))

    def asked(self, x: Tensor, layout: Layout) -> dict[str, Any]:
        ridge = F.softplus(self.ridge.to(torch.promote_types(x.dtype, torch.float32)))
        return {"ridge": ridge, "iterations": self.options.iterations}

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; the paper's are not known."""
        super().reset_parameters(layer_index)
        begin = self.options.initial_ridge
        nn.init.constant_(self.ridge, begin + math.log(-math.expm1(-begin)))  # the inverse of softplus

    def products(self) -> int:
        """Logits, mean, two in each iteration, two for the residual, the read."""
        return 5 + 2 * self.options.iterations
