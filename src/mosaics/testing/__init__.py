"""The conformance suite: what every memory is held to, in this package and in others.

    from mosaics.testing import conform
    conform("my_memory", {"num_attention_heads": 2})     # every check, or those that are named

A memory is tried alone, in the place of a Transformer's attention, beside the memories of v2, and twice in a block, at
a width of 16. `examples()` gives every registered memory with each of its `EXAMPLES`.
"""

from mosaics.testing.checks import CHECKS
from mosaics.testing.conformance import check_examples, conform, examples
from mosaics.testing.subject import Nonconforming

__all__ = ["CHECKS", "Nonconforming", "check_examples", "conform", "examples"]
