"""Titans with attention, against its equations token by token."""

import pytest
import torch
import torch.nn.functional as F

from helpers import relative_error
from mosaics.memories import Common, Context, Layout
from mosaics.memories.contract import build
from mosaics.ops.rotary import frequencies, rotated

WIDTH, HEADS = 8, 2
LEARNING = dict(num_attention_heads=HEADS, chunk=3)


def made(name, **options):
    torch.manual_seed(1)
    memory = build(name, {**LEARNING, **options}, Common(WIDTH), 0).double()
    with torch.no_grad():
        memory.reset_parameters(0)
        for parameter in memory.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return memory


def whole(memory, x):
    return memory(x, Layout(*x.shape[:2]), None, Context())[0]


def normed(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def product(memory, y, learnt):
    return y * F.silu(normed(learnt, memory.learning_scale))


def test_titans_mag_is_normed_attention_times_what_was_learnt():
    memory, x = made("titans_mag", window=4), torch.randn(2, 11, WIDTH, dtype=torch.float64)
    y = normed(whole(memory.attention, x), memory.attention_scale)
    assert memory.attention.options.window == 4 and memory.attention.persistent.shape == (4, WIDTH)
    assert relative_error(whole(memory, x), product(memory, y, whole(memory.learning, x))) < 1e-12


def attended(memory, queries, keys, places):
    """Softmax attention of the last of `queries` `(n, d)` on vectors `keys` at `places`, and on persistent tokens."""
    attention = memory.attention
    split = lambda z: z.unflatten(-1, (HEADS, -1)).transpose(0, 1)  # noqa: E731
    query, key, value = split(attention.q_proj(queries)), split(attention.k_proj(keys)), split(attention.v_proj(keys))
    angles, _ = frequencies(WIDTH // HEADS, attention.common.rotary_base, dtype=torch.float64)
    turned = rotated(query[None, :, -1:], places[-1:][None], angles)[0]
    logits = turned @ rotated(key[None], places[None], angles)[0].mT
    if attention.persistent is not None:
        learned = split(attention.k_proj(attention.persistent))
        logits = torch.cat([query[:, -1:] @ learned.mT, logits], dim=-1)
        value = torch.cat([split(attention.v_proj(attention.persistent)), value], dim=1)
    read = (logits / (WIDTH // HEADS) ** 0.5).softmax(-1) @ value
    return attention.o_proj(read.transpose(0, 1).flatten(1))[0]


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("segment", [1, 4, 20])
def test_titans_mac_is_its_equations_token_by_token(segment, persistent):
    memory = made("titans_mac", segment=segment, persistent_tokens=persistent)
    x = torch.randn(1, 11, WIDTH, dtype=torch.float64)
    asked = F.silu(memory.retrieve_proj(x[0]))
    back = F.pad(asked, (0, 0, 3, 0))
    asked = sum(back[j : j + 11] * memory.retrieve_convolution.weight[:, j] for j in range(4))
    asked = asked.unflatten(-1, (HEADS, -1))
    asked = asked / (asked.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    ys, expected, retrieved = [], [], []
    for t in range(11):
        begin = t // segment * segment
        weights = [w.to(torch.float64) for w in memory.learning.maps.weights]
        if begin:  # M_{i-1}: all of the segments before were learnt
            state = memory.learning.initial_state()
            _, state = memory.learning(torch.stack(ys[:begin])[None], Layout(1, begin), state, Context())
            weights = [part.current[0] for part in state.maps]
        h = torch.stack([F.gelu(asked[t, i] @ weights[0][i]) @ weights[1][i] for i in range(HEADS)])
        retrieved.append(normed(h, memory.retrieved_scale).flatten())
        # Up to the token itself, what was retrieved stands before each token.
        pairs = torch.stack([torch.stack(retrieved[begin:]), x[0, begin : t + 1]], dim=1).flatten(0, 1)
        y = attended(memory, pairs, pairs, torch.arange(len(pairs)))
        ys.append(normed(y, memory.attention_scale))
        learnt = whole(memory.learning, torch.stack(ys)[None])[0, -1]
        expected.append(product(memory, ys[-1], learnt))
    assert relative_error(whole(memory, x)[0], torch.stack(expected)) < 1e-9


def test_titans_mac_is_told_of_earlier_segments_by_what_was_learnt_alone():
    """Without what was retrieved, attention forgets what the segment before held."""
    memory, x = made("titans_mac", segment=4), torch.randn(1, 8, WIDTH, dtype=torch.float64).requires_grad_()
    seen = []
    memory.attention.register_forward_hook(lambda _, given, answer: seen.append(answer[0]))
    whole(memory, x)
    (reached,) = torch.autograd.grad(seen[1][0, 1::2].sum(), x, retain_graph=True)
    assert (reached[0, :4] != 0).any()
    with torch.no_grad():
        memory.retrieved_scale.zero_()
    whole(memory, x)
    (reached,) = torch.autograd.grad(seen[3][0, 1::2].sum(), x)
    assert (reached[0, :4] == 0).all() and (reached[0, 4:] != 0).any()


def test_titans_mac_reports_no_pairs_and_mag_does_by_its_own_name():
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    for name, options, reads in (("titans_mac", dict(segment=4), []), ("titans_mag", dict(window=4), [True, False])):
        memory, context = made(name, **options), Context(reads=[])
        memory.name = "own"
        memory(x, Layout(1, 6), None, context)
        found = [(read.memory, read.contextual) for read in context.reads if read.rows is not None]
        assert found == [("own", kind) for kind in reads]


@pytest.mark.parametrize("name, options", [("titans_mac", dict(segment=0)), ("titans_mag", dict(window=0))])
def test_titans_blocks_refuse_impossible_sizes(name, options):
    with pytest.raises(ValueError, match="give"):
        build(name, {**LEARNING, **options}, Common(WIDTH), 0)
    with pytest.raises(ValueError, match="give 0 or more"):
        build(name, {**LEARNING, "persistent_tokens": -1}, Common(WIDTH), 0)
