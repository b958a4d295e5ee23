"""Parallax: local linear attention whose probe is learned in the place of a regression."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mosaics.memories.attention.common import LocalLinearMemory
from mosaics.memories.contract import Common, Layout, register


@register("parallax")
class ParallaxMemory(LocalLinearMemory):
    r"""Position t reads \( \sum_{j \le t} p_j (1 - (k_j - \bar k) \cdot r_t)\, v_j \), p the softmax of \( q_t \cdot
    k_j / \sqrt{width} \) and \( r_t = W_R x_t \): Parallax (Zuo et al., arXiv 2605.29157),
    docs/memories/local-linear-attention.md.

    Without r it is softmax attention. As in the layer of flash-linear-attention, r is normed and turned like a query.

    Raises:
        ValueError: heads do not divide the width or each other, or the head width is odd.
    """

    adapted = ("q_proj", "r_proj", "v_proj")
    EXAMPLES = (
        {"num_attention_heads": 2},
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "rotary": False,
            "normed": True,
            "initializer_range": 0.1,
        },
    )

    def __init__(self, options: LocalLinearMemory.Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        self.r_proj = nn.Linear(common.hidden_size, self.heads * self.width, bias=common.bias)
        self.r_scale = self.scale()

    def asked(self, x: Tensor, layout: Layout) -> dict[str, Any]:
        return {"probe": self.placed(self.r_proj(x), self.r_scale, layout)}

    def products(self) -> int:
        """Logits, mean, the probe's, the read."""
        return 4
