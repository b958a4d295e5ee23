"""Pairs of the context that are kept in fewer bits: `state_dtype`."""

import pytest
import torch

from helpers import relative_error, tiny_config, tiny_model, tokens
from mosaics import MosaicForCausalLM
from mosaics.memories import State
from mosaics.memories.contract import Pairs
from mosaics.models.cache import open_cache

PRESETS = ["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny", "transformer-tiny", "transformer-long-short-tiny"]
PRESETS += ["lla-tiny", "parallax-tiny"]


@pytest.fixture(scope="module", params=[(preset, dtype) for preset in PRESETS for dtype in ("bfloat16", "int8")])
def model(request):
    preset, dtype = request.param
    shared = {"num_attention_heads": 4, "num_key_value_heads": 2} if preset == "transformer-tiny" else {}
    model = tiny_model(preset=preset, state_dtype=dtype, **shared)
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,) * 30, (7, 1, 1, 13, 8), (29, 1)])
def test_forward_with_a_state_dtype_does_not_depend_on_cuts_or_padding(model, cuts):
    ids = tokens(3, 30)
    documents = torch.tensor([[0] * 30, [0] * 12 + [1] * 18, [0] * 3 + [1] * 20 + [0] * 7])
    whole = model(ids, document_ids=documents).logits
    mask = torch.rand(3, 40).argsort(dim=1) < 30
    padded, named = (torch.zeros(3, 40, dtype=torch.long).masked_scatter(mask, x) for x in (ids, documents))
    for given, names, shown in ((ids, documents, None), (padded, named, mask)):
        cache, parts, begin = None, [], 0
        for width in (*cuts, given.shape[1] - 30):
            piece = slice(begin, begin + width)
            if width:
                seen = None if shown is None else shown[:, : begin + width]
                options = dict(document_ids=names[:, piece], past_key_values=cache, use_cache=True)
                out = model(given[:, piece], attention_mask=seen, **options)
                cache, begin = out.past_key_values, begin + width
                parts.append(out.logits)
        logits = torch.cat(parts, dim=1)
        assert relative_error(logits if shown is None else logits[shown].view(3, 30, -1), whole) < 1e-9
    plain = tiny_plain(model)
    assert 1e-6 < relative_error(whole, plain(ids, document_ids=documents).logits) < 0.3


def tiny_plain(model):
    """The same model with pairs as they are computed."""
    config = type(model.config).from_dict(model.config.to_dict() | {"state_dtype": None})
    plain = MosaicForCausalLM(config).double().eval()
    plain.load_state_dict(model.state_dict())
    return plain


@torch.no_grad()
def test_forward_with_a_state_dtype_computes_as_always_without_a_cache(model):
    ids = tokens(2, 30)
    assert torch.equal(model(ids, use_cache=False).logits, tiny_plain(model)(ids, use_cache=False).logits)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)], ids=str)
def test_generate_with_a_state_dtype_in_chunks_equals_whole(model, options):
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :6] = 0
    found = []
    for chunk in (None, 5):
        torch.manual_seed(11)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, prefill_chunk_size=chunk, **options))
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("time", [1, 4, 40])
def test_describe_counts_the_state_in_its_dtype(model, time):
    model = type(model)(model.config).float().eval()
    cache = model(tokens(1, time), use_cache=True).past_key_values
    held = 0
    for part in open_cache(cache, model.model.stack)[0].parts():
        if isinstance(part, Pairs):
            part.release()
            if part.limit is not None and part.used > part.limit:
                part.map(lambda x, n=part.limit: x[:, :, -n:])
        held += sum(x.numel() * x.element_size() for x in vars(part).values() if isinstance(x, torch.Tensor))
    assert model.describe(context_length=time)["state_bytes"] == held


def test_state_dtype_lets_no_gradient_through_stored_pairs():
    model = tiny_model(state_dtype="int8")
    head = model(tokens(1, 20), use_cache=True)
    embedding = model.model.embed_tokens.weight
    assert all(not x.requires_grad for x in pairs_of(head.past_key_values))
    loss = model(tokens(1, 5), past_key_values=head.past_key_values).logits.sum()
    assert torch.autograd.grad(loss, embedding)[0].isfinite().all()


def pairs_of(cache):
    found = [part for layer in cache.layers for part in layer.state.parts() if isinstance(part, Pairs)]
    return [x for part in found for x in vars(part).values() if isinstance(x, torch.Tensor)]


def test_state_dtype_is_saved_and_can_be_given_when_loading(tmp_path):
    model = tiny_model(torch.float32, state_dtype="int8")
    model.save_pretrained(tmp_path)
    assert MosaicForCausalLM.from_pretrained(tmp_path).config.state_dtype == "int8"
    for dtype, kept in (("bfloat16", torch.bfloat16), (None, torch.float32)):
        loaded = MosaicForCausalLM.from_pretrained(tmp_path, state_dtype=dtype)
        assert {x.dtype for x in pairs_of(loaded(tokens(1, 9), use_cache=True).past_key_values)} == {kept}


@pytest.mark.parametrize("wrong", ["int4", "float32", 8, ["int8"]])
def test_state_dtype_refuses_what_there_is_not(wrong):
    with pytest.raises(ValueError, match="state_dtype"):
        tiny_config(state_dtype=wrong)


def test_state_dtype_that_the_model_has_anyway_changes_nothing():
    models = [tiny_model(torch.bfloat16, scale=1.0, state_dtype=dtype) for dtype in (None, "bfloat16")]
    cut = []
    for model in models:
        with torch.no_grad():
            head = model(tokens(1, 20), use_cache=True)
            cut.append(model(tokens(1, 9, seed=1), past_key_values=head.past_key_values).logits)
    assert torch.equal(*cut)


def test_state_parts_are_all_states():
    cache = tiny_model()(tokens(1, 3), use_cache=True).past_key_values
    parts = list(cache.layers[0].state.parts())
    assert len(parts) == 5 and all(isinstance(part, State) for part in parts)  # the block, two memories, their pairs
