import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import gradients, relative_error
from mosaics.ops import leaky_average as op
from mosaics.ops.leaky_average import LeakyAverageState, compiled, leaky_average

# Without a GPU Triton interprets, if told so before it is imported: test_leaky_average_triton.py runs this file so.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = {"triton": INTERPRETED, "compiled": compiled.available()}
FORMS = [form for form in op.FORMS if HERE.get(form, True)]
FAST = [form for form in FORMS if form != "naive"]


def inputs(time, batch=2, heads=3, width=5, dtype=torch.float64, seed=0, continued=False, borders=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, gate, decay = (
        normal(batch, heads, time, width),
        3 * normal(batch, heads, time),
        -normal(batch, heads, time).abs(),
    )
    if borders:
        decay = decay.masked_fill(torch.rand(batch, 1, time, generator=generator) < 0.1, -torch.inf)
    state = None
    if continued:
        direction = torch.nn.functional.normalize(normal(batch, heads, width), dim=-1)
        state = LeakyAverageState(direction.to(dtype), 5 * normal(batch, heads).to(dtype))
    return [t.to(dtype).requires_grad_() for t in (x, gate, decay)], state


def outputs(tensors, state, form):
    keys, after = leaky_average(*tensors, state, form=form)
    # A state is only defined by what it stands for: the direction, and the scale where there is a direction.
    return [keys, after.direction, after.log_scale]


def test_leaky_average_naive_is_equation_8():
    (x, gate, decay), _ = inputs(20)
    average = torch.zeros(2, 3, 5, dtype=torch.float64)
    for t in range(20):
        average = gate[..., t, None].exp() * x[:, :, t] + decay[..., t, None].exp() * average
        key = leaky_average(x, gate, decay, form="naive")[0][:, :, t]
        assert relative_error(key, average / average.norm(dim=-1, keepdim=True)) < 1e-12
    after = leaky_average(x, gate, decay, form="naive")[1]
    assert relative_error(after.direction * after.log_scale.exp()[..., None], average) < 1e-12


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 63, 65, 1000, 1100])
@pytest.mark.parametrize("continued", [False, True])
def test_leaky_average_form_equals_naive_in_value_and_gradient(form, time, continued):
    tensors, state = inputs(time, batch=1, heads=2, continued=continued, borders=True)
    values, expected = outputs(tensors, state, form), outputs(tensors, state, "naive")
    assert all(relative_error(v, e) < 1e-9 for v, e in zip(values, expected, strict=True))
    joined, expected = (torch.cat([x.flatten() for x in xs]) for xs in (values, expected))
    for g, e in zip(gradients(joined, tensors), gradients(expected, tensors), strict=True):
        assert relative_error(g, e) < 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 90), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_leaky_average_forms_agree_on_any_shape(time, heads, width, seed, borders):
    tensors, state = inputs(time, heads=heads, width=width, seed=seed, borders=borders, continued=seed % 2 == 0)
    expected = outputs(tensors, state, "naive")
    for form in FAST:
        for value, e in zip(outputs(tensors, state, form), expected, strict=True):
            assert relative_error(value, e) < 1e-9


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("gates, decays", [(1e3, 1e3), (1.0, 1e4), (1e4, 1.0), (1e3, 1e6)])
def test_leaky_average_forms_agree_however_large_the_logarithms_are(form, gates, decays):
    (x, gate, decay), _ = inputs(100, borders=True)
    tensors = x, gate * gates, torch.where(torch.rand_like(decay) < 0.3, decay * decays, decay)
    for value, e in zip(outputs(tensors, None, form), outputs(tensors, None, "naive"), strict=True):
        assert relative_error(value, e) < 1e-9


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 10**6), st.sampled_from(sorted(FORMS)))
def test_leaky_average_any_split_equals_whole(pieces, seed, form):
    tensors, state = inputs(sum(pieces), seed=seed, borders=True)
    whole, after = leaky_average(*tensors, state, form=form)
    begin, keys = 0, []
    for piece in pieces:
        part, state = leaky_average(*(t[:, :, begin : begin + piece] for t in tensors), state, form=form)
        keys.append(part)
        begin += piece
    assert relative_error(torch.cat(keys, dim=2), whole) < 1e-9
    assert relative_error(state.direction, after.direction) < 1e-9
    assert relative_error(state.log_scale, after.log_scale) < 1e-9


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("time", [63, 1000])
def test_leaky_average_form_equals_naive_in_float32(form, time):
    tensors, _ = inputs(time, dtype=torch.float32, width=16)
    exact, _ = inputs(time, width=16)
    value, expected = leaky_average(*tensors, form=form)[0], leaky_average(*exact, form="naive")[0]
    assert relative_error(value, expected) < 1e-5
    for g, e in zip(gradients(value, tensors), gradients(expected, exact), strict=True):
        assert relative_error(g, e) < 1e-5


@pytest.mark.parametrize("form", [form for form in FAST if form != "triton"])
@pytest.mark.parametrize("decays", [0.0, 1e-4])
def test_leaky_average_does_not_add_up_rounding_over_a_long_document(form, decays):
    """A sum over all that came before, with gates far apart, and nothing forgotten but slowly."""
    (x, gate, decay), _ = inputs(20000, batch=1, heads=1, width=16)
    found = []
    for dtype, f in ((torch.float32, form), (torch.float64, "chunked")):
        tensors = [t.detach().float().to(dtype).requires_grad_() for t in (x, gate, decays * decay)]
        keys = leaky_average(*tensors, form=f)[0]
        found.append([keys, *gradients(keys, tensors)])
    assert all(relative_error(g, e) < 1e-6 for g, e in zip(*found, strict=True))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_bfloat16_is_near_the_float32_twin(form):
    rounded = [t.detach().bfloat16() for t in inputs(300, width=16)[0]]
    low = [t.clone().requires_grad_() for t in rounded]
    high = [t.float().requires_grad_() for t in rounded]
    value, expected = leaky_average(*low, form=form)[0], leaky_average(*high, form="naive")[0]
    assert value.dtype == torch.bfloat16
    assert relative_error(value, expected) < 5e-3
    bounds = (5e-3, 2e-2, 2e-2)
    for g, e, bound in zip(gradients(value, low), gradients(expected, high), bounds, strict=True):
        assert relative_error(g, e) < bound


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gates", [[200.0], [-200.0], [200.0, -200.0], [-200.0] * 9 + [200.0], [200.0] + [-200.0] * 40])
def test_leaky_average_gates_of_200_stay_finite(form, dtype, gates):
    (x, gate, decay), _ = inputs(80, batch=1, heads=1, dtype=dtype)
    gate = torch.tensor(gates, dtype=dtype).repeat(80)[:80].expand_as(gate).clone().requires_grad_()
    keys, state = leaky_average(x, gate, decay, form=form)
    assert keys.isfinite().all() and state.direction.isfinite().all() and state.log_scale.isfinite().all()
    assert (keys.float().norm(dim=-1) - 1).abs().max() < 1e-2
    assert all(g.isfinite().all() for g in gradients(keys, (x, gate, decay)))
    later, _ = leaky_average(x, gate, decay, state, form=form)
    assert later.isfinite().all()


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_of_an_open_gate_is_its_input(form):
    (x, gate, decay), _ = inputs(70)
    gate = torch.zeros_like(gate).index_fill(2, torch.tensor([40]), 200.0)
    keys, _ = leaky_average(x, gate, decay, form=form)
    assert relative_error(keys[:, :, 40], torch.nn.functional.normalize(x[:, :, 40], dim=-1)) < 1e-9


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_position_with_no_gate_and_no_decay_changes_nothing(form):
    (x, gate, decay), _ = inputs(50)
    keep = torch.arange(50) % 7 != 3
    closed, held = gate.masked_fill(~keep, -torch.inf), decay.masked_fill(~keep, 0.0)
    keys, state = leaky_average(x, closed, held, form=form)
    short, expected = leaky_average(x[:, :, keep], gate[:, :, keep], decay[:, :, keep], form=form)
    assert relative_error(keys[:, :, keep], short) < 1e-9
    assert relative_error(state.log_scale, expected.log_scale) < 1e-9


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_of_nothing_is_zero_and_remembers_nothing(form):
    (x, gate, decay), _ = inputs(40)
    keys, state = leaky_average(x, torch.full_like(gate, -torch.inf), torch.zeros_like(decay), form=form)
    assert (keys == 0).all() and (state.direction == 0).all() and (state.log_scale == -torch.inf).all()
    expected = leaky_average(x, gate, decay, form=form)[0]
    assert relative_error(leaky_average(x, gate, decay, state, form=form)[0], expected) < 1e-12


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_gradcheck(form):
    (x, gate, decay), state = inputs(37, batch=1, heads=1, width=2, continued=True)
    state = LeakyAverageState(*(s.requires_grad_() for s in state))
    function = lambda x, gate, decay, d, s: torch.cat(  # noqa: E731
        [t.flatten() for t in outputs((x, gate, decay), LeakyAverageState(d, s), form)]
    )
    assert torch.autograd.gradcheck(function, (x, gate, decay, *state), fast_mode=form == "triton")


@pytest.mark.parametrize("form", FAST)
def test_leaky_average_takes_inputs_and_gradients_of_any_strides(form):
    tensors, _ = inputs(40)
    expected = leaky_average(*tensors, form="naive")[0]
    wanted = gradients(expected.mT, tensors)
    for order in (lambda t: t.transpose(1, 2), lambda t: t.mT):
        found = leaky_average(*(order(order(t).contiguous()) for t in tensors), form=form)[0]
        assert relative_error(found, expected) < 1e-9
        for g, e in zip(gradients(found.mT, tensors), wanted, strict=True):
            assert relative_error(g, e) < 1e-9


def test_leaky_average_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="did you mean 'chunked'"):
        leaky_average(*inputs(3)[0], form="chunk")


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_keeps_its_precision_under_autocast(form):
    tensors, state = inputs(70, dtype=torch.float32, width=16, continued=True)
    expected = outputs(tensors, state, form)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(tensors, state, form)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_leaky_average_of_zero_inputs_has_no_gradient(form, dtype):
    (x, gate, decay), _ = inputs(40, dtype=dtype)
    zero = torch.zeros_like(x, requires_grad=True)
    keys, _ = leaky_average(zero, gate, decay, form=form)
    assert (keys == 0).all() and all((g == 0).all() for g in gradients(keys, (zero, gate, decay)))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_of_small_inputs_is_that_of_large_ones(form):
    (x, gate, decay), _ = inputs(40)
    expected = leaky_average(x, gate, decay, form=form)[0]
    assert relative_error(leaky_average(1e-9 * x, gate, decay, form=form)[0], expected) < 1e-9
    low = leaky_average((1e-9 * x).float(), gate.float(), decay.float(), form=form)[0]
    assert relative_error(low, expected) < 1e-5


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_eps_is_added_to_the_norm(form):
    (x, gate, decay), _ = inputs(70, batch=1, heads=2)
    x = x.detach().mul(1e-3).requires_grad_()
    average, expected = 0.0, []
    for t in range(70):
        average = gate[..., t, None].exp() * x[:, :, t] + decay[..., t, None].exp() * average
        expected.append(average / (average.norm(dim=-1, keepdim=True) + 1e-3))
    expected = torch.stack(expected, dim=2)
    first, state = leaky_average(x[:, :, :40], gate[..., :40], decay[..., :40], form=form, eps=1e-3)
    second, _ = leaky_average(x[:, :, 40:], gate[..., 40:], decay[..., 40:], state, form=form, eps=1e-3)
    found = torch.cat([first, second], dim=2)
    assert relative_error(found, expected) < 1e-9 and found.norm(dim=-1).min() < 0.9
    for g, e in zip(gradients(found, (x, gate, decay)), gradients(expected, (x, gate, decay)), strict=True):
        assert relative_error(g, e) < 1e-9


@pytest.mark.parametrize("form", sorted(FORMS))
def test_leaky_average_eps_leaves_an_empty_average_at_zero(form):
    (x, gate, decay), _ = inputs(40)
    gate = gate.detach().masked_fill(torch.arange(40) < 5, -torch.inf).requires_grad_()
    keys, _ = leaky_average(x, gate, decay, form=form, eps=1e-3)
    assert (keys[:, :, :5] == 0).all() and (keys[:, :, 5:] != 0).all()
    assert all(g.isfinite().all() for g in gradients(keys, (x, gate, decay)))


@pytest.mark.parametrize("form", FAST)
def test_leaky_average_gives_the_gradient_of_a_state_alone(form):
    """A later call may read nothing but the state."""
    tensors, state = inputs(40, continued=True)
    for i in (0, 1):
        found, expected = (gradients(leaky_average(*tensors, state, form=f)[1][i], tensors) for f in (form, "naive"))
        assert all(relative_error(g, e) < 1e-9 for g, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_leaky_average_compiled_is_the_same_with_any_number_of_threads(threads, monkeypatch):
    if not compiled.available():
        pytest.skip("no C++ compiler")
    tensors, state = inputs(50, continued=True, borders=True)
    expected = leaky_average(*tensors, state, form="compiled")[0]
    monkeypatch.setattr(compiled, "WORTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = leaky_average(*tensors, state, form="compiled")[0]
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients(found, tensors), gradients(expected, tensors)))


def test_leaky_average_compiled_needs_a_compiler(monkeypatch):
    tensors = [x.detach() for x in inputs(3)[0]]
    monkeypatch.setattr(compiled, "available", lambda: False)
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        leaky_average(*tensors, form="compiled")
    assert leaky_average(*tensors)[0].isfinite().all()  # another form


def test_leaky_average_state_shares_no_memory_with_the_keys():
    (x, gate, decay), _ = inputs(1)
    keys, state = leaky_average(x, gate, decay)
    assert state.direction.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()
