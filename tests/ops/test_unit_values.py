import pytest
import torch

from helpers import gradients, relative_error
from mosaics.ops import unit_values as op
from mosaics.ops.unit_values import compiled, unit_values

FORMS = [form for form in op.FORMS if form != "compiled" or compiled.available()]
FAST = [form for form in FORMS if form != "naive"]


def inputs(time, batch=2, heads=3, width=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(batch, time, heads, width, generator=generator, dtype=torch.float64).transpose(1, 2)
    mix = torch.rand(heads, generator=generator, dtype=torch.float64)
    mix[0], length = 1.3, torch.rand(heads, generator=generator, dtype=torch.float64) + 0.5  # training may leave [0, 1]
    return [x.to(dtype).requires_grad_() for x in (raw, mix, length)]


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_unit_values_is_equation_9(form, eps):
    raw, mix, length = inputs(6)
    found = unit_values(raw, mix, length, eps=eps, form=form)
    for t in range(6):
        following = raw[:, :, t + 1] if t < 5 else 0.0
        mixed = mix[:, None] * raw[:, :, t] + (1 - mix[:, None]) * following
        expected = length[:, None] * mixed / (mixed.norm(dim=-1, keepdim=True) + eps)
        assert relative_error(found[:, :, t], expected) < 1e-12


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("time, eps", [(1, 0.5), (2, 0.0), (63, 0.5), (1000, 0.0)])
def test_unit_values_form_equals_naive_in_value_and_gradient(form, time, eps):
    tensors = inputs(time)
    value, expected = (unit_values(*tensors, eps=eps, form=f) for f in (form, "naive"))
    assert value.is_contiguous() and relative_error(value, expected) < 1e-9
    for g, e in zip(gradients(value, tensors), gradients(expected, tensors), strict=True):
        assert relative_error(g, e) < 1e-9


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_unit_values_gives_any_one_gradient_alone(form, wanted):
    tensors = inputs(20)
    alone = [x if i == wanted else x.detach() for i, x in enumerate(tensors)]
    (found,), (expected,) = (
        gradients(unit_values(*alone, form=f), alone[wanted : wanted + 1]) for f in (form, "naive")
    )
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)])
def test_unit_values_low_precision_is_near_the_exact_twin(form, dtype, bound):
    low = inputs(300, width=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in low]
    value, expected = unit_values(*low, form=form), unit_values(*exact, form="naive")
    assert value.dtype == dtype and relative_error(value, expected) < bound
    bounds = (bound, 4 * bound, 4 * bound)
    for g, e, x, b in zip(gradients(value, low), gradients(expected, exact), low, bounds, strict=True):
        assert g.dtype == x.dtype and relative_error(g, e) < b


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("scale", [0.0, 1e-14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unit_values_of_nothing_is_zero_without_a_gradient(form, scale, dtype):
    raw, mix, length = inputs(9, dtype=dtype)
    kept = torch.arange(9) >= 4
    raw = torch.where(kept[:, None], raw, raw * scale).detach().requires_grad_()
    value = unit_values(raw, mix, length, form=form)
    assert (value[:, :, :3] == 0).all() and (value[:, :, 3:].float().norm(dim=-1) > 0.4).all()
    found = gradients(value, (raw, mix, length))
    assert (found[0][:, :, :3] == 0).all() and all(g.isfinite().all() for g in found)
    short = [raw.detach()[:, :, 3:].requires_grad_(), mix, length]
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
    expected = torch.autograd.grad((unit_values(*short, form=form) * weight[:, :, 3:]).sum(), short)
    for g, e in zip((found[0][:, :, 3:], *found[1:]), expected, strict=True):
        assert relative_error(g, e) < {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_unit_values_gradcheck(form, eps):
    tensors = inputs(7, batch=2, heads=2, width=3)
    assert torch.autograd.gradcheck(lambda *x: unit_values(*x, eps=eps, form=form), tensors)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_unit_values_does_not_change_its_inputs_or_what_it_gave(form):
    tensors = inputs(9)
    before = [x.detach().clone() for x in tensors]
    value = unit_values(*tensors, form=form)
    after = value.detach().clone()
    first = gradients(value.square(), tensors)
    assert torch.equal(value, after) and all(map(torch.equal, tensors, before))
    again = gradients(unit_values(*tensors, form=form).square(), tensors)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_unit_values_keeps_its_precision_under_autocast(form):
    tensors = inputs(20, dtype=torch.float32)
    expected = gradients(unit_values(*tensors, form=form), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(unit_values(*tensors, form=form), tensors)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_unit_values_of_a_length_that_underflowed_have_finite_gradients(form):
    raw, mix, length = inputs(9)
    tensors = raw, mix, (0 * length).detach().requires_grad_()
    value = unit_values(*tensors, form=form)
    assert (value == 0).all() and all(g.isfinite().all() for g in gradients(value, tensors))


def test_unit_values_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="did you mean 'in_place'"):
        unit_values(*inputs(3), form="inplace")


@pytest.mark.parametrize("form", FAST)
def test_unit_values_reads_raw_values_of_any_strides(form):
    raw, mix, length = inputs(9)
    beside = torch.full((2, 9, 3, 11), torch.nan, dtype=torch.float64)[..., 3:8].transpose(1, 2)
    for other in (
        beside.copy_(raw.detach()),
        raw.detach().mT.contiguous().mT,
        raw.detach()[:1].expand(raw.shape),
    ):
        plain = other.clone(memory_format=torch.contiguous_format).requires_grad_()
        expected = unit_values(plain, mix, length, form="naive")
        found = unit_values(other.requires_grad_(), mix, length, form=form)
        assert relative_error(found, expected) < 1e-12
        expected = gradients(expected, (plain, mix, length))
        for g, e in zip(gradients(found, (other, mix, length)), expected, strict=True):
            assert relative_error(g, e) < 1e-9


@pytest.mark.parametrize("threads", [1, 3])
def test_unit_values_compiled_is_the_same_with_any_number_of_threads(threads, monkeypatch):
    if not compiled.available():
        pytest.skip("no C++ compiler")
    tensors = inputs(50)
    expected = unit_values(*tensors, form="compiled")
    monkeypatch.setattr(compiled, "WORTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = unit_values(*tensors, form="compiled")
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients(found, tensors), gradients(expected, tensors)))


def test_unit_values_compiled_needs_a_compiler(monkeypatch):
    tensors = inputs(3)
    monkeypatch.setattr(compiled, "available", lambda: False)
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        unit_values(*tensors, form="compiled")
    assert unit_values(*tensors).isfinite().all()  # another form
