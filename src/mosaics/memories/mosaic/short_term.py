"""The short-term memory of Memory Mosaics v2: the pairs of the last few positions."""

from __future__ import annotations

from dataclasses import dataclass

from mosaics.memories.contract import Common, Context, register
from mosaics.memories.mosaic.common import GatedContextualMemory


@register("short_term")
class ShortTermMemory(GatedContextualMemory):
    """Holds the pairs t-h+1 ... t-1 at position t (Memory Mosaics v2, equation 10).

    Raises:
        ValueError: the window is below 2, or the width is not a multiple of the number of heads.
    """

    EXAMPLES = (
        {"num_attention_heads": 2, "window": 5},
        {"num_attention_heads": 4, "window": 9, "initializer_range": 0.1},
    )

    @dataclass(frozen=True)
    class Options:
        """`num_attention_heads` heads; `window` is h: a position reads the h-1 pairs before it. `initializer_range` is
        the standard deviation of the maps at the start (None: Table 6)."""

        num_attention_heads: int
        window: int = 256
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        if options.window < 2:
            raise ValueError(
                f"The window of the short-term memory is {options.window}; give at least 2, which reads one pair."
            )
        super().__init__(options, common, layer_index)
        self.window = options.window

    def delay(self, context: Context) -> int:
        return 1
