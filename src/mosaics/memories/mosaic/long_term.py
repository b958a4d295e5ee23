"""The long-term memory of Memory Mosaics v2: all pairs of the document but the newest."""

from __future__ import annotations

from dataclasses import dataclass

from mosaics.memories.contract import Common, Context, check_delay, register
from mosaics.memories.mosaic.common import GatedContextualMemory


@register("long_term")
class LongTermMemory(GatedContextualMemory):
    """Holds the pairs 1 ... t-m at position t; training draws m anew at every step (Memory Mosaics v2, section 3 and
    Table 12).

    Raises:
        ValueError: a delay is below 1, the training range is empty, or the width is not a multiple of the number of
            heads.
    """

    EXAMPLES = (
        {"num_attention_heads": 2, "delay": 3, "train_delay": [3, 5]},
        {"num_attention_heads": 4, "delay": 1, "train_delay": [1, 1], "initializer_range": 0.1},
    )

    @dataclass(frozen=True)
    class Options:
        """`delay` is m at evaluation, `train_delay` the range of m in training, both ends included. `initializer_range`
        is the standard deviation of the maps at the start (None: Table 6)."""

        num_attention_heads: int
        delay: int = 64
        train_delay: tuple[int, int] = (64, 256)
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        low, high = options.train_delay
        if options.delay < 1 or low < 1:
            raise ValueError(f"The delays of the long-term memory are {options.delay} and {low}; give at least 1.")
        if low > high:
            raise ValueError(f"train_delay is [{low}, {high}]; give the smaller delay first.")
        super().__init__(options, common, layer_index)

    def check(self, context_length: int) -> None:
        check_delay(self.name, max(self.options.delay, *self.options.train_delay), context_length)

    def delay(self, context: Context) -> int:
        return self.options.delay if context.draw is None else context.draw_integer(*self.options.train_delay)
