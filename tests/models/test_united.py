"""Documents that were read once each are read together as the list of their pairs."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from helpers import VOCABULARY, relative_error, tiny_model, tokens
from mosaics.memories import Context
from mosaics.memories.mosaic.common import ContextualMemory
from mosaics.models.cache import held_bytes, join_caches
from mosaics.models.memory_file import read_context, save_memory
from mosaics.models.united import read_stores, united_cache
from mosaics.testing import examples
from mosaics.testing.subject import Subject

END = VOCABULARY - 1
PRESETS = ["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny"]


def document(time: int, seed: int) -> torch.Tensor:
    """Tokens closed by an end-of-text."""
    return torch.cat([tokens(1, time, seed) % END, torch.tensor([[END]])], dim=1)


DOCUMENTS = [document(time, seed) for seed, time in enumerate((23, 1, 9), start=1)]


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    return tiny_model(preset=request.param)


def pairs_listed(model, ids):
    """Keys and values `(heads, width)` of every pair of a document, by the memory that keeps them: what each memory
    makes of its input, equation by equation, without a state."""
    found = {}

    def listen(memory, given):
        x, layout = given[0], given[1]
        source, raw = memory.maps(x)
        keys = memory.keys(source, layout, None)[0]
        raw = memory._split(raw)[0]
        mix = memory.value_mix[:, None, None]
        mixed = mix * raw[:, :-1] + (1 - mix) * raw[:, 1:]  # of all but the last token
        mixed = mixed / (mixed.norm(dim=-1, keepdim=True) + memory.unit_norm_eps)
        values = memory.value_length()[:, None, None] * mixed
        found[memory] = list(zip(keys[:, :-1].unbind(1), values.unbind(1), strict=True))

    memories = [m for m in model.model.stack.memories() if isinstance(m, ContextualMemory) and m.window is None]
    hooks = [memory.register_forward_pre_hook(listen) for memory in memories]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def twin(model, documents, question, monkeypatch):
    """Logits of a question, every position of which lists the pairs of the documents and its own delayed ones."""
    stores = [pairs_listed(model, ids) for ids in documents]

    def read(memory, queries, keys, values, source, layout, state, context):
        if memory.window is not None:
            return plain(memory, queries, keys, values, source, layout, state, context)
        base, slope, exponent = memory.bandwidth()
        rows = []
        for row in range(queries.shape[0]):
            answers = []
            for t in range(queries.shape[2]):
                own = range(0, t - memory.delay(context) + 1)
                listed = [pair for store in stores for pair in store[memory]]
                listed += [(keys[row, :, s], values[row, :, s]) for s in own]
                beta = base if slope is None else base + slope * max(len(listed), 1) ** exponent
                k, v = (torch.stack(x, dim=1) for x in zip(*listed, strict=True))
                weights = (beta[:, None] * (k @ queries[row, :, t, :, None])[..., 0]).softmax(-1)
                answers.append((weights[:, None] @ v)[:, 0])
            rows.append(torch.stack(answers, dim=1))
        return torch.stack(rows)

    plain = ContextualMemory._read
    with monkeypatch.context() as patch:
        patch.setattr(ContextualMemory, "_read", read)
        return model(question, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_united_cache_equals_the_list_of_all_pairs(model, monkeypatch, count):
    documents, question = DOCUMENTS[:count], tokens(2, 12, seed=9) % END
    cache = united_cache(model, [read_stores(model, ids, chunk=7) for ids in documents])
    logits = torch.cat([model(q, past_key_values=cache).logits for q in question.split([5, 1, 6], dim=1)], dim=1)
    assert relative_error(logits, twin(model, documents, question, monkeypatch)) < 1e-9
    without = model(question, use_cache=False).logits
    assert relative_error(logits, without) > 1e-3  # the documents matter
    if count > 1:
        fewer = united_cache(model, [read_stores(model, ids) for ids in documents[1:]])
        assert relative_error(logits, model(question, past_key_values=fewer).logits) > 1e-3


@torch.no_grad()
def test_united_cache_does_not_care_for_the_order(model):
    stores, question = [read_stores(model, ids) for ids in DOCUMENTS], tokens(1, 8, seed=4)
    one, other = (model(question, past_key_values=united_cache(model, s)).logits for s in (stores, stores[::-1]))
    assert relative_error(one, other) < 1e-9


@torch.no_grad()
def test_united_cache_is_not_the_memory_that_continues_the_document(model):
    question = tokens(1, 8, seed=4)
    united = united_cache(model, [read_stores(model, DOCUMENTS[0])])
    continued = read_context(model, DOCUMENTS[0][:, :-1])
    one, other = (model(question, past_key_values=cache).logits for cache in (united, continued))
    assert relative_error(one, other) > 1e-3


@torch.no_grad()
def test_united_cache_of_no_document_is_an_empty_one(model):
    question = tokens(1, 8, seed=4)
    assert torch.equal(model(question, past_key_values=united_cache(model, [])).logits, model(question).logits)


@torch.no_grad()
def test_united_cache_with_padding_in_front(model):
    stores, question = [read_stores(model, ids) for ids in DOCUMENTS], tokens(1, 8, seed=4)
    mask = torch.tensor([[0, 0, 0, 1, 1, 0] + [1] * 6, [1] * 12])
    ids = torch.zeros(2, 12, dtype=torch.long)
    ids[0, mask[0].bool()], ids[1] = question[0], tokens(1, 12, seed=5)[0]
    padded = model(ids, attention_mask=mask, past_key_values=united_cache(model, stores)).logits
    alone = model(question, past_key_values=united_cache(model, stores)).logits
    assert relative_error(padded[0, mask[0].bool()], alone[0]) < 1e-9


@torch.no_grad()
def test_united_cache_selects_repeats_reorders_and_joins_rows(model):
    stores, question = [read_stores(model, ids) for ids in DOCUMENTS], tokens(3, 9, seed=4)
    cache = united_cache(model, stores)
    model(question[:, :5], past_key_values=cache)
    whole = model(question, past_key_values=united_cache(model, stores)).logits[:, 5:]
    before, own = held_bytes(cache), held_bytes(united_cache(model, stores))
    assert own == sum(store.keys.nbytes + store.values.nbytes for document in stores for store in document.values())
    joined = join_caches([cache, cache], model.model.stack)
    again = model(question[:, 5:].repeat(2, 1), past_key_values=joined).logits
    assert relative_error(again, whole.repeat(2, 1, 1)) < 1e-9
    with pytest.raises(ValueError, match="read different stores"):
        other = united_cache(model, stores)
        model(question[:, :5], past_key_values=other)
        join_caches([cache, other], model.model.stack)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    assert held_bytes(cache) - own == 2 * (before - own)  # the store belongs to no row
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    logits = model(question[[2, 0, 1], 5:], past_key_values=cache).logits
    assert relative_error(logits, whole[[2, 0, 1]]) < 1e-9


@torch.no_grad()
def test_generate_takes_a_united_cache(model):
    model.generation_config.pad_token_id = 0
    stores, question = [read_stores(model, ids) for ids in DOCUMENTS], tokens(1, 8, seed=4)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    written = model.generate(question, past_key_values=united_cache(model, stores), **options)
    ids = question
    for _ in range(6):
        last = model(ids, past_key_values=united_cache(model, stores)).logits[:, -1:]
        ids = torch.cat([ids, last.argmax(-1)], dim=1)
    assert torch.equal(written, ids)
    options["num_beams"] = 3
    beams = [model.generate(question, past_key_values=united_cache(model, s), **options) for s in (stores, [])]
    assert not torch.equal(*beams)
    static = united_cache(model, stores, StaticCache(config=model.config, max_cache_len=20))
    assert torch.equal(model.generate(question, past_key_values=static, **options | {"num_beams": 1}), written)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_united_cache_keeps_pairs_in_fewer_bits(dtype):
    plain, narrow = tiny_model(torch.float32), tiny_model(torch.float32, state_dtype=dtype)
    question = tokens(2, 8, seed=4)
    stores = [read_stores(narrow, ids) for ids in DOCUMENTS]
    assert all(str(s.keys.dtype) == f"torch.{dtype}" for store in stores for s in store.values())
    wide = [read_stores(plain, ids) for ids in DOCUMENTS]
    logits = narrow(question, past_key_values=united_cache(narrow, stores)).logits
    exact = plain(question, past_key_values=united_cache(plain, wide)).logits
    assert 1e-6 < relative_error(logits, exact) < 0.2
    # What is read are the rounded pairs, whatever the model keeps its own in.
    rounded = [{name: copy.copy(s) for name, s in store.items()} for store in stores]
    for store in rounded:
        for s in store.values():
            s.keys, s.values = (x.widened() if hasattr(x, "widened") else x for x in s.pairs(torch.float32))
            s.key_scales = s.value_scales = None
    read, same = (plain(question, past_key_values=united_cache(plain, s)).logits for s in (stores, rounded))
    assert relative_error(read, same) < 1e-5


@torch.no_grad()
def test_reads_of_a_united_cache_sum_to_one(model):
    stores, question = [read_stores(model, ids) for ids in DOCUMENTS], tokens(1, 8, seed=4)
    context = Context(reads=[])
    model(question, past_key_values=united_cache(model, stores), context=context)
    of_stores = [read for read in context.reads if read.from_store]
    assert len(of_stores) == len(stores[0])
    for read in of_stores:
        place = (read.memory, read.layer_index, True)
        own = next(r for r in context.reads if (r.memory, r.layer_index, r.contextual) == place)
        assert read.weights.shape[-1] == 33 and not read.contextual
        torch.testing.assert_close(read.weights.sum(-1) + own.weights.sum(-1), torch.ones_like(own.weights[..., 0]))


@torch.no_grad()
@pytest.mark.parametrize("preset", ["transformer-tiny", "titans-lmm-tiny", "lla-tiny"])
def test_read_stores_refuses_memories_that_cannot_be_united(preset):
    model = tiny_model(preset=preset)
    for ask in (lambda: read_stores(model, DOCUMENTS[0]), lambda: united_cache(model, [])):
        with pytest.raises(ValueError, match="can't be united"):
            ask()


@torch.no_grad()
@pytest.mark.parametrize("name, options", examples(first=True))
def test_every_memory_unites_or_refuses_in_a_sentence(name, options):
    model = Subject(name, options).model(vocab_size=VOCABULARY)
    try:
        stores = [read_stores(model, ids, chunk=5) for ids in DOCUMENTS]
    except ValueError as error:
        assert "can't be united" in str(error) or "no memory that keeps the pairs" in str(error)
        return
    question = tokens(2, 12, seed=4)
    whole = model(question, past_key_values=united_cache(model, stores)).logits
    cache = united_cache(model, stores[::-1])
    cut = torch.cat([model(q, past_key_values=cache).logits for q in question.split([1, 6, 5], dim=1)], dim=1)
    assert relative_error(cut, whole) < 1e-9 < relative_error(whole, model(question).logits)


@torch.no_grad()
def test_united_cache_refuses_what_it_cannot_be(model, tmp_path):
    stores, question = [read_stores(model, ids) for ids in DOCUMENTS], tokens(1, 8, seed=4)
    with pytest.raises(ValueError, match="at least one token"):
        read_stores(model, DOCUMENTS[0][:, :1])
    with pytest.raises(ValueError, match="another model"):
        united_cache(model, [stores[0], {}])
    used = DynamicCache(config=model.config)
    model(question, past_key_values=used)
    with pytest.raises(ValueError, match="in use"):
        united_cache(model, stores, used)
    cache = united_cache(model, stores)
    model(question, past_key_values=cache)
    with pytest.raises(ValueError, match="documents of a library"):
        save_memory(tmp_path / "x.memory", model, cache, question)
