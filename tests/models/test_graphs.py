"""Graphs of a model that serve every input: exported ones, and that of a decoding step."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers import tiny_model, tokens

PRESETS = ["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny", "transformer-tiny"]


def exported(model, *, dynamic=True, **given):
    length = {1: torch.export.Dim("time", min=2, max=4096)} if dynamic else None
    shapes = {name: length for name in given} | {"use_cache": None} if dynamic else None
    program = torch.export.export(model, (), {"use_cache": False, **given}, dynamic_shapes=shapes)
    assert not [node for node in program.graph.nodes if "mosaics" in str(node.target)]
    return lambda **given: program.module()(use_cache=False, **given).logits


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_exported_model_equals_the_model_at_any_length(preset):
    model = tiny_model(preset=preset, num_hidden_layers=1)
    program = exported(model, input_ids=tokens(2, 20))
    for length in (2, 20, 61, 130):
        ids = tokens(2, length, seed=length)
        torch.testing.assert_close(program(input_ids=ids), model(ids).logits, rtol=1e-9, atol=1e-9)


def test_exported_model_of_one_length_equals_the_model():
    model = tiny_model(num_hidden_layers=1)
    program = exported(model, dynamic=False, input_ids=tokens(2, 40))
    ids = tokens(2, 40, seed=1)
    torch.testing.assert_close(program(input_ids=ids), model(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_exported_model_takes_any_padding_and_documents():
    model = tiny_model(num_hidden_layers=1)
    given = [
        dict(
            input_ids=tokens(3, length, seed=length),
            attention_mask=torch.rand(3, length) < share,
            document_ids=(torch.rand(3, length) < border).cumsum(1),
        )
        for length, share, border in ((20, 0.7, 0.2), (33, 2.0, 0.0), (9, 0.5, 0.5), (14, 2.0, 0.3))
    ]
    program = exported(model, **given[0])
    for one in given:
        torch.testing.assert_close(program(**one), model(**one).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_decoding_step_is_one_graph_for_all_tokens(preset, padded):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(preset=preset, num_hidden_layers=1)
    step = torch.compile(model, backend="eager", fullgraph=True)
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[0, :3] = 0
    caches = StaticCache(model.config, max_cache_len=30), DynamicCache(config=model.config)
    with torch.no_grad():
        for begin, end in ((0, 17), *((t, t + 1) for t in range(17, 24))):
            given = {"attention_mask": mask[:, begin:end]} if padded else {}
            found, expected = (
                run(ids[:, begin:end], past_key_values=cache, **given).logits
                for run, cache in zip((step if begin else model, model), caches, strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
