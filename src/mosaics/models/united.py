"""Documents that are read once each, and are then read together: one store of pairs for each memory that keeps any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from mosaics.memories import Memory, StackState, State
from mosaics.memories.contract import Store
from mosaics.models.cache import fill_cache, open_cache
from mosaics.models.memory_file import CHUNK, read_context
from mosaics.models.modeling_mosaic import MosaicForCausalLM


def check_united(model: MosaicForCausalLM) -> None:
    """Raises `ValueError` if what the model keeps of a document can't be read beside that of others."""
    if model.config.learned_positions is not None:
        raise ValueError(
            "a model with learned positions has one place for every token, and documents that are read together have "
            "the same; continue one document with save_memory (generate --save-memory) instead"
        )
    if (around := model.model.stack.around) is not None:
        raise ValueError(
            f"what the memory {around.name!r} around the blocks keeps of a document can't be united with that of "
            "others; continue one document with save_memory (generate --save-memory) instead"
        )
    for _, memory in _memories(model):
        if type(memory).document_store is Memory.document_store:
            memory.document_store(None)


def read_stores(
    model: MosaicForCausalLM, input_ids: Tensor, chunk: int = CHUNK, told: Callable[[int], None] | None = None
) -> dict[str, Store]:
    """Read a document from its beginning, and keep all of its pairs.

    Args:
        model: at evaluation.
        input_ids: `(1, time)`, the document and the end-of-text that closes it: what completes its last value.
        chunk: positions in a pass.
        told: called with the number of positions of each chunk when it has been read.

    Returns:
        The store of each memory that keeps pairs, `time - 1` of them, by its place in the model (`"0.1"`: the second
        memory of the first block).

    Raises:
        ValueError: the model keeps what can't be read beside other documents, or nothing; or the input has other rows,
            or no token before the end-of-text.
    """
    check_united(model)
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(
            f"a document is {tuple(input_ids.shape)}; give (1, time), with at least one token before the end-of-text"
        )
    cache = read_context(model, input_ids, chunk, told)
    state, _, _ = open_cache(cache, model.model.stack)
    found = {}
    for place, memory in _memories(model):
        store = memory.document_store(_state_at(state, place))
        if store is not None:
            found[place] = store
    if not found:
        raise ValueError("the model has no memory that keeps the pairs of a document; use one with a long-term memory")
    return found


def united_cache(
    model: MosaicForCausalLM, documents: Sequence[Mapping[str, Store]], cache: Cache | None = None
) -> Cache:
    """A cache from which a question reads several documents at once, and continues none of them.

    All pairs of all documents can be read by every token of the question. The averages behind its keys and its
    short-term memories begin as at the border of a document, and its own pairs can be read with the usual delay.

    Args:
        model: which read the documents.
        documents: of each what `read_stores` gave; none is a question without documents.
        cache: an empty one to fill, dynamic or static; None: a new dynamic one.

    Returns:
        The cache, for `model.generate` or `model`; it has seen no position yet.

    Raises:
        ValueError: the documents were read by a model with other memories, or in different dtypes; or the cache is none
            that can be filled.
    """
    check_united(model)
    stack = model.model.stack
    cache = DynamicCache(config=model.config) if cache is None else cache
    state, rows, positions = open_cache(cache, stack, batch=1)
    if rows is not None or positions:
        raise ValueError("the cache is in use; give an empty one")
    kept = {place for place, memory in _memories(model)}
    if any(not document.keys() <= kept or document.keys() != documents[0].keys() for document in documents):
        raise ValueError("the documents were read by another model; read them again")
    capacity = getattr(cache.layers[0], "max_cache_len", None)
    for place, memory in _memories(model):
        own = memory.united_state([document[place] for document in documents if place in document])
        block, number = map(int, place.split("."))
        state.blocks[block].memories[number] = own if own is None or capacity is None else own.reserved(capacity)
    fill_cache(cache, stack, state)
    return cache


def _memories(model: MosaicForCausalLM) -> Iterator[tuple[str, Memory]]:
    for i, block in enumerate(model.model.stack.blocks):
        for j, memory in enumerate(block.memories()):
            yield f"{i}.{j}", memory


def _state_at(state: StackState, place: str) -> State | None:
    block, number = map(int, place.split("."))
    return state.blocks[block].memories[number]
