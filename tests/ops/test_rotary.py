"""Rotary positions, against transformers."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from helpers import relative_error
from mosaics.ops.rotary import SCALINGS, frequencies, rotated


@pytest.mark.parametrize("width, base", [(2, 10000.0), (16, 10000.0), (64, 500000.0), (128, 10000.0)])
@pytest.mark.parametrize("trained", [64, 4096])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0, 32.0])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_those_of_transformers(scaling, width, base, trained, factor):
    rope = dict(rope_type=scaling, rope_theta=base, factor=factor)
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = trained
    config = LlamaConfig(hidden_size=width, num_attention_heads=1, head_dim=width, rope_parameters=rope)
    config.max_position_embeddings = int(trained * factor)
    expected, sharper = ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))
    found, own = frequencies(width, base, scaling, factor, trained)
    assert relative_error(found, expected) < 1e-5 and own == pytest.approx(sharper)


def test_rotated_is_that_of_llama():
    rope = dict(rope_theta=1e4, rope_type="default")
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, rope_parameters=rope)
    queries, keys = torch.randn(2, 3, 2, 40, 16)
    positions = torch.stack([torch.arange(40), torch.arange(5, 45), torch.arange(100, 140)])
    cos, sin = LlamaRotaryEmbedding(config)(queries, positions)
    angles, factor = frequencies(16, 1e4)
    expected = apply_rotary_pos_emb(queries, keys, cos, sin)
    found = [rotated(x, positions, angles, factor) for x in (queries, keys)]
    assert all(relative_error(f, e) < 1e-5 for f, e in zip(found, expected, strict=True))
    assert relative_error(rotated(queries, positions, angles, 1.5), 1.5 * expected[0]) < 1e-5
