"""Sizes of models, and the arrangement that most systems share: memories in the place of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Step = list[dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """What a preset's name ends with.

    Attributes:
        layers, heads, hidden_size, intermediate_size: of the blocks; the last is the feed-forward networks'.
        vocab_size: words.
        context: tokens of training.
        window, train_delay: of what has them, in tokens.
        bos_eos: words that begin and end a text; None: those of the tokenizer in training.
    """

    layers: int
    heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context: int
    window: int = 256
    train_delay: tuple[int, int] = (64, 256)
    bos_eos: tuple[int, int] | None = None

    def model(self, *steps: Step, **more: Any) -> dict[str, Any]:
        """A config whose blocks have these steps of memories and then a feed-forward network, each with its norm."""
        network = {"type": "feed_forward", "options": {"intermediate_size": self.intermediate_size}}
        found = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "max_position_embeddings": self.context,
            "blocks": [{"repeat": self.layers, "steps": [*steps, [network]]}],
        }
        if self.bos_eos is not None:
            found |= dict(zip(("bos_token_id", "eos_token_id"), self.bos_eos, strict=True))
        return found | more

    def memory(self, kind: str, **options: Any) -> dict[str, Any]:
        """A memory of this type, with as many heads as the size has."""
        return {"type": kind, "options": {"num_attention_heads": self.heads, **options}}


# Not of a paper: for a laptop, with the window and the delays of Memory Mosaics v2 scaled to a context of 512.
TINY = Size(4, 4, 256, 768, vocab_size=4096, context=512, window=64, train_delay=(16, 64))
_LLAMA_3 = {"vocab_size": 128256, "context": 4096, "bos_eos": (128000, 128001)}
# Those of the paper of Memory Mosaics v2, whose Transformers have them, too.
SIZES = {"tiny": TINY, "small": Size(24, 16, 2048, 6144, **_LLAMA_3), "large": Size(32, 32, 4096, 14336, **_LLAMA_3)}


def of_paper(layers: int, heads: int, hidden_size: int, context: int = 4096) -> Size:
    """A size of a paper that has Llama 2's words and says nothing of the feed-forward networks: 8/3 of the width, on to
    a multiple of 64."""
    return Size(layers, heads, hidden_size, -(-8 * hidden_size // (3 * 64)) * 64, vocab_size=32000, context=context)
