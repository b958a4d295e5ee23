"""What an inspection says is what the tensors say, for every arrangement."""

import copy
import math

import pytest
import torch

from helpers import relative_error, tiny_model, tokens
from mosaics.inspection import inspect, inspection
from mosaics.models import PRESETS
from mosaics.models.memory_file import read_context
from mosaics.ops.kernel_regression import compiled

TINY = [name for name in PRESETS if name.endswith(("-tiny", "-nano"))]
TIME, ALL = 21, 600


@pytest.fixture(scope="module", params=TINY)
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def model(preset):
    return tiny_model(preset=preset)


@pytest.fixture(scope="module")
def found(model):
    torch.manual_seed(0)
    return model.inspect(tokens(1, TIME), top=ALL)


def logits_of_next(model, ids):
    logits = model(ids, use_cache=False).logits[0, :-1]
    return logits, logits.gather(-1, ids[0, 1:, None])[:, 0]


@torch.no_grad()
def test_inspect_forecasts_what_the_model_does(model, found):
    ids = tokens(1, TIME)
    logs = logits_of_next(model, ids)[0].log_softmax(-1)
    assert relative_error(found.forecasts.of_next[:-1], logs.gather(-1, ids[0, 1:, None])[:, 0]) < 1e-9
    assert math.isnan(found.forecasts.of_next[-1])
    assert torch.equal(found.forecasts.tokens[:-1, 0], logs.argmax(-1))
    assert relative_error(found.forecasts.log_probs[:-1], logs.topk(5).values) < 1e-9


@torch.no_grad()
def test_inspect_without_a_memory_is_the_model_that_it_was_removed_from(model, found):
    names = {memory.name for memory in model.model.stack.memories()}
    assert set(found.without) == (names if len(names) > 1 else set())
    ids = tokens(1, TIME)
    for name, forecasts in found.without.items():
        left = copy.deepcopy(model)
        left.remove_memories(name)
        logs = logits_of_next(left, ids)[0].log_softmax(-1)
        expected = logs.gather(-1, ids[0, 1:, None])[:, 0]
        assert relative_error(forecasts.of_next[:-1], expected) < 1e-9
        gain = found.forecasts.of_next[:-1] - expected
        assert relative_error(found.gain(name)[:-1], gain) < 1e-9 and gain.abs().max() > 1e-3


@torch.no_grad()
def test_inspect_direct_effects_sum_to_the_logit_of_the_next_token(model, found):
    _, expected = logits_of_next(model, tokens(1, TIME))
    if model.model.stack.around is not None:
        assert found.effects == {}, "the blocks saw other positions than those of the text"
        return
    assert relative_error(sum(found.effects.values())[:-1], expected) < 1e-9


@torch.no_grad()
def test_inspect_weights_are_those_of_the_whole_read(model, found):
    reads = model.read_weights(tokens(1, TIME))
    assert [(r.memory, r.layer_index, r.contextual) for r in reads] == [
        (r.memory, r.layer_index, r.contextual) for r in found.reads
    ]
    for read, own in zip(reads, found.reads, strict=True):
        weights = read.weights[0]
        assert relative_error(own.total, weights.sum(-1)) < 1e-9
        there = own.found >= 0
        whole = torch.zeros_like(weights)
        for head, position, place in there.nonzero().tolist():
            whole[head, position, own.found[head, position, place]] = own.weights[head, position, place]
        assert relative_error(whole, weights) < 1e-9
        sizes = own.weights.abs()
        assert (sizes[..., :-1] >= sizes[..., 1:]).all()
        if own.contextual:
            place = torch.arange(TIME)
            near = place[:, None] - place <= found.near
            assert relative_error(own.near, (weights * near).sum(-1)) < 1e-9
        shares = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp(min=1e-300)
        effective = torch.special.entr(shares).sum(-1).exp() * (weights != 0).any(-1)
        assert relative_error(own.effective, effective) < 1e-9


@torch.no_grad()
def test_inspect_effects_of_pairs_sum_to_those_of_heads_and_these_to_that_of_the_memory(model, found, preset):
    heads: dict = {}
    for read in found.reads:
        summed = read.effects[:, :-1].sum(-1)
        assert relative_error(summed, read.head_effects[:, :-1]) < 1e-9
        heads[read.layer_index, read.memory] = heads.get((read.layer_index, read.memory), 0) + summed.sum(0)
    for (layer, name), effect in heads.items():
        (memory,) = (m for m in model.model.stack.memories() if (m.layer_index, m.name) == (layer, name))
        if memory.type == "gam" or preset == "memory-mosaics-v1-nano":  # beside the pairs, a convolution; a bias
            continue
        assert relative_error(effect, found.effects[layer, name][:-1]) < 1e-9


@torch.no_grad()
def test_inspect_says_of_what_tokens_keys_are_averages(model, monkeypatch):
    raw, keys, handles = {}, {}, []

    def kept(of, place, x):  # that of the first pass, which is that of the whole model
        of.setdefault(place, x[0])
        return x

    for memory in model.model.stack.memories():
        place, of = (memory.layer_index, memory.name), getattr(memory, "key_extractor", memory)
        if not hasattr(of, "decay") and not hasattr(of, "key_decay"):
            continue
        proj = of.key_proj if of is memory else of.proj
        handles.append(proj.register_forward_hook(lambda _, __, y, place=place: kept(raw, place, y)))
        called = memory.keys if of is memory else of.forward
        owner, name = (memory, "keys") if of is memory else (of, "forward")
        monkeypatch.setattr(owner, name, lambda *x, f=called, place=place: kept(keys, place, f(*x)))
    monkeypatch.setattr(inspection, "HELD", TIME)
    monkeypatch.setattr(inspection, "LEAST", 0.0)
    whole = model.inspect(tokens(1, TIME)).averages
    for handle in handles:
        handle.remove()
    assert [(average.layer_index, average.memory) for average in whole] == list(raw)
    for average in whole:
        place = average.layer_index, average.memory
        assert relative_error(average.shares.sum(-1), torch.ones(average.shares.shape[:2]).double()) < 1e-9
        held = torch.zeros(*average.shares.shape[:2], TIME).double()
        held.scatter_add_(-1, average.found.clamp(min=0), average.shares)
        assert not held.triu(1).any()
        expected = held @ raw[place].unflatten(-1, (len(held), -1)).transpose(0, 1)
        expected = torch.nn.functional.normalize(expected, dim=-1)
        assert relative_error(keys[place], expected) < 1e-9


def test_held_is_what_gates_times_decays_say():
    gate, decay = 3 * torch.randn(3, 90).double(), -torch.rand(3, 90).double()
    decay[0, 40] = -torch.inf  # forgets all
    found, shares = inspection._held(gate, decay)
    weights = torch.zeros(3, 90, 90).double()
    for t in range(90):
        weights[:, t] = weights[:, t - 1] * decay[:, t, None].exp() if t else 0
        weights[:, t, t] = gate[:, t].exp()
    expected = (weights / weights.sum(-1, keepdim=True)).topk(4, dim=-1)
    there = expected.values >= 0.005
    assert torch.equal(found, torch.where(there, expected.indices, -1)) and 0.2 < there.double().mean() < 1
    assert relative_error(shares, expected.values * there) < 1e-9


def test_inspect_shows_what_memories_declare(model, found):
    for shown in found.shown:
        for trace in shown.traces.values():
            assert trace.dim() == 2 and trace.shape[1] == TIME and trace.isfinite().all()
        for shares in shown.maps.values():
            assert shares.shape[0] == TIME and torch.allclose(shares.sum(-1), torch.ones(()).double())
    seen = {read.memory for read in found.reads} | {shown.memory for shown in found.shown}
    stack = model.model.stack
    for memory in stack.memories() if stack.around is None else [stack.around]:
        assert memory.name in seen or memory.reach() == (0, 0) or plain(memory)


def plain(memory):
    """A sum of outer products without gates has nothing to declare."""
    return memory.type == "delta_rule" and memory.options.write == "hebbian" and memory.options.decay == "none"


@torch.no_grad()
def test_inspect_in_blocks_is_inspect_at_once(model, found, monkeypatch):
    monkeypatch.setattr(inspection, "BLOCK", 5)
    monkeypatch.setattr(inspection, "PIECE", 4)
    monkeypatch.setattr(compiled, "pays", lambda queries: False)  # from weights that are written out
    cut = model.inspect(tokens(1, TIME), top=3)
    for own, whole in zip(cut.reads, found.reads, strict=True):
        assert relative_error(own.weights, whole.weights[..., :3]) < 1e-9
        assert relative_error(own.head_effects[:, :-1], whole.head_effects[:, :-1]) < 1e-9
        assert relative_error(own.effective, whole.effective) < 1e-9
        assert torch.equal(own.found, whole.found[..., :3]) and torch.equal(own.pairs, whole.pairs)
        for one, other in zip(own.numbers, whole.numbers, strict=True):
            assert one.kind == other.kind and torch.allclose(
                torch.tensor(one[:-1]), torch.tensor(other[:-1]), equal_nan=True
            )
    assert relative_error(cut.forecasts.of_next[:-1], found.forecasts.of_next[:-1]) < 1e-9


@torch.no_grad()
def test_inspect_after_a_context_is_inspect_of_the_whole(model, found):
    begun, ids = 9, tokens(1, TIME)
    cache = read_context(model, ids[:, :begun])
    for _ in range(2):  # the cache stays as it is
        after = model.inspect(ids[:, begun:], cache, ids[:, :begun], top=ALL)
        assert relative_error(after.forecasts.of_next[:-1], found.forecasts.of_next[begun:-1]) < 1e-9
    for own, whole in zip(after.reads, found.reads, strict=True):
        assert relative_error(own.weights, whole.weights[:, begun:]) < 1e-9
        clear = whole.weights[:, begun:] > 1e-6  # others may change places
        assert torch.equal(own.found[clear], whole.found[:, begun:][clear])
        assert relative_error(own.head_effects[:, :-1], whole.head_effects[:, begun:-1]) < 1e-9
    for own in after.averages:
        assert (own.found[:, 0, 0] == begun).all() and ((own.found < 0) | (own.found >= begun)).all()
    for own, whole in zip(after.shown, found.shown, strict=True):
        for name, trace in own.traces.items():
            assert relative_error(trace, whole.traces[name][:, begun:]) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("preset", ["memory-mosaics-v2-tiny", "transformer-tiny"])
def test_inspect_numbers_of_heads_are_means_over_positions(preset):
    model, ids = tiny_model(preset=preset), tokens(1, 60) % 7
    found, now, place = model.inspect(ids), ids[0], torch.arange(60)
    back = place[:, None] - place
    same = (now[:, None] == now) & (back > 0)
    behind = (now[:, None] == now.roll(1)) & (back > 0) & (place > 0)
    for read, own in zip(model.read_weights(ids), found.reads, strict=True):
        weights, count = read.weights[0], own.pairs
        first, end = (x.expand(60) if x.dim() == 1 else x[0] for x in read.span)
        there = (place >= first[:, None]) & (place < end[:, None])
        assert torch.equal(count, there.sum(-1))
        for head, numbers in enumerate(own.numbers):
            each = weights[head]
            both = []
            for mask in (same, behind):
                chance = (mask & there).sum(-1) / count.clamp(min=1)
                both.append((float((each * mask).sum(-1)[chance > 0].mean()), float(chance[chance > 0].mean())))
            expected = dict(
                near=(each * (back <= found.near)).sum(-1)[count > 0].mean(),
                evenness=(own.effective[head] / count.clamp(min=1))[count > 1].mean(),
                repeats=max(both)[0],
                repeats_by_chance=max(both)[1],
                distance=(each * back).sum(-1)[count > 0].mean(),
            )
            for name, value in expected.items():
                assert getattr(numbers, name) == pytest.approx(float(value), rel=1e-6), name


def test_inspect_refuses_what_is_no_text():
    model = tiny_model()
    for ids, said in ((tokens(2, 4), "one text"), (tokens(1, 0), "one text"), (tokens(1, 4)[None], "one text")):
        with pytest.raises(ValueError, match=said):
            model.inspect(ids)
    with pytest.raises(ValueError, match="top is 0"):
        model.inspect(tokens(1, 4), top=0)
    with pytest.raises(ValueError, match="same context"):
        model.inspect(tokens(1, 4), read_context(model, tokens(1, 5)), tokens(1, 4))


def test_inspect_leaves_the_model_as_it_was():
    model = tiny_model().train()
    inspect(model, tokens(1, 5)[0])
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "kind, weights",
    [
        ("recent", lambda t, ids: {t - 1: 0.9, 0: 0.1}),
        ("uniform", lambda t, ids: {i: 1 / t for i in range(t)}),
        ("document-wide", lambda t, ids: {0: 0.9, 1: 0.1}),
        ("induction-like", lambda t, ids: {max((i for i in range(t) if ids[i] == ids[t]), default=0): 1.0}),
        ("induction-like", lambda t, ids: {max((i for i in range(1, t) if ids[i - 1] == ids[t]), default=0): 1.0}),
        ("silent", lambda t, ids: {}),
    ],
)
def test_digest_tells_kinds_of_readers_apart(kind, weights):
    from mosaics.inspection.inspection import Digest
    from mosaics.memories import Read

    time = 60
    ids = torch.arange(time) % 20
    table = torch.zeros(1, 1, time, time)
    for t in range(1, time):
        for i, w in weights(t, ids).items():
            table[0, 0, t, i] = w
    digest = Digest(ids, 0, torch.zeros(time, 4), 4, 2)
    span = torch.zeros(time), torch.arange(time) * (kind != "silent")
    digest.append(Read("a", 0, lambda positions: (table[:, :, positions], 0), time, span))
    (numbers,) = digest.reads[0].numbers
    assert numbers.kind == kind
