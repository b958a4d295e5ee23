import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import VOCABULARY, tiny_model, tokens
from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.models import PRESETS
from mosaics.models.convert import from_llama, to_llama
from mosaics.models.matching import matched, width_option


def llama(**options):
    torch.manual_seed(2)
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    config = LlamaConfig(
        **{**sizes, "initializer_range": 0.3, "max_position_embeddings": 64, "pad_token_id": 0, **options}
    )
    return LlamaForCausalLM(config).eval()


VARIANTS = {
    "multi-head": {},
    "grouped": dict(num_key_value_heads=2),
    "tied, biases": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "other base and eps": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3),
    "wide heads, dropout": dict(head_dim=16, num_key_value_heads=1, attention_dropout=0.1),
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_from_llama_equals_llama(variant):
    theirs = llama(**VARIANTS[variant])
    ours, ids = from_llama(theirs), tokens(2, 40)
    expected = theirs(ids).logits
    assert (ours(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    for options in ({}, dict(num_beams=3), dict(prefill_chunk_size=7)):
        expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
        found = ours.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_to_llama_gives_back_the_same_llama(variant):
    theirs = llama(**VARIANTS[variant])
    ours = from_llama(theirs)
    back = to_llama(ours)
    assert ours.config.attention_dropout == back.config.attention_dropout == theirs.config.attention_dropout
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)
    assert torch.equal(back(tokens(1, 9)).logits, theirs(tokens(1, 9)).logits)


def test_from_llama_has_the_same_gradients():
    theirs = llama(num_key_value_heads=2).double()
    ours, ids = from_llama(theirs).train(), tokens(2, 20)
    theirs(ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()
    expected = theirs.model.layers[1].self_attn.k_proj.weight.grad
    found = ours.model.stack.blocks[1].steps[0].memories["attention"].k_proj.weight.grad
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # Llama rotates in float32


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rotary positions"),
        (dict(attention_bias=True), "biases in some"),
        (dict(hidden_act="gelu"), "activation"),
    ],
)
def test_from_llama_refuses_what_a_mosaic_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        from_llama(llama(**options))


@pytest.mark.parametrize("preset", ["memory-mosaics-v2-tiny", "transformer-long-short-tiny"])
def test_to_llama_refuses_other_arrangements(preset):
    with pytest.raises(ValueError, match="Llama"):
        to_llama(MosaicForCausalLM(MosaicConfig.from_preset(preset, num_hidden_layers=1)))


def test_to_llama_refuses_persistent_tokens():
    config = MosaicConfig.from_preset("transformer-tiny", num_hidden_layers=1, persistent_tokens=2)
    with pytest.raises(ValueError, match="persistent tokens"):
        to_llama(MosaicForCausalLM(config))


@pytest.mark.parametrize("options", [dict(learned_positions=9), dict(activation="gelu")])
def test_to_llama_refuses_positions_and_networks_that_are_none_of_its(options):
    config = MosaicConfig.from_preset("transformer-tiny", num_hidden_layers=1, **options)
    with pytest.raises(ValueError, match="SwiGLU networks and no learned positions"):
        to_llama(MosaicForCausalLM(config))


def test_transformer_large_has_the_size_of_the_paper():
    with torch.device("meta"):
        figures = MosaicForCausalLM(MosaicConfig.from_preset("transformer-large")).describe(256)
    assert abs(figures["parameters"]["total"] / 1e9 - 8.836) < 1e-3
    assert abs(figures["flops_per_token"] / 1e9 - 16.69) < 0.01


@pytest.mark.parametrize("by", ["parameters", "flops"])
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_matched_twins_are_equal(by, size):
    ours, twin = (MosaicConfig.from_preset(f"{name}-{size}") for name in ("memory-mosaics-v2", "transformer"))
    sizes = []
    for config in (ours, matched(twin, ours, by)):
        with torch.device("meta"):
            figures = MosaicForCausalLM(config).describe()
        sizes.append(figures["parameters"]["total"] if by == "parameters" else figures["flops_per_token"])
    assert abs(sizes[1] / sizes[0] - 1) < 2e-3
    assert matched(twin, ours, by).intermediate_size > twin.intermediate_size == ours.intermediate_size


def test_matched_widens_what_the_arrangement_has():
    ours, other = (MosaicConfig.from_preset(f"memory-mosaics-{v}-tiny", tie_word_embeddings=True) for v in ("v1", "v2"))
    found = matched(ours, other)
    sizes = []
    for config in (found, other):
        with torch.device("meta"):
            sizes.append(MosaicForCausalLM(config).describe()["parameters"]["total"])
    assert abs(sizes[0] / sizes[1] - 1) < 2e-3 and found.num_pairs > ours.num_pairs
    attention = [{"type": "attention", "options": {"num_attention_heads": 4}}]
    alone = MosaicConfig(vocab_size=9, hidden_size=8, blocks=[{"repeat": 1, "steps": [attention]}])
    with pytest.raises(ValueError, match="there are 0"):
        matched(alone, other)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_width_option_is_one_in_every_preset(preset):
    assert width_option(MosaicConfig.from_preset(preset)) in ("intermediate_size", "num_pairs")


def test_matched_refuses_a_size_out_of_reach():
    small = MosaicConfig.from_preset("transformer-tiny", num_hidden_layers=1, intermediate_size=8)
    with pytest.raises(ValueError, match="lower its number of blocks"):
        matched(MosaicConfig.from_preset("transformer-tiny"), small)
    with pytest.raises(ValueError, match="'flops'"):
        matched(small, small, by="time")


def test_transformer_any_split_padding_and_packing_change_nothing():
    from test_modeling_mosaic import cached, difference, plain

    torch.manual_seed(3)
    model = tiny_model()
    for preset in ("transformer-tiny", "transformer-long-short-tiny"):
        overrides = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        model = MosaicForCausalLM(MosaicConfig.from_preset(preset, **overrides)).double().eval()
        ids = tokens(2, 30)
        mask = torch.ones(2, 30, dtype=torch.bool)
        mask[0, :7], mask[1, [4, 11]] = False, False
        documents = torch.tensor([[0] * 12 + [1] * 18, [0] * 30])
        for pieces in ([30], [1] * 30, [8, 1, 21]):
            logits = cached(model, ids, pieces, mask.long(), documents)
            assert difference(logits[0, 7:12], plain(model, ids[:1, 7:12])[0]) < 1e-9
            assert difference(logits[0, 12:], plain(model, ids[:1, 12:])[0]) < 1e-9
            assert difference(logits[1, mask[1]], plain(model, ids[1:, mask[1]])[0]) < 1e-9
