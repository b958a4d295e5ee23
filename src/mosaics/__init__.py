"""Language models made of associative memories: Memory Mosaics v2 and its family.

`MosaicConfig.from_preset(name, **overrides)` and `MosaicForCausalLM(config)` make a model; importing this package also
lets transformers' `AutoModelForCausalLM` load one.
"""

import importlib
import sys
from pathlib import Path

from mosaics._version import __version__

__all__ = ["MosaicConfig", "MosaicForCausalLM", "MosaicModel", "__version__", "draw"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mosaics.models"), name)


def _is_command_line() -> bool:
    """Whether this process is `mosaics VERB` or `python -m mosaics VERB`."""
    if sys.argv[:1] == ["-m"]:  # so it is while a module given by -m is looked up
        return any(word in ("mosaics", "-mmosaics") for word in sys.orig_argv)
    return Path(sys.argv[0] if sys.argv else "").stem == "mosaics"


# The command line imports what a verb needs when it runs, so that help and errors do not wait seconds for torch.
if not _is_command_line():
    from mosaics.models import MosaicConfig, MosaicForCausalLM, MosaicModel, draw
