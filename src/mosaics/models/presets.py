"""Named arrangements of memories: plain data, as a config takes it; each group of memories has its own."""

from __future__ import annotations

import importlib.util
import pkgutil
from typing import Any

from mosaics import memories


def _presets() -> dict[str, dict[str, Any]]:
    groups = [module.name for module in pkgutil.iter_modules(memories.__path__) if module.ispkg]
    found: dict[str, dict[str, Any]] = {}
    for group in sorted(groups, key=lambda name: name != "mosaic"):  # that is what all others stand beside
        name = f"{memories.__name__}.{group}.presets"
        if importlib.util.find_spec(name) is not None:
            found |= importlib.import_module(name).presets()
    return found


PRESETS = _presets()
