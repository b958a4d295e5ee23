"""Newton–Schulz: all matrices at once against its definition, matrix by matrix."""

import pytest
import torch

from helpers import gradients, relative_error
from mosaics.ops.newton_schulz import COEFFICIENTS, FORMS, newton_schulz


def matrices(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5)])
def test_newton_schulz_is_the_polynomial_of_singular_values(form, shape):
    s = matrices(*shape)
    left, values, right = torch.linalg.svd(s.detach(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = sum(c * values**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    assert relative_error(newton_schulz(s, form=form), left @ values.diag() @ right) < 1e-9
    assert values.min() > 0.65 and values.max() < 1.25


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (5, 3, 7), (5, 7, 3), (6, 2)])
@pytest.mark.parametrize("iterations", [1, 5])
def test_newton_schulz_forms_agree(shape, iterations):
    s = matrices(*shape)
    found, expected = (newton_schulz(s, iterations, form=form) for form in ("smaller_side", "naive"))
    assert relative_error(found, expected) < 1e-9
    assert relative_error(gradients(found, [s])[0], gradients(expected, [s])[0]) < 1e-9
    narrow = newton_schulz(s.float(), iterations)
    assert narrow.dtype == torch.float32 and relative_error(narrow.double(), expected) < 2e-4


@pytest.mark.parametrize("form", FORMS)
def test_newton_schulz_gradients_are_those_of_differences(form):
    assert torch.autograd.gradcheck(lambda s: newton_schulz(s, form=form), [matrices(2, 3, 4)])


@pytest.mark.parametrize("form", FORMS)
def test_newton_schulz_of_nothing_is_nothing_and_has_no_gradient(form):
    s = matrices(3, 4, 2)
    with torch.no_grad():
        s[1] = 0.0
    found = newton_schulz(s, form=form)
    (gradient,) = torch.autograd.grad(found.sum(), s)
    assert (found[1] == 0).all() and (gradient[1] == 0).all()
    assert (found[[0, 2]] != 0).any() and torch.isfinite(gradient).all() and (gradient[[0, 2]] != 0).any()


def test_newton_schulz_amplifies_what_is_nearly_missing():
    """By the first coefficient each time, which bounds what roundings do."""
    s = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    assert newton_schulz(s)[1, 1].item() == pytest.approx(COEFFICIENTS[0] ** 5 * 1e-9, rel=1e-6)


def test_newton_schulz_does_not_look_at_the_size():
    s = matrices(4, 3)
    assert relative_error(newton_schulz(1e-6 * s), newton_schulz(s)) < 1e-9


def test_newton_schulz_refuses_what_it_cannot_compute():
    for wrong, match in (
        (lambda: newton_schulz(matrices(3)), "matrices of shape"),
        (lambda: newton_schulz(matrices(3, 3), 0), "iterations is 0"),
        (lambda: newton_schulz(matrices(3, 3), form="other"), "no form 'other'"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
