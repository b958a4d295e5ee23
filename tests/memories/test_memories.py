import copy
import math
import sys

import pytest
import torch
from torch import nn

from helpers import gradients, relative_error
from mosaics.memories import REGISTRY, Around, Common, Context, Layout, Rows, Stack
from mosaics.memories.contract import build
from mosaics.memories.mosaic.common import mapped
from mosaics.ops.kernel_regression import kernel_regression

OPTIONS = {
    "attention": dict(num_attention_heads=4, num_key_value_heads=2, window=5, delay=1),
    "short_term": dict(num_attention_heads=2, window=5),
    "long_term": dict(num_attention_heads=2, delay=3, train_delay=[3, 5]),
    "feed_forward": dict(intermediate_size=12),
    "leaky_contextual": dict(num_attention_heads=2),
    "kernel_persistent": dict(num_attention_heads=2, num_pairs=11, num_banks=2),
    "delta_rule": dict(num_attention_heads=2, write="delta", decay="head", unit_keys=True, convolution=3, gate="silu"),
    "mamba2": dict(num_attention_heads=4, state_width=5),
    "ttt": dict(num_attention_heads=2, chunk=4),
    "titans": dict(num_attention_heads=2, chunk=4),
    "lla": dict(num_attention_heads=4, num_key_value_heads=2),
    "parallax": dict(num_attention_heads=4, num_key_value_heads=2),
    "miras": dict(num_attention_heads=2, chunk=4, loss="l_p", retention="l_q"),
    "titans_mag": dict(num_attention_heads=2, chunk=4, window=5),
    "titans_mac": dict(num_attention_heads=2, chunk=4, segment=6),
    "gam": dict(slots=5),
    "mom": dict(num_attention_heads=2, convolution=3),
    "lattice": dict(num_attention_heads=2, chunk=4, slots=3),
    "omega": dict(num_attention_heads=4, window=3, chunk=4),
    "deep_attention": dict(num_attention_heads=2, chunk=4),
}
TABLE_6 = ("attention", "short_term", "long_term", "feed_forward")
CASES = {name: (name, {}) for name in OPTIONS} | {
    "miras, huber": ("miras", dict(loss="huber", retention="l2")),
    "miras, kl": ("miras", dict(loss="l2", retention="kl")),
    "mom, one of three": ("mom", dict(memories=3, routed=1, single_maps=True)),
    "lattice, encoding": ("lattice", dict(form="encoding")),
    "lattice, similarity": ("lattice", dict(form="similarity", renormalised=False)),
    "omega, muon": ("omega", dict(network="gated", momentum=True, orthogonal=5)),
    "omega, dot": ("omega", dict(network="linear", loss="dot", degree=1, window=2, gates="place")),
    "deep attention, windows": ("deep_attention", dict(loss="l2", window=6)),
    "deep attention, one map": ("deep_attention", dict(network="linear", loss="l2", window=3, decay=False)),
    "attention, alibi": ("attention", dict(positions="alibi")),
    "attention, no positions": ("attention", dict(positions="none")),
    "attention, persistent tokens": ("attention", dict(persistent_tokens=3)),
    "attention, yarn": (
        "attention",
        dict(head_dim=8, rotary_scaling="yarn", rotary_factor=4.0, rotary_trained_length=8),
    ),
}


def memory(name, width=8, layer_index=0, **options):
    torch.manual_seed(1)
    made = build(name, {**OPTIONS[name], **options}, Common(width), layer_index).double()
    with torch.no_grad():
        made.reset_parameters(layer_index)
    return made


def test_cases_have_every_registered_memory():
    assert {name for name, _ in CASES.values()} == {n for n, kind in REGISTRY.items() if not issubclass(kind, Around)}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("pieces", [[30], [1] * 30, [4, 1, 17, 8]])
def test_memory_any_cut_equals_whole(case, pieces):
    name, options = CASES[case]
    made, x = memory(name, **options), torch.randn(2, 30, 8, dtype=torch.float64)
    whole, none = made(x, Layout(2, 30), None, Context())
    assert none is None
    state, begin, parts = made.initial_state(), 0, []
    for piece in pieces:
        y, state = made(x[:, begin : begin + piece], Layout(2, piece, stored=begin), state, Context())
        parts.append(y)
        begin += piece
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("lengths", [(9, 14), (14, 2, 9), (1, 3), (5, 5)])
def test_memory_rows_of_joined_states_go_on_as_each_alone(case, lengths):
    name, options = CASES[case]
    made, x = memory(name, **options), torch.randn(len(lengths), 30, 8, dtype=torch.float64)
    whole, _ = made(x, Layout(len(lengths), 30), None, Context())
    states = []
    for row, length in zip(x, lengths, strict=True):
        _, state = made(row[None, :length], Layout(1, length), made.initial_state(), Context())
        states.append(state)
    joined = None if states[0] is None else states[0].join(states[1:])
    rows, stored = Rows(torch.tensor(lengths)), max(lengths)
    for step in range(12):
        if joined is not None and step == 8:  # what was joined can be taken apart and joined again
            alone = [copy.deepcopy(joined) for _ in lengths]
            for row, state in enumerate(alone):
                state.select(torch.tensor([row]))
            joined = alone[0].join(alone[1:])
        now = torch.stack([row[length + step] for row, length in zip(x, lengths, strict=True)])[:, None]
        layout, _, rows = Layout.of(len(lengths), 1, rows=rows, stored=stored + step)
        y, joined = made(now, layout, joined, Context())
        for i, length in enumerate(lengths):
            assert relative_error(y[i, 0], whole[i, length + step]) < 1e-9
    for i, (state, length) in enumerate(zip(states, lengths, strict=True)):  # and they are as they were
        y, _ = made(x[i : i + 1, length : length + 1], Layout(1, 1, stored=length), state, Context())
        assert relative_error(y[0, 0], whole[i, length]) < 1e-9


def test_state_join_refuses_states_of_different_kinds():
    made = memory("long_term")
    states = []
    for dtype in (None, "bfloat16"):
        state = made.initial_state()
        state.pairs.dtype = dtype
        states.append(made(torch.randn(1, 5, 8, dtype=torch.float64), Layout(1, 5), state, Context())[1])
    for first, second in (states, states[::-1], (states[0], made.initial_state()), (made.initial_state(), states[0])):
        with pytest.raises(ValueError, match="keep them apart"):
            first.join([second])


@pytest.mark.parametrize("case", sorted(CASES))
def test_memory_gradient_through_the_state_equals_whole(case):
    name, options = CASES[case]
    made, x = memory(name, **options), torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    whole, _ = made(x, Layout(1, 20), None, Context())
    first, state = made(x[:, :9], Layout(1, 9), made.initial_state(), Context())
    second, _ = made(x[:, 9:], Layout(1, 11, stored=9), state, Context())
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    (found,) = torch.autograd.grad(torch.cat([first, second], dim=1).square().sum(), x)
    assert relative_error(found, expected) < 1e-9


def test_long_term_memory_draws_every_delay_between_both_ends_equally():
    made = memory("long_term", train_delay=[3, 5])
    drawn = [made.delay(Context(draw=i / 300)) for i in range(300)]
    assert [drawn.count(delay) for delay in (2, 3, 4, 5, 6)] == [0, 100, 100, 100, 0]
    assert made.delay(Context()) == 3


def test_short_term_memory_reads_the_pairs_of_equation_10():
    made, context = memory("short_term", window=4), Context(reads=[])
    made(torch.randn(1, 10, 8, dtype=torch.float64), Layout(1, 10), None, context)
    read = context.reads[0].weights[0, 0]
    assert {t: (read[t] > 0).nonzero()[:, 0].tolist() for t in (0, 1, 3, 9)} == {
        0: [],
        1: [0],
        3: [0, 1, 2],
        9: [6, 7, 8],
    }


@pytest.mark.parametrize("draw, delay", [(None, 3), (0.99, 5)])
def test_long_term_memory_reads_all_pairs_up_to_the_delay(draw, delay):
    made, context = memory("long_term"), Context(reads=[], draw=draw)
    made(torch.randn(1, 10, 8, dtype=torch.float64), Layout(1, 10), None, context)
    read = context.reads[0].weights[0, 0]
    for t in range(10):
        assert (read[t] > 0).nonzero()[:, 0].tolist() == list(range(max(0, t - delay + 1)))


@pytest.mark.parametrize("name", ["short_term", "long_term"])
def test_contextual_memory_reads_what_equations_8_and_9_store(name):
    """One head computed by hand from the parameters: keys, values, bandwidth, read, output map."""
    made = memory(name, num_attention_heads=1)
    with torch.no_grad():
        for parameter in (made.bandwidth_base, made.bandwidth_slope, made.bandwidth_exponent, made.value_scale):
            parameter.add_(0.3)
    x = torch.randn(9, 8, dtype=torch.float64)
    out, _ = made(x[None], Layout(1, 9), None, Context())
    gate, decay = made.key_gate(x)[:, 0].exp(), (-made.key_decay(x)[:, 0].abs()).exp()
    average, keys = torch.zeros(8, dtype=torch.float64), []
    for t in range(9):
        average = gate[t] * made.key_proj(x[t]) + decay[t] * average
        keys.append(average / average.norm())
    raw, mix = made.value_proj(x), made.value_mix[0]
    for t in range(9):
        reachable = range(max(0, t - 4), t) if name == "short_term" else range(t - 3 + 1)
        answer = torch.zeros(8, dtype=torch.float64)
        if len(reachable):
            beta = math.exp(1.8) * len(reachable) ** (1 / 3 + 0.3) + math.exp(1.8)
            weights = torch.stack([beta * keys[t] @ keys[i] for i in reachable]).softmax(0)
            for weight, i in zip(weights, reachable, strict=True):
                value = mix * raw[i] + (1 - mix) * raw[i + 1]
                answer = answer + weight * math.exp(0.3) * value / value.norm()
        assert relative_error(out[0, t], made.out_proj(answer)) < 1e-9


def test_memory_reset_parameters_clamps_and_does_not_draw_again():
    wide = memory("feed_forward", width=256, intermediate_size=512).up_proj.weight
    share = (wide.abs() >= 3 / math.sqrt(512) * (1 - 1e-9)).double().mean().item()
    assert 0.0015 < share < 0.0045  # 0.27 % of a normal lies beyond three deviations


def test_contextual_memory_bandwidth_is_clamped():
    made = memory("short_term")
    with torch.no_grad():
        made.bandwidth_base.fill_(50)
        made.bandwidth_slope.fill_(50)
        made.bandwidth_exponent.fill_(-7)
        made.value_scale.fill_(99)
    assert made.bandwidth().base.max() == math.exp(10) and made.bandwidth().exponent.max() == 1
    assert torch.isfinite(made(torch.randn(1, 6, 8, dtype=torch.float64), Layout(1, 6), None, Context())[0]).all()


def test_contextual_memory_value_scale_can_move_from_its_start():
    made = memory("short_term")
    out, _ = made(torch.randn(1, 6, 8, dtype=torch.float64), Layout(1, 6), None, Context())
    out.square().sum().backward()
    assert (made.value_scale.grad != 0).all()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("short", {}, "did you mean 'short_term'"),
        ("short_term", dict(num_attention_heads=2, windows=3), "did you mean 'window'"),
        ("short_term", dict(window=3), "needs the option 'num_attention_heads'"),
        ("short_term", dict(num_attention_heads=2, window="3"), "of type int"),
        ("short_term", dict(num_attention_heads=2, window=1), "at least 2"),
        ("short_term", dict(num_attention_heads=3), "not a multiple"),
        ("long_term", dict(num_attention_heads=2, delay=0), "at least 1"),
        ("long_term", dict(num_attention_heads=2, train_delay=[9, 3]), "smaller delay first"),
        ("long_term", dict(num_attention_heads=2, train_delay=[9]), "of type tuple"),
        ("feed_forward", dict(intermediate_size=0), "at least 1"),
        ("feed_forward", dict(intermediate_size=3, activation="swigl"), "did you mean 'swiglu'"),
        ("mom", dict(num_attention_heads=3), "not a multiple"),
        ("mom", dict(num_attention_heads=2, memories=2, routed=3), "from 1 to as many as there are memories, 2"),
        ("mom", dict(num_attention_heads=2, convolution=0), "at least 1"),
        ("mom", dict(num_attention_heads=2, key_width=0), "at least 1"),
        ("mom", dict(num_attention_heads=2, balance="layer"), "did you mean 'layers'"),
        ("mom", dict(num_attention_heads=2, balance_scale=-1.0), "0 or more"),
        ("gam", dict(slots=0), "at least 1 of each"),
        ("gam", dict(convolution=0), "at least 1 of each"),
        ("gam", dict(bandwidth=0.0), "above 0"),
        ("leaky_contextual", dict(num_attention_heads=3), "not a multiple"),
        ("leaky_contextual", dict(num_attention_heads=2, unit_norm_eps=-1.0), "0 or more"),
        ("kernel_persistent", dict(num_attention_heads=2, num_pairs=0), "at least 1 of each"),
        ("kernel_persistent", dict(num_attention_heads=2, num_pairs=3, num_banks=0), "at least 1 of each"),
        ("kernel_persistent", dict(num_attention_heads=3, num_pairs=3), "not a multiple"),
        ("kernel_persistent", dict(num_attention_heads=2), "needs the option 'num_pairs'"),
        ("attention", dict(num_attention_heads=4, num_key_value_heads=3), "not a multiple"),
        ("attention", dict(num_attention_heads=3), "not a multiple"),
        ("attention", dict(num_attention_heads=8), "even width"),
        ("attention", dict(num_attention_heads=2, window=3, delay=3), "larger than the delay"),
        ("attention", dict(num_attention_heads=2, train_delay=[4, 2]), "smaller first"),
        ("attention", dict(num_attention_heads=2, positions="rotari"), "did you mean 'rotary'"),
        ("attention", dict(num_attention_heads=2, rotary_scaling="ntk"), "choose linear or yarn"),
        ("attention", dict(num_attention_heads=2, rotary_scaling="yarn"), "needs rotary_trained_length"),
        ("attention", dict(num_attention_heads=2, rotary_factor=0.5), "give 1 or more"),
        *((name, {**OPTIONS[name], "initializer_range": 0.0}, "above 0") for name in (*TABLE_6, "lla", "parallax")),
        *((name, dict(num_attention_heads=3), "not a multiple") for name in ("lla", "parallax")),
        ("lla", dict(num_attention_heads=4, num_key_value_heads=3), "not a multiple"),
        ("parallax", dict(num_attention_heads=8), "even width"),
        ("lla", dict(num_attention_heads=2, iterations=0), "at least 1"),
        ("omega", dict(num_attention_heads=3), "not a multiple"),
        ("omega", dict(num_attention_heads=2, network="mpl"), "'mpl'; did you mean 'mlp'"),
        ("omega", dict(num_attention_heads=2, loss="l3"), "loss is 'l3'"),
        ("omega", dict(num_attention_heads=2, gates="both"), "gates is 'both'"),
        ("omega", dict(num_attention_heads=2, window=0), "at least 1"),
        ("deep_attention", dict(num_attention_heads=3), "not a multiple"),
        ("deep_attention", dict(num_attention_heads=2, network="mpl"), "'mpl'; did you mean 'mlp'"),
        ("deep_attention", dict(num_attention_heads=2, loss="l3"), "loss is 'l3'"),
        ("deep_attention", dict(num_attention_heads=2, window=0), "at least 1"),
        ("lla", dict(num_attention_heads=2, initial_ridge=0.0), "above 0"),
    ],
)
def test_build_refuses_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, options, Common(8), 0)


def test_stack_meets_the_memory_contract():
    steps = [
        [{"type": n, "options": OPTIONS[n]} for n in ("short_term", "long_term")],
        [{"type": "feed_forward", "options": OPTIONS["feed_forward"]}],
    ]
    stack = Stack([steps, steps], nn.RMSNorm, Common(8)).double()
    for made in stack.memories():
        made.reset_parameters(made.layer_index)
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    whole, _ = stack(x, Layout(2, 12), None, Context())
    first, state = stack(x[:, :5], Layout(2, 5), stack.initial_state(), Context())
    state.select(torch.tensor([1, 0]))
    second, _ = stack(x[[1, 0], 5:], Layout(2, 7, stored=5), state, Context())
    assert relative_error(first, whole[:, :5]) < 1e-9 and relative_error(second, whole[[1, 0], 5:]) < 1e-9
    assert stack.flops(16) == sum(made.flops(16) for made in stack.memories())


@pytest.mark.parametrize("options, pairs", [({}, range(6)), (dict(window=3), range(3, 6)), (dict(delay=2), range(4))])
def test_attention_memory_reads_what_its_window_and_delay_allow(options, pairs):
    made = build("attention", dict(num_attention_heads=2, **options), Common(8), 0).double()
    made.reset_parameters(0)
    context = Context(reads=[])
    made(torch.randn(1, 6, 8, dtype=torch.float64), Layout(1, 6), None, context)
    assert (context.reads[0].weights[0, 0, 5] > 0).nonzero()[:, 0].tolist() == list(pairs)


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
def test_attention_memory_depends_on_relative_positions_only(positions):
    """A document reads the same wherever it stands in a row."""
    made = build("attention", dict(num_attention_heads=2, positions=positions), Common(8), 0).double()
    made.reset_parameters(0)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    start = torch.tensor([[0] * 4 + [4] * 5])
    packed, _ = made(x, Layout(1, 9, start), None, Context())
    alone, _ = made(x[:, 4:], Layout(1, 5), None, Context())
    assert relative_error(packed[:, 4:], alone) < 1e-9


@pytest.mark.parametrize("name", ["short_term", "long_term", "leaky_contextual"])
@pytest.mark.parametrize("time", [1, 4, 40])
def test_contextual_memory_state_bytes_are_those_it_holds(name, time):
    made = memory(name).float()
    _, state = made(torch.randn(1, time, 8), Layout(1, time), made.initial_state(), Context())
    held = min(time, 4) if name == "short_term" else time
    tensors = [
        state.pairs.keys[:, :, -held:],
        state.pairs.values[:, :, -held:],
        state.direction,
        state.log_scale,
        state.raw_value,
    ]
    assert made.state_bytes(time, 4) == sum(x.numel() * 4 for x in tensors)


def test_contextual_memory_clamps_every_scalar_of_table_6():
    made = memory("short_term")
    with torch.no_grad():
        for parameter in (made.bandwidth_base, made.bandwidth_slope, made.value_scale):
            parameter.fill_(50.0)
        made.key_proj.weight.copy_(torch.eye(8))
    assert made.bandwidth().slope.tolist() == made.bandwidth().base.tolist() == [math.exp(10)] * 2
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    norms = made.values(made.value_proj(x), Layout(1, 3), None).norm(dim=-1)
    assert (norms / math.exp(15) - 1).abs().max() < 1e-9


def test_attention_memory_draws_its_delay_in_training():
    made = build("attention", dict(num_attention_heads=2, delay=1, train_delay=[1, 3]), Common(8), 0).double()
    made.reset_parameters(0)
    for draw, newest in ((None, 8), (0.0, 8), (0.5, 7), (0.9, 6)):
        context = Context(reads=[], draw=draw)
        made(torch.randn(1, 10, 8, dtype=torch.float64), Layout(1, 10), None, context)
        assert (context.reads[0].weights[0, 0, 9] > 0).nonzero()[:, 0].max() == newest


@pytest.mark.parametrize("heads, shared", [(2, 1), (4, 2), (6, 1)])
def test_attention_memory_with_alibi_adds_a_slope_times_the_distance(heads, shared):
    options = dict(num_attention_heads=heads, num_key_value_heads=heads // shared, positions="alibi", head_dim=4)
    made = build("attention", options, Common(8), 0).double()
    made.reset_parameters(0)
    context, x = Context(reads=[]), torch.randn(1, 7, 8, dtype=torch.float64)
    made(x, Layout(1, 7), None, context)
    queries = made.q_proj(x[0]).unflatten(-1, (heads, 4)).transpose(0, 1)
    keys = made.k_proj(x[0]).unflatten(-1, (-1, 4)).transpose(0, 1).repeat_interleave(shared, dim=0)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    slopes = torch.tensor([2 ** (-8 * (i + 1) / 4) for i in range(4)] + [2**-1, 2**-3])[:heads]  # 6 heads: 4, then of 8
    if heads == 2:
        slopes = torch.tensor([2**-4, 2**-8])
    logits = (queries @ keys.mT) / 2 - slopes[:, None, None] * distance
    expected = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
    assert relative_error(context.reads[0].weights[0], expected) < 1e-9


YARN = dict(rotary_scaling="yarn", rotary_factor=4.0, rotary_trained_length=8)


@pytest.mark.parametrize("more", [{}, dict(positions="none"), dict(positions="alibi"), YARN])
@pytest.mark.parametrize("heads, shared", [(2, 1), (4, 2)])
def test_attention_memory_reads_persistent_tokens_together_with_its_pairs(heads, shared, more):
    options = dict(num_attention_heads=heads, num_key_value_heads=heads // shared, head_dim=4, delay=1, window=4)
    options |= more
    plain = build("attention", options, Common(8), 0).double()
    plain.reset_parameters(0)
    made = build("attention", {**options, "persistent_tokens": 3}, Common(8), 0).double()
    made.load_state_dict({**plain.state_dict(), "persistent": torch.randn(3, 8).double()})
    x, context = 3 * torch.randn(1, 9, 8, dtype=torch.float64), Context(reads=[])
    y, _ = made(x, Layout(1, 9), None, context)
    split = lambda z: z.unflatten(-1, (-1, 4)).transpose(0, 1)  # noqa: E731
    queries, keys, values, learned, learned_values = (
        split(proj(z)).repeat_interleave(1 if proj is made.q_proj else shared, dim=0)
        for proj, z in [(made.q_proj, x[0]), (made.k_proj, x[0]), (made.v_proj, x[0])]
        + [(made.k_proj, made.persistent), (made.v_proj, made.persistent)]
    )
    # Nobody's turn and nobody's distance, but the sharpness of all.
    sharpness = (0.1 * math.log(4) + 1) ** 2 if "rotary_scaling" in more else 1
    distance = (torch.arange(9)[:, None] - torch.arange(9))[None]
    logits = queries @ keys.mT / 2
    if made.options.positions == "rotary":
        alone = Context(reads=[])
        plain(x, Layout(1, 9), None, alone)
        logits = alone.reads[0].weights[0].log() + _sums(plain, x)[..., None]
    elif made.options.positions == "alibi":
        slopes = torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)], dtype=torch.float64)
        logits = logits - slopes[:, None, None] * distance
    logits = logits.masked_fill((distance < 1) | (distance > 3), -torch.inf)
    expected = torch.cat([logits, sharpness * queries @ learned.mT / 2], dim=-1).softmax(-1)
    for read, known, contextual in zip(context.reads, expected.split([9, 3], dim=-1), (True, False), strict=True):
        assert relative_error(read.weights[0], known) < 1e-9 and read.contextual == contextual
    answer = (expected @ torch.cat([values, learned_values], dim=1)).transpose(0, 1).flatten(1)
    assert relative_error(y[0], made.o_proj(answer)) < 1e-9


def _sums(made, x):
    """Logarithms of the sums of weights of what a memory without persistent tokens reads."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[type(made).__module__]
        patch.setattr(module, "kernel_regression", lambda *given, **more: seen.append((given, more)) or given[0])
        made(x, Layout(1, x.shape[1]), None, Context())
    (given, more) = seen[0]
    return kernel_regression(*given, **{**more, "log_sum": True}, form="naive")[1][0]


def test_attention_memory_without_positions_does_not_know_the_order():
    made = build("attention", dict(num_attention_heads=2, positions="none"), Common(8), 0).double()
    made.reset_parameters(0)
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    order = torch.tensor([3, 1, 0, 2, 5, 4, 6])
    last = [made(given, Layout(1, 7), None, Context())[0][0, -1] for given in (x, x[:, order])]
    assert relative_error(*last) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_attention_memory_keeps_positions_apart_in_bfloat16(positions):
    """Far from the start, what is read hardly differs from float64."""
    made = build("attention", dict(num_attention_heads=1, head_dim=64, positions=positions), Common(8), 0).double()
    made.reset_parameters(0)
    x, start = 0.3 * torch.randn(1, 20, 8, dtype=torch.float64), torch.full((1, 20), -4000)
    state = made.initial_state()
    made(0 * x[:, :1].expand(1, 4000, 8), Layout(1, 4000), state, Context())
    exact, context = copy.deepcopy(state), Context(reads=[])
    made(x, Layout(1, 20, start, stored=4000), exact, context)
    narrow, rounded = made.bfloat16(), Context(reads=[])
    state.map(lambda t: t.bfloat16())
    narrow(x.bfloat16(), Layout(1, 20, start, stored=4000), state, rounded)
    near = slice(4000, None)
    weights = [c.reads[0].weights[0, 0, 10:, near].double() for c in (rounded, context)]
    weights = [w / w.sum(-1, keepdim=True) for w in weights]
    assert relative_error(*weights) < 3e-2


def test_kernel_persistent_memory_state_bytes_do_not_grow():
    made = memory("kernel_persistent").float()
    for time in (1, 40):
        _, state = made(torch.randn(1, time, 8), Layout(1, time), made.initial_state(), Context())
        assert made.state_bytes(time, 4) == 4 * (state.direction.numel() + state.log_scale.numel())


def test_kernel_persistent_memory_averages_its_banks():
    made, x = memory("kernel_persistent", num_banks=3), torch.randn(2, 9, 8, dtype=torch.float64)
    whole, _ = made(x, Layout(2, 9), None, Context())
    alone = memory("kernel_persistent", num_banks=1)
    parts = []
    for bank in range(3):
        state = {name: p[bank : bank + 1] if name.startswith("pair") else p for name, p in made.state_dict().items()}
        alone.load_state_dict(state)
        parts.append(alone(x, Layout(2, 9), None, Context())[0])
    assert relative_error(whole, sum(parts) / 3) < 1e-12 and relative_error(parts[0], parts[1]) > 0.1


def test_kernel_persistent_memory_reads_its_pairs():
    made, context = memory("kernel_persistent"), Context(reads=[])
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y, _ = made(x, Layout(2, 5), None, context)
    (read,) = context.reads
    assert read.weights.shape == (2, 2, 5, 22) and (read.weights.sum(-1) - 1).abs().max() < 1e-12
    values = made.pair_values.transpose(0, 1).flatten(1, 2) * (10 * made.value_scale).exp()[:, None, None]
    assert relative_error(made.out_proj((read.weights @ values).transpose(1, 2).flatten(2)), y) < 1e-9


def test_leaky_contextual_memory_reads_all_pairs_before():
    made, context = memory("leaky_contextual"), Context(reads=[])
    made(torch.randn(1, 10, 8, dtype=torch.float64), Layout(1, 10), None, context)
    for t in range(10):
        assert (context.reads[0].weights[0, 0, t] > 0).nonzero()[:, 0].tolist() == list(range(t))


@pytest.mark.parametrize("name", ["leaky_contextual", "kernel_persistent"])
def test_leaky_memories_add_eps_to_their_norms_and_clamp_the_bandwidth(name):
    """In a state so small that eps rules, everything shrinks with it; and no bandwidth is above its clamp."""
    x = 1e-6 * torch.randn(1, 6, 8, dtype=torch.float64)
    exact, short = memory(name), memory(name, unit_norm_eps=1e-3, max_log_bandwidth=3.0)
    short.load_state_dict(exact.state_dict())
    keys = [made.key_extractor(x, Layout(1, 6), None).norm(dim=-1) for made in (exact, short)]
    assert (keys[0] - 1).abs().max() < 1e-9 and keys[1].max() < 1e-2
    if name == "leaky_contextual":
        values = [made.values(made.value_proj(x), Layout(1, 6), None).norm(dim=-1) for made in (exact, short)]
        assert (values[0] - math.exp(-0.5)).abs().max() < 1e-9 and values[1].max() < 1e-2
    with torch.no_grad():
        exact.key_extractor.scale.fill_(9.0)
        short.key_extractor.scale.fill_(9.0)
    assert exact.key_extractor.bandwidth().base.tolist() == pytest.approx([math.exp(10)] * 2)
    assert short.key_extractor.bandwidth().base.tolist() == pytest.approx([math.exp(3)] * 2)


def plain_maps(bias=False):
    torch.manual_seed(2)
    return [nn.Linear(6, outputs, bias=bias).double() for outputs in (5, 1, 4)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("time, products", [(2, 3), (20, 1)])
def test_mapped_equals_the_maps_in_one_product_where_it_pays(bias, time, products, monkeypatch):
    maps, x = plain_maps(bias), torch.randn(2, time, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for linear in maps for p in linear.parameters())]
    expected = torch.cat([linear(x) for linear in maps], dim=-1)
    calls, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args) or linear(*args))
    found = mapped(x, *maps)
    assert len(calls) == products and [part.shape[-1] for part in found] == [5, 1, 4]
    found = torch.cat(list(found), dim=-1)
    assert relative_error(found, expected) < 1e-12
    for g, e in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert relative_error(g, e) < 1e-12


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def subclassed(linear):
    linear.__class__ = Doubled


def parametrised(linear):
    nn.utils.parametrize.register_parametrization(linear, "weight", Twice())


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(linear):
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def patched(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [subclassed, parametrised, hooked, hooked_before, patched])
def test_mapped_asks_maps_that_are_not_plain_themselves(change):
    maps, x = plain_maps(), torch.randn(2, 20, 6, dtype=torch.float64)
    expected = [linear(x) for linear in maps]
    change(maps[1])
    found = mapped(x, *maps)
    for scale, value, e in zip((1, 2, 1), found, expected, strict=True):
        assert relative_error(value, scale * e) < 1e-12


def test_mapped_calls_backward_hooks():
    maps, x, seen = plain_maps(), torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True), []
    maps[2].register_full_backward_hook(lambda *args: seen.append("after"))
    maps[0].register_full_backward_pre_hook(lambda *args: seen.append("before"))
    torch.cat(list(mapped(x, *maps)), dim=-1).sum().backward()
    assert sorted(seen) == ["after", "before"]


def test_mapped_takes_biases_where_only_some_have_one():
    maps, x = plain_maps(), torch.randn(2, 20, 6, dtype=torch.float64)
    maps[1] = nn.Linear(6, 1).double()
    for value, linear in zip(mapped(x, *maps), maps, strict=True):
        assert relative_error(value, linear(x)) < 1e-12


def test_contextual_memory_state_lets_go_of_the_prompt():
    made = memory("short_term")
    _, state = made(torch.randn(2, 40, 8, dtype=torch.float64), Layout(2, 40), made.initial_state(), Context())
    assert state.raw_value.untyped_storage().nbytes() == 2 * 8 * 8


@pytest.mark.parametrize("case", [*sorted(CASES), "attention, drawn delay"])
@pytest.mark.parametrize("time", [2, 3, 4, 5, 6])
def test_memory_check_refuses_a_context_in_which_it_reads_nothing(case, time):
    name, options = CASES.get(case, ("attention", dict(train_delay=[1, 4])))
    made = memory(name, **options).train()
    read = []
    for draw in (0.0, 0.999, None):  # the shortest and the longest delay of training, and that of evaluation
        context = Context(draw=draw, reads=[])
        made(torch.randn(1, time, 8, dtype=torch.float64), Layout(1, time), None, context)
        read += [bool((one.weights > 0).any()) for one in context.reads if one.contextual and one.rows]
    if all(read):
        made.check(time)
    else:
        with pytest.raises(ValueError, match=f"context of {time} tokens is not longer than the delay of {name}, up to"):
            made.check(time)


def test_generators_are_the_same_within_a_step_and_differ_between_uses():
    def numbers(draw, name="noise", layer_index=0):
        return tuple(torch.rand(4, generator=Context(draw=draw).generator(name, layer_index)).tolist())

    assert numbers(0.5) == numbers(0.5)
    uses = [(0.5, "noise", 0), (0.25, "noise", 0), (None, "noise", 0), (0.5, "other", 0), (0.5, "noise", 1)]
    assert len({numbers(*use) for use in uses}) == len(uses)
    assert numbers(None) == numbers(None)
