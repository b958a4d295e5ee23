"""Holding memories against the contract, with their examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from mosaics.memories import REGISTRY
from mosaics.memories.contract import memory_class
from mosaics.testing.checks import CHECKS
from mosaics.testing.subject import Nonconforming, Subject


def examples(first: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every registered memory with each of its `EXAMPLES`, or with the first alone."""
    for name, memory in sorted(REGISTRY.items()):
        for options in memory.EXAMPLES[: 1 if first else None]:
            yield name, options


def check_examples(name: str) -> None:
    """Check that `EXAMPLES` try every option with two values at least.

    Raises:
        Nonconforming: they do not.
    """
    memory = memory_class(name)
    for field in dataclasses.fields(memory.Options):
        default = None if field.default is dataclasses.MISSING else field.default
        values = {repr(options.get(field.name, default)) for options in memory.EXAMPLES}
        if len(values) < 2:
            raise Nonconforming(f"{name}: EXAMPLES have the option {field.name!r} with {values or 'no value'} alone")


def conform(name: str, options: dict[str, Any], checks: Iterable[str] = ()) -> None:
    """Hold a memory against the contract.

    Args:
        name: its registered type.
        options: what a config says of it, at a width of 16.
        checks: some of `CHECKS`; by default all, and that `EXAMPLES` try every option.

    Raises:
        Nonconforming: the first check that it does not pass, with what was found.
        ValueError: there is no such memory or check.
    """
    memory_class(name)
    if not (chosen := tuple(checks)):
        check_examples(name)
    for one in chosen or CHECKS:
        if one not in CHECKS:
            raise ValueError(f"There is no check {one!r}; choose from {', '.join(CHECKS)}.")
        try:
            CHECKS[one](Subject(name, dict(options)))
        except Nonconforming:
            raise
        except Exception as error:
            raise Nonconforming(f"{name} {options}: {one}: {type(error).__name__}: {error}") from error
