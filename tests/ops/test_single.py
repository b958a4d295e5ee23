"""The form of kernel regression that reads for one query."""

import pytest
import torch
from test_kernel_regression import inputs

from helpers import relative_error
from mosaics.ops.kernel_regression import ALL_PAIRS, FORMS, Bandwidth, Narrow, Reach, kernel_regression, single

needs_compiler = pytest.mark.skipif(not single.available(), reason="no C++ compiler")
REACHES = [Reach(1), Reach(0), Reach(7), Reach(1, window=5), Reach(3, window=200), ALL_PAIRS]


def one(slots, dtype=torch.float64, width=4, batch=2):
    """The newest query of `slots` pairs, all pairs, the bandwidth."""
    keys, values, bandwidth = inputs(1, slots - 1, batch=batch, width=width)
    bandwidth = Bandwidth(*(x.detach().to(torch.promote_types(dtype, torch.float32)) for x in bandwidth))
    return keys.detach().to(dtype)[:, :, -1:].clone(), keys.detach().to(dtype), values.detach().to(dtype), bandwidth


@needs_compiler
@pytest.mark.parametrize("slots", [1, 2, 6, 127, 128, 129, 131, 500])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("documents", [False, True])
def test_single_equals_naive(slots, reach, documents):
    if documents and reach is not ALL_PAIRS:
        reach = reach._replace(start=torch.tensor([[0], [-slots // 2]]))
    given = one(slots)
    found, expected = (kernel_regression(*given, reach, form=form) for form in ("single", "naive"))
    assert found.shape == expected.shape and relative_error(found, expected) < 1e-9


@needs_compiler
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [16, 21])
def test_single_low_precision_is_near_the_exact_twin(dtype, bound, width):
    given = one(700, dtype, width)
    exact = [x.double() for x in given[:3]]
    found = kernel_regression(*given, Reach(2), form="single")
    expected = kernel_regression(*exact, Bandwidth(*(x.double() for x in given[3])), Reach(2), form="naive")
    assert found.dtype == dtype and relative_error(found, expected) < bound


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_single_reads_narrow_pairs_as_they_are(dtype, monkeypatch):
    query, keys, values, bandwidth = one(300, torch.float32, 16)
    narrow = [Narrow.of(x, dtype) for x in (keys, values)]
    expected = kernel_regression(query, *(x.widened() for x in narrow), bandwidth, Reach(2), form="naive")
    monkeypatch.setattr(Narrow, "part", None)
    monkeypatch.setattr(Narrow, "widened", None)
    found = kernel_regression(query, *narrow, bandwidth, Reach(2))
    assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-5


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_single_reads_from_buffers_of_any_strides(dtype):
    query, keys, values, bandwidth = one(40, dtype)
    expected = kernel_regression(query, keys, values, bandwidth, Reach(2), form="single")
    room = torch.full((2, 2, 90, 4), torch.nan, dtype=dtype)
    room[:, :, 30:70] = keys
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    columns = values.mT.contiguous().mT
    for v in (turned, columns):
        assert torch.equal(kernel_regression(query, room[:, :, 30:70], v, bandwidth, Reach(2), form="single"), expected)


@needs_compiler
def test_single_does_not_see_what_it_may_not_read():
    query, keys, values, bandwidth = one(40)
    expected = kernel_regression(query, keys, values, bandwidth, Reach(3, window=20), form="single")
    for x in (keys, values):
        x[:, :, :20], x[:, :, 37:] = torch.nan, torch.nan
    assert torch.equal(kernel_regression(query, keys, values, bandwidth, Reach(3, window=20), form="single"), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [-800.0, -100.0, 0.0, 1e-3, 300.0, 1e6])
def test_single_stands_any_bandwidth(dtype, beta):
    query, keys, values, _ = one(400, dtype, 16)
    bandwidth = Bandwidth(torch.full((2,), beta, dtype=dtype))
    found, expected = (kernel_regression(query, keys, values, bandwidth, Reach(1), form=f) for f in ("single", "naive"))
    # A logit is a product of beta, so that is what rounding is multiplied by.
    assert relative_error(found, expected) < (1e-9 if dtype == torch.float64 else max(1e-5, 1e-7 * abs(beta)))


@needs_compiler
def test_single_is_the_same_with_any_number_of_threads(monkeypatch):
    given = one(500, torch.float32)
    expected = kernel_regression(*given, Reach(1), form="single")
    monkeypatch.setattr(single, "WORTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(kernel_regression(*given, Reach(1), form="single"), expected)


@needs_compiler
def test_single_is_chosen_for_one_query_without_a_gradient_or_dropout(monkeypatch):
    query, keys, values, bandwidth = one(30)
    calls = []
    monkeypatch.setitem(FORMS, "single", lambda *args, **options: calls.append(0) or query)
    kernel_regression(query, keys, values, bandwidth, Reach(1))
    assert len(calls) == 1
    kernel_regression(query, keys, values, bandwidth, Reach(1), dropout=0.5)
    kernel_regression(keys, keys, values, bandwidth, Reach(1))
    for i in range(3):
        learned = [x.clone().requires_grad_(i == j) for j, x in enumerate((query, keys, values))]
        assert kernel_regression(*learned, bandwidth, Reach(1)).requires_grad
        with torch.no_grad():
            kernel_regression(*learned, bandwidth, Reach(1))
    assert len(calls) == 4
    learned = Bandwidth(bandwidth.base, bandwidth.slope, bandwidth.exponent.clone().requires_grad_())
    assert kernel_regression(query, keys, values, learned, Reach(1)).requires_grad and len(calls) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, b: (k, k, v, b), "30 queries"),
        (lambda q, k, v, b: (q, k.clone().requires_grad_(), v, b), "no backward"),
        (lambda q, k, v, b: (q, k.float(), v, b), "does not read torch.float32 and torch.float64"),
    ],
)
def test_single_refuses_what_it_does_not_do(change, message):
    with pytest.raises(ValueError, match=message):
        kernel_regression(*change(*one(30)), Reach(1), form="single")


def test_single_needs_a_compiler(monkeypatch):
    given = one(30)
    monkeypatch.setattr(single, "available", lambda: False)
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        kernel_regression(*given, Reach(1), form="single")
    assert kernel_regression(*given, Reach(1)).isfinite().all()  # another form


@needs_compiler
def test_single_weights_are_as_good_as_float32():
    """Each weight for itself, where logits are not rounded much."""
    keys, values = torch.linspace(-1, 1, 101)[None, None, :, None], torch.eye(101)[None, None]
    for beta in (1.0, 10.0):
        given = torch.ones(1, 1, 1, 1), keys, values
        found = kernel_regression(*given, Bandwidth(torch.tensor([beta])), ALL_PAIRS, form="single")
        exact = (beta * keys.double()).softmax(2).mT
        assert ((found - exact).abs() / exact).max() < 1e-6 * beta


@needs_compiler
def test_single_of_pairs_far_from_the_nearest_one_is_the_nearest_one():
    keys = torch.tensor([-1.0, 1.0, -1.0])[None, None, :, None]
    values = torch.tensor([3.0, 5.0, 7.0])[None, None, :, None]
    for beta in (30.0, 43.0, 50.0, 1e4):  # the others weigh e^-60, e^-86, e^-100 and nothing
        bandwidth = Bandwidth(torch.tensor([beta]))
        assert kernel_regression(torch.ones(1, 1, 1, 1), keys, values, bandwidth, ALL_PAIRS, form="single").item() == 5
