"""Heads that read farthest are found and silenced, and they alone."""

import pytest
import torch

from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.experiments.silenced import silence_longest


def made(preset, **options):
    torch.manual_seed(0)
    config = MosaicConfig.from_preset(preset, num_hidden_layers=2, vocab_size=50, **options)
    return MosaicForCausalLM(config).eval(), torch.randint(0, 50, (2, 14))


def distances(model, ids):
    """How many tokens back each head reads, without the first one, as the words say it."""
    found = {}
    for read in model.read_weights(ids):
        weights = read.weights.tolist()
        for head in range(read.weights.shape[1]):
            far = weight = 0.0
            for row in range(ids.shape[0]):
                for t in range(ids.shape[1]):
                    for s in range(1, t + 1):
                        w = weights[row][head][t][s]
                        far, weight = far + w * (t - s), weight + w
            found[read.layer_index, read.memory, head] = far / weight
    return found


@pytest.mark.parametrize("options", ({}, {"positions": "alibi"}, {"window": 5}, {"num_key_value_heads": 2}))
@pytest.mark.parametrize("share", (0.25, 0.5))
def test_silence_longest_silences_what_reads_farthest_and_nothing_else(options, share):
    model, ids = made("transformer-tiny", **options)
    for name, parameter in model.named_parameters():  # heads that differ
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 8
    far = distances(model, ids)
    expected = sorted(far, key=far.get, reverse=True)[: round(share * len(far))]
    memories = {(memory.layer_index, memory.name): memory for memory in model.model.stack.memories()}
    memories = {place: memory for place, memory in memories.items() if place in {of[:2] for of in far}}

    def without(block, name):
        def hook(_, given):
            heads = given[0].unflatten(-1, (sum(of[:2] == (block, name) for of in far), -1)).clone()
            for head in (head for *of, head in expected if tuple(of) == (block, name)):
                heads[..., head, :] = 0
            return heads.flatten(-2)

        return hook

    handles = [m.o_proj.register_forward_pre_hook(without(*place)) for place, m in memories.items()]
    wanted = model(ids).logits
    for handle in handles:
        handle.remove()
    before = model(ids).logits
    assert silence_longest(model, ids, share) == expected
    assert torch.allclose(model(ids).logits, wanted, atol=1e-5) and not torch.allclose(before, wanted, atol=1e-3)


def test_silence_longest_leaves_all_with_a_share_of_nothing():
    model, ids = made("transformer-tiny")
    before = model(ids).logits
    assert silence_longest(model, ids, 0.0) == [] and torch.equal(model(ids).logits, before)


def test_silence_longest_refuses_memories_without_a_map_of_heads():
    model, ids = made("memory-mosaics-v2-tiny")
    with pytest.raises(ValueError, match="can't be silenced alone"):
        silence_longest(model, ids, 0.5)
