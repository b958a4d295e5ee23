"""Which memories there are, and what a config may say of them."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, get_args, get_origin, get_type_hints

from mosaics.memories.contract.memory import Common, Memory


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest valid one, or all of them."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(valid)}."


def check_choices(options: Any, **known: Iterable[str]) -> None:
    """Raises `ValueError` if an option is none of the choices that are known for its name."""
    for name, valid in known.items():
        if (given := getattr(options, name)) not in valid:
            raise ValueError(f"{name} is {given!r}; {nearest(given, valid)}")


REGISTRY: dict[str, type[Memory]] = {}
ENTRY_POINTS = "mosaics.memories"  # the group under which packages of others name their memories
# What belongs to the whole model in a config, so that no memory may have an option of the name.
MODEL_SETTINGS = frozenset(
    "vocab_size hidden_size blocks around num_hidden_layers max_position_embeddings norm norm_eps bias dropout "
    "embedding_dropout attention_dropout logit_scale embedding_scale rotary_base learned_positions "
    "tie_word_embeddings state_dtype read_tolerance use_cache bos_token_id eos_token_id pad_token_id dtype name type "
    "options repeat steps".split()
)
LARGEST = 2**31 - 1  # whole number in a config; beyond that the sizes of tensors overflow


def register(name: str) -> Callable[[type[Memory]], type[Memory]]:
    """Make a memory class known under `name`, the `type` that a config gives.

    Raises:
        ValueError: another class has the name, or an option has the name of a setting of the whole model.
    """

    def add(memory: type[Memory]) -> type[Memory]:
        known = REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (memory.__module__, memory.__qualname__):
            raise ValueError(f"{known.__module__} has registered a memory of type {name!r}; take another name.")
        if taken := {f.name for f in dataclasses.fields(memory.Options)} & MODEL_SETTINGS:
            raise ValueError(f"The option {min(taken)!r} of {name!r} is a setting of the whole model; rename it.")
        memory.type = name
        REGISTRY[name] = memory
        return memory

    return add


def memory_class(name: str) -> type[Memory]:
    """The memory of a type, also that of an installed package which names it among its entry points.

    Raises:
        ValueError: there is no such type, or its package does not register it.
    """
    if name not in REGISTRY:
        found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if name not in found:
            raise ValueError(f"There is no memory of type {name!r}; {nearest(name, REGISTRY.keys() | found)}")
        found[name].load()
        if name not in REGISTRY:
            raise ValueError(f"{found[name].value} does not register a memory of type {name!r}, as its package says.")
    return REGISTRY[name]


def option_names(name: str) -> set[str]:
    """The options that a memory type has.

    Raises:
        ValueError: there is no such type.
    """
    return {f.name for f in dataclasses.fields(memory_class(name).Options)}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Check that a memory type has these options, that none is missing, and that their values are of the right type.

    Raises:
        ValueError: it is not so.
    """
    valid = option_names(name)
    for option in options:
        if option not in valid:
            raise ValueError(f"A {name} memory has no option {option!r}; {nearest(option, valid)}")
    cls = REGISTRY[name]
    types = get_type_hints(cls.Options)
    for f in dataclasses.fields(cls.Options):
        if f.name not in options:
            if f.default is f.default_factory is dataclasses.MISSING:
                raise ValueError(f"A {name} memory needs the option {f.name!r}; give it a value.")
        elif not _is_a(options[f.name], types[f.name]):
            raise ValueError(
                f"The option {f.name!r} of a {name} memory is {options[f.name]!r}; it has to be of type {f.type}, and "
                f"no number beyond {LARGEST}."
            )


def named(steps: list[list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The memories of a block with their names: that which is given, or else the type (`type-2` for the second)."""
    counts: Counter[str] = Counter()
    found = []
    for memory in (memory for step in steps for memory in step):
        kind = memory["type"]
        counts[kind] += 1
        found.append((memory.get("name") or (kind if counts[kind] == 1 else f"{kind}-{counts[kind]}"), memory))
    return found


def build(name: str, options: dict[str, Any], common: Common, layer_index: int) -> Memory:
    """The memory of a type with its options.

    Raises:
        ValueError: the type or an option is unknown or missing, or a value is out of range.
    """
    check_options(name, options)
    return REGISTRY[name](REGISTRY[name].Options(**options), common, layer_index)


def _is_a(value: Any, kind: Any) -> bool:
    if kinds := get_args(kind):
        if get_origin(kind) is not tuple:  # X | None
            return any(_is_a(value, k) for k in kinds)
        return isinstance(value, tuple | list) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, kind)
