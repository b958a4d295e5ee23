"""Memories around the whole stack: the recurrence, and what a config says of them."""

import copy

import pytest
import torch

from helpers import relative_error, tiny_config, tiny_model, tokens
from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.memories import Context
from mosaics.models.cache import held_bytes, release
from mosaics.training.plan import plan
from mosaics.training.recipe import load_recipe


def recurrent(**options):
    return tiny_model(preset="rmt-tiny", **{"segment": 5, "memory_tokens": 3} | options)


def inside(model):
    """The same blocks without what is around them."""
    made = copy.deepcopy(model)
    made.remove_memories("rmt")
    return made


def written_out(model, ids):
    """The paper's recurrence, segment by segment: the hidden states of the tokens, and the memory of each segment."""
    blocks, around, found = inside(model).model, model.model.stack.around, []
    memory, size, read = around.memory.expand(len(ids), -1, -1), around.options.memory_tokens, []
    for segment in blocks.embed_tokens(ids).split(around.options.segment, dim=1):
        read.append(memory)
        answer = blocks(inputs_embeds=torch.cat([memory, segment, memory], dim=1)).last_hidden_state
        found.append(answer[:, size:-size])
        memory = answer[:, -size:]
    return torch.cat(found, dim=1), read


@pytest.mark.parametrize("time", [3, 5, 17])
def test_rmt_is_the_recurrence_of_the_paper(time):
    model, ids = recurrent(), tokens(2, time)
    whole = model.model(ids, use_cache=False).last_hidden_state
    assert relative_error(whole, written_out(model, ids)[0]) < 1e-13
    assert time <= 5 or relative_error(whole, inside(model).model(ids).last_hidden_state) > 1e-3


@torch.no_grad()
def test_rmt_shows_the_memory_that_each_segment_reads_and_how_far_it_moved():
    model, ids = recurrent(), tokens(3, 17)
    documents = torch.tensor([[0] * 17, [0] * 7 + [1] * 10, [0] * 17])
    mask = torch.tensor([[1] * 17, [1] * 17, [1] * 14 + [0] * 3])
    context = Context(reads=[])
    model.model(ids, mask, documents, use_cache=False, context=context)
    [read] = context.reads
    size, moved = read.traces["size of the memory"], read.traces["moved by the segment before"]
    for row, begin, end in ((0, 0, 17), (1, 0, 7), (1, 7, 17), (2, 0, 14)):
        _, memories = written_out(model, ids[row : row + 1, begin:end])
        for number, at in enumerate(range(begin, end, 5)):
            segment = slice(at, min(at + 5, end))
            expected = memories[number][0].norm(dim=-1)[:, None].expand(-1, segment.stop - at)
            assert relative_error(size[row, :, segment], expected) < 1e-9
            step = (memories[number] - memories[max(number - 1, 0)])[0].norm(dim=-1)
            assert (moved[row, :, segment] - step[:, None]).abs().max() < 1e-9 and (number == 0 or step.min() > 1e-3)
    assert not size[2, :, 14:].any(), "padding read nothing"


def test_rmt_learns_what_to_write_through_all_segments():
    model, ids = recurrent(), tokens(1, 17)
    model.requires_grad_(False)
    embeddings = model.model.embed_tokens(ids).requires_grad_()
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    [slope] = torch.autograd.grad(hidden[0, -1].square().sum(), embeddings)
    assert (slope[0].abs().amax(-1) > 0).all()


@torch.no_grad()
def test_rmt_state_does_not_grow_beyond_a_segment():
    model = recurrent()
    model.generation_config.pad_token_id = 0
    held = []
    for time in (9, 54):  # as far into a segment
        cache = model(tokens(1, time), use_cache=True).past_key_values
        release(cache)
        held.append(held_bytes(cache))
    assert held[0] == held[1] == model.model.stack.state_bytes(9, 8)


def test_auxiliary_losses_of_segments_count_by_their_tokens():
    options = {"num_attention_heads": 2, "balance": "layers", "balance_scale": 0.1}
    steps = [[{"type": "mom", "options": options}]]
    around = {"type": "rmt", "options": {"segment": 6, "memory_tokens": 2}}
    torch.manual_seed(0)
    config = MosaicConfig(vocab_size=61, hidden_size=16, blocks=[{"repeat": 1, "steps": steps}], around=around)
    model, ids = MosaicForCausalLM(config).double().train(), tokens(2, 10)
    found = Context(draw=0.5)
    model.model(ids, context=found)
    blocks, own, memory = inside(model).train().model, [], model.model.stack.around.memory.expand(2, -1, -1)
    for segment in blocks.embed_tokens(ids).split(6, dim=1):
        alone = Context(draw=0.5)
        # The last segment is open still, so nothing is written behind it.
        parts = [memory, segment, *[memory] * (segment.shape[1] == 6)]
        answer = blocks(inputs_embeds=torch.cat(parts, dim=1), context=alone).last_hidden_state
        own.append(sum(alone.auxiliary_losses))
        memory = answer[:, -2:]
    assert relative_error(sum(found.auxiliary_losses), 0.6 * own[0] + 0.4 * own[1]) < 1e-12


def test_around_is_a_part_of_the_config():
    config = tiny_config("rmt-tiny", segment=7, **{"rmt.memory_tokens": 2})
    assert config.segment == 7 and config.around["options"] == {"memory_tokens": 2, "segment": 7}
    assert config.settings()["rmt.segment"] == 7
    config.segment = 9
    assert MosaicConfig.from_dict(config.to_dict()).around["options"]["segment"] == 9
    assert config.memory_types() == {"attention", "feed_forward", "rmt"}
    assert config.changed("a config", segment=3).segment == 3
    model = MosaicForCausalLM(config)
    described = model.describe(context_length=20)
    assert described["parameters"]["by_kind"]["rmt"] == 2 * 16
    model.remove_memories("rmt")
    assert model.config.around is None and model.model.stack.around is None and config.around is not None


def test_a_plan_counts_what_stands_around():
    plans = [
        plan(load_recipe("memory-mosaics-v2-small", {"model.preset": f"{n}-tiny"}), gpus=2)
        for n in ("transformer", "rmt")
    ]
    assert plans[1]["parameters"] == plans[0]["parameters"] + 10 * 256
    assert 1.2 < plans[1]["memory_bytes"]["activations"] / plans[0]["memory_bytes"]["activations"] < 1.4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"around": {"type": "rmt", "options": {"segment": 0}}}, "give at least 1"),
        ({"around": {"type": "rmt", "options": {"segments": 3}}}, "no option 'segments'; did you mean 'segment'"),
        ({"around": {"type": "rtm"}}, "no memory of type 'rtm'; did you mean 'rmt'"),
        ({"around": {"type": "feed_forward", "options": {"intermediate_size": 3}}}, "one of a step"),
        ({"around": {"options": {}}}, "A memory has the keys"),
        ({"blocks": [{"repeat": 1, "steps": [[{"type": "rmt"}]]}]}, "one `around` the blocks"),
    ],
)
def test_what_can_not_stand_around_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MosaicForCausalLM(MosaicConfig(**{"vocab_size": 9, "hidden_size": 16} | changes))


@pytest.mark.parametrize("around", [{"options": {}}, {"type": 3}, {"type": "rmt", "options": []}])
def test_around_that_is_none_is_refused_before_options_are_set_in_it(around):
    with pytest.raises(ValueError, match="memory"):
        MosaicConfig.from_preset("rmt-tiny", around=around, segment=3)


def test_what_a_recurrent_memory_can_not_do_is_refused():
    model = recurrent()
    with pytest.raises(ValueError, match="with a memory around"):
        model(tokens(1, 4), output_hidden_states=True)
    with pytest.raises(ValueError, match="use a dynamic cache"):
        model.generate(tokens(1, 4), cache_implementation="static", max_new_tokens=2)
    plain = inside(model)
    with pytest.raises(ValueError, match="other memories than the model has"):
        plain(tokens(1, 4), past_key_values=model(tokens(1, 4), use_cache=True).past_key_values)
