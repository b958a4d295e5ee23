"""What a mosaic remembers of a context, in a file: read a long document once, ask it many times."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mosaics.memories import Rows, StackState, State
from mosaics.models.cache import close_cache, open_cache
from mosaics.models.digest import digest_of
from mosaics.models.modeling_mosaic import MosaicForCausalLM

FORMAT = "mosaics-memory-3"  # 2 knew its model by a part of the weights
CHUNK = 4096


@torch.inference_mode()
def read_context(
    model: MosaicForCausalLM,
    input_ids: Tensor,
    chunk: int = CHUNK,
    told: Callable[[int], None] | None = None,
    cache: DynamicCache | None = None,
) -> DynamicCache:
    """Read a context in chunks, so that the room it takes hardly grows with its length.

    Args:
        model: at evaluation.
        input_ids: `(batch, time)`, integers, no padding.
        chunk: positions in a pass.
        told: called with the number of positions of each chunk when it has been read.
        cache: of what comes before the context; None: nothing does.

    Returns:
        The cache, to be continued by `model.generate` or `model`.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    for piece in input_ids.split(chunk, dim=1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if told is not None:
            told(piece.shape[1])
    return cache


def save_memory(path: str | Path, model: MosaicForCausalLM, cache: DynamicCache, input_ids: Tensor) -> int:
    """Write what the model remembers of a context, as safetensors, whole or not at all.

    Pairs are written as the cache holds them: `config.state_dtype` says in which dtype, and so how large the file is.

    Args:
        path: the file.
        model: which filled the cache.
        cache: after the model read `input_ids`; it can be used further.
        input_ids: `(1, time)`, the context; it is kept too, since `generate` wants it.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: there is more than one row, or the cache holds another context or other memories than the model has,
            or reads documents of a library.
        OSError: the file can't be written.
    """
    state, rows, positions = open_cache(cache, model.model.stack)
    if input_ids.shape != (1, positions):
        raise ValueError(
            f"input_ids is {tuple(input_ids.shape)} and the cache holds {positions} positions of one row; give the "
            "context that was read, (1, time)"
        )
    if any(part is not own for part, own in zip_longest(state.parts(), state.parts(shared=False))):
        raise ValueError("the cache reads documents of a library, which no memory file holds; ask the library again")
    tensors: dict[str, Tensor] = {"input_ids": input_ids.to(torch.int32)}
    plain: dict[str, Any] = {}
    for name, part in _parts(rows or Rows(), state):
        _flatten(name, part, tensors, plain)
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    about = {
        "format": FORMAT,
        "model": fingerprint(model),
        "plain": plain,
    }
    about["sha256"] = _digest(about, tensors)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        save_file(tensors, temporary, {"mosaics": json.dumps(about)})
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written ({error}); choose a folder that is there and has room") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def load_memory(path: str | Path, model: MosaicForCausalLM, batch_size: int = 1) -> tuple[DynamicCache, Tensor]:
    """Take up what was remembered of a context.

    Answers equal those after the whole prompt. What follows is kept in the dtype that the file's pairs have, whatever
    the model's `config.state_dtype` says.

    Args:
        path: a file that `save_memory` wrote.
        model: the same model, with the same memories.
        batch_size: questions to be asked at once; every row of the cache is the context.

    Returns:
        The cache and the context `(batch_size, time)`: give `generate` the context with the question behind it, and the
        cache as `past_key_values`.

    Raises:
        ValueError: the file is damaged, no such memory, or another model's.
        OSError: the file can't be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no memory {path}; generate with --save-memory writes one")
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            about = json.loads((file.metadata() or {}).get("mosaics", "{}"))
            if str(about.get("format")).startswith("mosaics-memory-") and about["format"] != FORMAT:
                raise ValueError(
                    f"{path} is of the format {about['format']} of another version, and this one knows {FORMAT}; read "
                    "the document again"
                )
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} is no memory that mosaics wrote; generate with --save-memory writes one")
            if about["model"] != fingerprint(model):
                raise ValueError(f"{path} was written by another model; use that one, or read the document again")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if about.pop("sha256") != _digest(about, tensors):
            raise ValueError(f"{path} has changed since it was written (its SHA-256 differs); read the document again")
        input_ids = tensors["input_ids"].long()
        stack, rows = model.model.stack, Rows()
        cache = DynamicCache(config=model.config)
        state, _, _ = open_cache(cache, stack)
        for name, part in _parts(rows, state):
            _fill(name, part, tensors, about["plain"])
        _check_content(model, input_ids, state, tensors, about["plain"])
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); read the document again") from None
    close_cache(cache, stack, state, rows, input_ids.shape[1])
    cache.batch_repeat_interleave(batch_size)
    return cache, input_ids.expand(batch_size, -1)


def _check_content(
    model: MosaicForCausalLM, input_ids: Tensor, stored: StackState, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Hold what a file says against what the model remembers of the beginning of the same context, pairs in the same
    dtypes.

    Raises:
        TypeError: the one can't be the other, whatever the length of the context.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise TypeError("input_ids")
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise TypeError("tokens")
    cache = DynamicCache(config=model.config)
    state, _, _ = open_cache(cache, model.model.stack)
    for own, part in zip(state.parts(), stored.parts(), strict=True):
        own.adopt(part)
        part.check()
    close_cache(cache, model.model.stack, state, Rows(), 0)
    state, rows, _ = open_cache(read_context(model, input_ids[:, :256], cache=cache), model.model.stack)
    known: dict[str, Tensor] = {}
    known_plain: dict[str, Any] = {}
    for name, part in _parts(rows or Rows(), state):
        _flatten(name, part, known, known_plain)
    if plain.keys() != known_plain.keys():
        raise TypeError("fields")
    time = input_ids.shape[1]

    def most(value: int) -> int:
        """What is `value` after the beginning of the context may be so much after all of it: a token may store several
        things."""
        return time * max(1, math.ceil(value / min(time, 256)))

    for name, value in known_plain.items():
        longer = isinstance(value, int) and time > 256 and 0 <= plain[name] <= most(value)
        if type(plain[name]) is not type(value) or not (longer or plain[name] == value):
            raise TypeError(name)
    grows = {name: dim for own, part in _parts(Rows(), stored) for name, dim in _growing(own, part)}
    for name in known.keys() & tensors.keys():
        shapes = [list(known[name].shape), list(tensors[name].shape)]
        if (dim := grows.get(name)) is not None and min(map(len, shapes)) > dim:
            if shapes[1][dim] > most(shapes[0][dim]):
                raise TypeError(name)
            shapes[0][dim] = shapes[1][dim] = 0
        wrong = shapes[0] != shapes[1] or known[name].dtype != tensors[name].dtype
        if wrong or (tensors[name].is_floating_point() and not torch.isfinite(tensors[name]).all()):
            raise TypeError(name)


def _parts(rows: Rows, state: StackState) -> list[tuple[str, State]]:
    """All that is kept, by the names that it has in a file."""
    around = [] if state.around is None else [("around", state.around)]
    return [("rows", rows), *around, *((f"blocks.{i}", block) for i, block in enumerate(state.blocks))]


def fingerprint(model: MosaicForCausalLM) -> str:
    """Tells models apart: SHA-256 of the config and of every parameter."""
    other = ("_name_or_path", "transformers_version", "state_dtype", "read_tolerance")
    config = {k: v for k, v in model.config.to_dict().items() if k not in other}
    return digest_of(json.dumps(config, sort_keys=True, default=str), model.named_parameters())


def _digest(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return digest_of(json.dumps(about, sort_keys=True), sorted(tensors.items()))


def _flatten(name: str, value: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value
    elif isinstance(value, State):
        value.release()
        for field in _fields(value):
            _flatten(f"{name}.{field.name}", getattr(value, field.name), tensors, plain)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _flatten(f"{name}.{number}", part, tensors, plain)
    else:
        plain[name] = value


def _fields(state: State) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(state) if not field.metadata.keys() & {"transient", "shared"}]


def _growing(name: str, state: State) -> Iterator[tuple[str, int]]:
    """Names of tensors whose length follows from how much was read, and in which dimension."""
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if "grows" in field.metadata:
            yield f"{name}.{field.name}", field.metadata["grows"]
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(part, State):
                yield from _growing(f"{name}.{field.name}" + (f".{number}" if isinstance(value, list) else ""), part)


def _fill(name: str, state: State, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    for field in _fields(state):
        path, value = f"{name}.{field.name}", getattr(state, field.name)
        if isinstance(value, State):
            _fill(path, value, tensors, plain)
        elif isinstance(value, list):
            for number, part in enumerate(value):
                if isinstance(part, State):
                    _fill(f"{path}.{number}", part, tensors, plain)
        else:
            setattr(state, field.name, tensors[path] if path in tensors else plain[path])
