import copy
import io
from contextlib import redirect_stdout

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextStreamer

from helpers import tiny_model, tokens


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


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(cache_implementation="static"), "cannot be static"),
        (dict(cache_implementation="quantized"), "quantized|QuantizedCache|full attention"),
        (dict(cache_implementation="offloaded"), "offloaded"),
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
    with pytest.raises(ValueError, match="static"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=9))
    with pytest.raises(ValueError, match="another model"):
        model(ids, past_key_values=DynamicCache(config=tiny_model(num_hidden_layers=1).config))


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
