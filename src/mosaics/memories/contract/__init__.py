"""The contract between memories and all else: a file for each of its subjects."""

from mosaics.memories.contract.context import Context, Read
from mosaics.memories.contract.helpers import (
    check_delay,
    check_deviation,
    head_width,
    init_clamped_normal,
    init_map,
    linear_flops,
    mean_pairs,
)
from mosaics.memories.contract.layout import Layout
from mosaics.memories.contract.memory import Around, Common, Memory
from mosaics.memories.contract.pairs import STATE_DTYPES, FixedPairs, Pairs, check_state_dtype, check_tolerance
from mosaics.memories.contract.registry import (
    LARGEST,
    REGISTRY,
    build,
    check_choices,
    check_options,
    memory_class,
    named,
    nearest,
    option_names,
    register,
)
from mosaics.memories.contract.sketches import SketchedPairs
from mosaics.memories.contract.state import Rows, State
from mosaics.memories.contract.store import Store

__all__ = [
    "LARGEST",
    "REGISTRY",
    "STATE_DTYPES",
    "Around",
    "Common",
    "Context",
    "FixedPairs",
    "Layout",
    "Memory",
    "Pairs",
    "Read",
    "SketchedPairs",
    "Rows",
    "State",
    "Store",
    "build",
    "check_choices",
    "check_delay",
    "check_deviation",
    "check_options",
    "check_state_dtype",
    "check_tolerance",
    "head_width",
    "init_clamped_normal",
    "init_map",
    "linear_flops",
    "mean_pairs",
    "memory_class",
    "named",
    "nearest",
    "option_names",
    "register",
]
