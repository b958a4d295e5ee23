"""A memory that is kept in a file answers as the whole prompt does."""

import pytest
import torch

from helpers import relative_error, tiny_model, tokens
from mosaics.memories.contract import Pairs
from mosaics.models.memory_file import fingerprint, load_memory, read_context, save_memory

PRESETS = ["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny", "transformer-tiny", "transformer-long-short-tiny"]
PRESETS += ["lla-tiny", "parallax-tiny"]


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    model = tiny_model(preset=request.param)
    model.generation_config.pad_token_id = 0
    return model


def keep(model, path, time=75, chunk=1000, **options):
    context = tokens(1, time)
    return context, save_memory(path, model, read_context(model, context, chunk), context, **options)


@torch.no_grad()
@pytest.mark.parametrize("time, chunk", [(1, 1000), (75, 1000), (75, 7), (300, 128)])
def test_load_memory_goes_on_as_the_whole_prompt_does(model, tmp_path, time, chunk):
    context, size = keep(model, tmp_path / "doc.memory", time, chunk)
    assert size == (tmp_path / "doc.memory").stat().st_size
    cache, kept = load_memory(tmp_path / "doc.memory", model)
    assert torch.equal(kept, context)
    question = tokens(1, 9, seed=5)
    whole = model(torch.cat([context, question], dim=1), use_cache=False).logits[:, time:]
    assert relative_error(model(question, past_key_values=cache).logits, whole) < 1e-9


@torch.no_grad()
def test_load_memory_answers_a_batch_of_questions_of_different_lengths(model, tmp_path):
    context, _ = keep(model, tmp_path / "doc.memory")
    questions = [tokens(1, length, seed=length) for length in (3, 8, 5)]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    prompts = [torch.cat([context, q], dim=1) for q in questions]
    whole = [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in prompts]
    cache, kept = load_memory(tmp_path / "doc.memory", model, batch_size=3)
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, q in enumerate(questions):
        ids[row, 8 - q.shape[1] :], mask[row, 8 - q.shape[1] :] = q, 1
    mask = torch.cat([torch.ones_like(kept), mask], dim=1)
    ids = torch.cat([kept, ids], dim=1)
    after = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for row, expected in enumerate(whole):
        assert torch.equal(after[row, -6:], expected[0, -6:])


@torch.no_grad()
def test_save_memory_leaves_the_cache_usable(model, tmp_path):
    context = tokens(1, 40)
    cache = read_context(model, context)
    save_memory(tmp_path / "doc.memory", model, cache, context)
    again, _ = load_memory(tmp_path / "doc.memory", model)
    question = tokens(1, 9, seed=5)
    first, second = (model(question, past_key_values=c).logits for c in (cache, again))
    assert torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("chunk", [7, 100])
def test_load_memory_goes_on_in_the_dtype_of_the_file(tmp_path, dtype, preset, chunk):
    model, plain = tiny_model(preset=preset, state_dtype=dtype), tiny_model(preset=preset)
    context, _ = keep(model, tmp_path / "doc.memory", chunk=chunk)
    question = tokens(1, 9, seed=5)
    whole = model(torch.cat([context, question], dim=1)).logits[:, 75:]
    for loaded in (model, plain):  # whatever the config of the model says
        cache, _ = load_memory(tmp_path / "doc.memory", loaded)
        assert relative_error(loaded(question, past_key_values=cache).logits, whole) < 1e-9
        parts = [part for layer in cache.layers for part in layer.state.parts() if isinstance(part, Pairs)]
        assert len(parts) >= 2 and all(str(part.keys.dtype) == f"torch.{dtype}" for part in parts)
    keep(plain, tmp_path / "plain.memory")
    cache, _ = load_memory(tmp_path / "plain.memory", model)
    expected = plain(torch.cat([context, question], dim=1)).logits[:, 75:]
    assert relative_error(model(question, past_key_values=cache).logits, expected) < 1e-9
    assert relative_error(whole, expected) > 1e-6


@torch.no_grad()
def test_save_memory_of_narrow_pairs_takes_less_and_stays_near(tmp_path):
    exact, size = None, {}
    for dtype in (None, "bfloat16", "int8"):
        model = tiny_model(torch.float32, scale=1.0, state_dtype=dtype)
        context, size[dtype] = keep(model, tmp_path / "doc.memory", time=400)
        logits = model(tokens(1, 9, seed=5), past_key_values=load_memory(tmp_path / "doc.memory", model)[0]).logits
        exact = logits if exact is None else exact
        # More than a read in bfloat16 may be off: rounded keys move logits by up to beta / 256.
        assert dtype is None or 0 < relative_error(logits, exact) < 4e-2
    assert size["int8"] < size["bfloat16"] < 0.7 * size[None]


def test_load_memory_refuses_a_dtype_that_is_none(tmp_path, monkeypatch):
    model = tiny_model()
    cache = read_context(model, context := tokens(1, 20))
    next(part for part in cache.layers[0].state.parts() if isinstance(part, Pairs)).dtype = "int4"
    save_memory(tmp_path / "doc.memory", model, cache, context)
    with pytest.raises(ValueError, match="doc.memory is damaged"):
        load_memory(tmp_path / "doc.memory", model)


def test_load_memory_refuses_another_model(tmp_path):
    model = tiny_model()
    keep(model, tmp_path / "doc.memory")
    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    without = tiny_model()
    without.remove_memories("long_term")
    for wrong in (other, without, tiny_model(num_hidden_layers=1)):
        assert fingerprint(wrong) != fingerprint(model)
        with pytest.raises(ValueError, match="another model"):
            load_memory(tmp_path / "doc.memory", wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_fingerprint_changes_with_every_weight(preset):
    model = tiny_model(torch.float32, preset=preset)
    known = fingerprint(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for place in range(0, parameter.numel(), max(1, parameter.numel() // 5)):
                value = parameter.view(-1)[place].item()
                parameter.view(-1)[place] = torch.nextafter(torch.tensor(value), torch.tensor(torch.inf))
                assert fingerprint(model) != known, (name, place)
                parameter.view(-1)[place] = value
    assert fingerprint(model) == known


def test_load_memory_names_the_format_of_another_version(tmp_path):
    model, path = tiny_model(), tmp_path / "doc.memory"
    keep(model, path)
    path.write_bytes(path.read_bytes().replace(b"mosaics-memory-3", b"mosaics-memory-2"))
    with pytest.raises(ValueError, match="format mosaics-memory-2 of another version"):
        load_memory(path, model)


def test_load_memory_refuses_what_is_damaged_or_something_else(tmp_path):
    model, path = tiny_model(), tmp_path / "doc.memory"
    with pytest.raises(OSError, match="there is no memory"):
        load_memory(path, model)
    keep(model, path)
    whole = bytearray(path.read_bytes())
    for place in (5, 60, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged|changed|another model|no memory"):
            load_memory(path, model)
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged"):
            load_memory(path, model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no memory that mosaics wrote"):
        load_memory(tmp_path / "model" / "model.safetensors", model)


def test_save_memory_refuses_another_context(tmp_path):
    model = tiny_model()
    cache = read_context(model, tokens(1, 20))
    with pytest.raises(ValueError, match="20 positions"):
        save_memory(tmp_path / "doc.memory", model, cache, tokens(1, 19))
    assert not list(tmp_path.iterdir())
