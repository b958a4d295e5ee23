import copy
import io
from contextlib import redirect_stdout

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextStreamer

from helpers import tiny_model, tokens
from mosaics.models.cache import held_bytes, join_caches, release


@pytest.fixture(scope="module", params=["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny"])
def model(request):
    model = tiny_model(preset=request.param)
    model.generation_config.pad_token_id = 0
    return model


def generate(model, ids, use_cache, **options):
    torch.manual_seed(11)
    return model.generate(ids, use_cache=use_cache, **{"max_new_tokens": 12, "do_sample": False, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(do_sample=True, temperature=0.9, top_p=0.9),
        dict(do_sample=True, num_return_sequences=3),
        dict(num_beams=4),
        dict(num_beams=4, num_return_sequences=3),
        dict(num_beams=3, do_sample=True),
        dict(prefill_chunk_size=5),
        dict(prefill_chunk_size=1),
        dict(guidance_scale=1.5),
        dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
        dict(eos_token_id=[3, 9, 17, 21, 33, 40], min_new_tokens=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_with_a_cache_equals_without(model, options, padded):
    ids, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    if padded:
        mask[0, :6], mask[2, :13] = 0, 0
    expected = generate(
        model, ids, False, attention_mask=mask, **{k: v for k, v in options.items() if "prefill" not in k}
    )
    assert torch.equal(generate(model, ids, True, attention_mask=mask, **options), expected)


def test_generate_of_a_padded_row_equals_the_row_alone(model):
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :6] = 0
    together = generate(model, ids, True, attention_mask=mask)
    assert torch.equal(together[0, 6:], generate(model, ids[:1, 6:], True)[0])


def test_generate_goes_on_from_a_cache(model):
    ids, cache = tokens(2, 9), DynamicCache(config=model.config)
    first = generate(model, ids, True, past_key_values=cache, max_new_tokens=5)
    kept = copy.deepcopy(cache)
    expected = generate(model, ids, False, max_new_tokens=11)
    for c in (cache, kept):
        assert torch.equal(generate(model, first, True, past_key_values=c, max_new_tokens=6), expected)


def test_generate_streams(model):
    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(str(int(i)) for i in ids) + " "

    with redirect_stdout(io.StringIO()) as out:
        ids = generate(model, tokens(1, 5), True, streamer=TextStreamer(Tokenizer(), skip_prompt=True))
    assert [int(x) for x in out.getvalue().split()] == ids[0, 5:].tolist()


def test_generate_beyond_the_training_context(model):
    ids = tokens(1, 40)
    model.config.max_position_embeddings, before = 16, model.config.max_position_embeddings
    try:
        assert torch.equal(generate(model, ids, True), generate(model, ids, False))
    finally:
        model.config.max_position_embeddings = before


WANTS_DRIVER = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="a CUDA build of torch without a driver"
)


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param(dict(cache_implementation="offloaded_static"), "offloaded", marks=WANTS_DRIVER),
        (dict(cache_implementation="quantized"), "quantized|QuantizedCache|full attention"),
        pytest.param(dict(cache_implementation="offloaded"), "offloaded", marks=WANTS_DRIVER),
        (dict(prompt_lookup_num_tokens=3), "not supported with stateful models"),
        (dict(document_ids=torch.zeros(1, 5, dtype=torch.long)), "takes no document_ids"),
    ],
)
def test_generate_refuses_what_cannot_be_right(model, options, message):
    with pytest.raises((ValueError, ImportError), match=message):
        generate(model, tokens(1, 5), True, **options)


def test_generate_refuses_an_assistant(model):
    with pytest.raises(ValueError, match="stateful"):
        generate(model, tokens(1, 5), True, assistant_model=model)


def test_forward_refuses_foreign_caches(model):
    class Other:
        num_hidden_layers = 2

    ids = tokens(1, 3)
    with pytest.raises(ValueError, match="another model"):
        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="another model"):
        other = StaticCache(config=tiny_model(num_hidden_layers=1).config, max_cache_len=9)
        model(ids, past_key_values=other)
    with pytest.raises(ValueError, match="another model"):
        model(ids, past_key_values=DynamicCache(config=tiny_model(num_hidden_layers=1).config))


@pytest.mark.parametrize(
    "preset",
    ["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny", "transformer-tiny", "memory-mosaics-v2-tiny in 8 bits"],
)
@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)], ids=str)
def test_generate_with_a_static_cache_equals_the_dynamic_one(preset, options):
    preset, _, narrow = preset.partition(" in ")
    model = tiny_model(preset=preset, **({"state_dtype": "int8"} if narrow else {}))
    model.generation_config.pad_token_id = 0
    ids, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[0, :6], mask[2, :13] = 0, 0
    given = dict(attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    expected = generate(model, ids, True, **given)
    found = generate(model, ids, True, cache_implementation="static", **given)
    assert type(found.past_key_values) is StaticCache and torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


def test_static_cache_keeps_no_more_of_a_window_than_is_read(model):
    cache = StaticCache(config=model.config, max_cache_len=50)
    model(tokens(2, 9), past_key_values=cache)
    sizes = {part.keys.shape[2] for layer in cache.layers for part in layer.state.parts() if hasattr(part, "fill")}
    assert sizes == ({5, 50} if model.config.has("short_term.window") else {50})
    assert cache.get_seq_length() == 9 and cache.get_max_length() == 50


def test_static_cache_that_is_full_says_so(model):
    cache = StaticCache(config=model.config, max_cache_len=9)
    with pytest.raises(ValueError, match="room for 9 positions, and 0 and 10"):
        model(tokens(1, 10), past_key_values=cache)
    model(tokens(1, 8), past_key_values=cache)
    with pytest.raises(ValueError, match="room for 9 positions, and 8 and 2"):
        model(tokens(1, 2), past_key_values=cache)
    model(tokens(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="StaticCache"):
        join_caches([cache], model.model.stack)


def test_static_cache_passes_gradients_on(model):
    """Also through pairs of an earlier call, in rows that differ in length."""
    ids, mask, found = tokens(2, 12), torch.ones(2, 12, dtype=torch.long), []
    mask[0, :4] = 0
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
        model.zero_grad()
        for part in (slice(0, 6), slice(6, 7), slice(7, 12)):
            logits = model(ids[:, part], attention_mask=mask[:, part], past_key_values=cache).logits
        logits.logsumexp(-1).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    model.zero_grad()


def test_cache_made_without_a_config_works(model):
    ids, cache = tokens(1, 9), DynamicCache()
    model(ids[:, :4], past_key_values=cache, use_cache=True)
    logits = model(ids[:, 4:], past_key_values=cache, use_cache=True).logits
    assert (logits - model(ids).logits[:, 4:]).abs().max() < 1e-9


def test_cache_rows_can_be_selected_repeated_reordered_and_reset(model):
    ids, more = tokens(3, 9), tokens(3, 4, seed=5)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0

    def prefilled():
        return model(ids, attention_mask=mask, use_cache=True).past_key_values

    def continued(cache, rows):
        with torch.no_grad():
            return model(more[rows], past_key_values=cache, use_cache=True).logits

    expected = continued(prefilled(), torch.arange(3))
    for rows, change in (
        (torch.tensor([2, 0, 0]), lambda c, r: c.reorder_cache(r)),
        (torch.tensor([1]), lambda c, r: c.batch_select_indices(r)),
        (torch.tensor([0, 2]), lambda c, r: c.batch_select_indices(torch.tensor([True, False, True]))),
        (torch.tensor([0, 0, 1, 1, 2, 2]), lambda c, r: c.batch_repeat_interleave(2)),
    ):
        cache = prefilled()
        change(cache, rows)
        assert (continued(cache, rows) - expected[rows]).abs().max() < 1e-9
    cache = prefilled()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert (continued(cache, torch.arange(3)) - model(more).logits).abs().max() < 1e-9
    with pytest.raises(ValueError, match="cannot forget"):
        prefilled().crop(-1)


@torch.no_grad()
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("preset", ["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny", "transformer-long-short-tiny"])
def test_join_caches_goes_on_as_each_alone(preset, state_dtype):
    model = tiny_model(preset=preset, state_dtype=state_dtype)
    texts = [tokens(1, 9), tokens(2, 25, seed=1), tokens(1, 9, seed=2), tokens(1, 80, seed=3)]
    caches = [model(ids, use_cache=True).past_key_values for ids in texts]
    joined = join_caches(caches, model.model.stack)
    assert joined.get_seq_length() == 80
    more = tokens(5, 8, seed=4)
    found = [model(ids, past_key_values=joined, use_cache=True).logits for ids in more.split([1, 1, 6], dim=1)]
    for cache, ids, rows in zip(caches, texts, ([0], [1, 2], [3], [4]), strict=True):
        expected = model(torch.cat([ids, more[rows]], dim=1)).logits[:, -8:]
        assert (torch.cat(found, dim=1)[rows] - expected).abs().max() < 1e-9
        assert (model(more[rows], past_key_values=cache).logits - expected).abs().max() < 1e-9  # as it was


@torch.no_grad()
def test_join_caches_keeps_padding_and_documents_apart(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 2:6] = 0
    documents = torch.tensor([[0] * 4 + [1] * 8])
    padded = model(ids, attention_mask=mask, use_cache=True).past_key_values
    packed = model(tokens(1, 12, seed=1), document_ids=documents, use_cache=True).past_key_values
    more = tokens(3, 4, seed=5)
    going_on = torch.tensor([[0], [0], [1]]).expand(-1, 4)
    joined = join_caches([padded, packed], model.model.stack)
    found = model(more, past_key_values=joined, document_ids=going_on).logits
    assert (found[:2] - model(more[:2], past_key_values=padded).logits).abs().max() < 1e-9
    assert (found[2:] - model(more[2:], past_key_values=packed).logits).abs().max() < 1e-9


def test_join_caches_of_one_is_a_copy_without_the_room(model):
    cache = model(tokens(1, 300), use_cache=True).past_key_values
    copied = join_caches([cache], model.model.stack)
    release(copied)
    release(cache)
    assert held_bytes(copied) == held_bytes(cache) > 0
    before = held_bytes(cache)
    model(tokens(1, 20), past_key_values=copied)
    assert held_bytes(cache) == before < held_bytes(copied)


def test_join_caches_refuses_what_has_no_rows(model):
    with pytest.raises(ValueError, match="no token"):
        join_caches([DynamicCache(config=model.config)], model.model.stack)


def test_generate_from_embeddings_equals_from_tokens(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = generate(model, ids, True, attention_mask=mask)[:, 9:]
    embeddings = model.model.embed_tokens(ids)
    for use_cache in (True, False):
        found = model.generate(
            inputs_embeds=embeddings, attention_mask=mask, use_cache=use_cache, max_new_tokens=12, do_sample=False
        )
        assert torch.equal(found, expected)
