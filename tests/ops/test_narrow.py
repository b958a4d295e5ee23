"""Stored pairs in fewer bits, and the form that reads them in slices."""

import pytest
import torch
from test_kernel_regression import inputs, read, starts

from helpers import relative_error
from mosaics.ops.kernel_regression import FORMS, Bandwidth, Narrow, Reach, kernel_regression, sliced, weights


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-7), (torch.int8, 1 / 127)])
@pytest.mark.parametrize("size", [1.0, 1e-6, 300.0])
def test_narrow_of_rounds_by_no_more_than_its_bits_allow(dtype, bound, size):
    x = size * torch.randn(2, 3, 50, 16, dtype=torch.float64)
    x[0, 0, 7] = 0
    error = (Narrow.of(x, dtype).widened() - x).abs()
    assert (error <= (1 + 1e-6) * bound / 2 * x.abs().amax(-1, keepdim=True)).all()
    assert error.max() > bound / 8 * size  # it was rounded


def test_narrow_of_int8_has_one_scale_for_each_vector():
    x = torch.randn(2, 3, 50, 16) * torch.logspace(-3, 3, 50)[:, None]
    narrow = Narrow.of(x, torch.int8)
    assert narrow.data.dtype == torch.int8 and narrow.scale.shape == (2, 3, 50, 1)
    assert (narrow.data.abs().amax(-1) == 127).all()
    assert relative_error(narrow.widened()[:, :, 0], x[:, :, 0]) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("time, stored, delay, window", [(1, 60, 1, None), (20, 90, 7, None), (20, 90, 1, 30)])
def test_kernel_regression_of_narrow_pairs_is_that_of_the_rounded_ones(dtype, documents, time, stored, delay, window):
    keys, values, bandwidth = inputs(time, stored)
    queries = keys[:, :, stored:]
    narrow = [Narrow.of(x, dtype) for x in (keys, values)]
    reach = Reach(delay, window, starts(2, time, stored, seed=3) if documents else None)
    rounded = [x.widened() for x in narrow]
    expected = kernel_regression(queries, *rounded, bandwidth, reach, form="naive")
    assert relative_error(expected, read(keys, values, bandwidth, time, "naive", reach)) > 1e-6
    held, sliced.SLICE = sliced.SLICE, 13
    try:
        for form in (None, "naive", "blockwise", "sliced"):
            found = kernel_regression(queries, *narrow, bandwidth, reach, form=form)
            assert found.dtype == values.dtype and relative_error(found, expected) < 1e-9
    finally:
        sliced.SLICE = held
    found, wide = (weights(queries, k, bandwidth, reach) for k in (narrow[0], rounded[0]))
    assert torch.equal(found, wide)


def test_kernel_regression_never_widens_all_narrow_pairs(monkeypatch):
    widest = 0

    def part(self, begin, end, dtype, of=Narrow.part):
        nonlocal widest
        widest = max(widest, end - begin)
        return of(self, begin, end, dtype)

    monkeypatch.setattr(Narrow, "part", part)
    monkeypatch.setattr(Narrow, "widened", None)
    monkeypatch.setattr(sliced, "SLICE", 16)
    keys, values, bandwidth = inputs(1, 100)
    kernel_regression(keys[:, :, 100:], *(Narrow.of(x, torch.int8) for x in (keys, values)), bandwidth, Reach(1))
    assert widest == 16


@pytest.mark.parametrize("slots", [1, 7, 64, 1000])
@pytest.mark.parametrize("block", [1, 50])
def test_kernel_regression_sliced_does_not_depend_on_slices(monkeypatch, slots, block):
    keys, values, bandwidth = inputs(40, 90)
    reach = Reach(5, start=starts(2, 40, 90, seed=1))
    expected = read(keys, values, bandwidth, 40, "naive", reach)
    monkeypatch.setattr(sliced, "SLICE", slots)
    monkeypatch.setattr(sliced, "BLOCK", block)
    assert relative_error(read(keys, values, bandwidth, 40, "sliced", reach), expected) < 1e-9


def test_kernel_regression_sliced_meets_logits_that_grow_and_shrink(monkeypatch):
    """A later slice with far larger logits takes over, one with far smaller ones adds nothing."""
    monkeypatch.setattr(sliced, "SLICE", 1)
    keys = torch.tensor([-1.0, 1.0, -1.0, 0.5, 0.0], dtype=torch.float64).view(1, 1, 5, 1).requires_grad_()
    values = torch.arange(5.0, dtype=torch.float64).view(1, 1, 5, 1)
    bandwidth = Bandwidth(torch.tensor([1e4], dtype=torch.float64))
    queries = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    found = {
        form: kernel_regression(queries, keys, values, bandwidth, Reach(1), form=form) for form in ("naive", "sliced")
    }
    assert found["sliced"].item() == found["naive"].item() == 1


@pytest.mark.parametrize("narrow", [False, True])
def test_kernel_regression_slices_what_is_long_for_few_queries_or_without_a_compiler(monkeypatch, narrow):
    monkeypatch.setattr("mosaics.ops.kernel_regression.compiled.available", lambda: False)
    monkeypatch.setattr("mosaics.ops.kernel_regression.LONG", 99)
    called = []
    for form, function in FORMS.items():
        spy = lambda *a, f=form, g=function, **k: called.append(f) or g(*a, **k)  # noqa: E731
        monkeypatch.setitem(FORMS, form, spy)
    keys, values, bandwidth = inputs(70, 40)
    if narrow:
        keys, values = Narrow.of(keys, torch.int8), Narrow.of(values, torch.int8)
    with torch.no_grad():
        for time in (8, 70):
            queries = inputs(time)[0]
            kernel_regression(queries, keys, values, bandwidth, Reach(1))
            kernel_regression(queries, keys, values, bandwidth, Reach(1, window=20))
    assert called == (["sliced", "sliced"] if narrow else ["sliced", "blockwise"]) + ["sliced", "blockwise"]
