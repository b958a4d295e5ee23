"""The sums of weights of kernel regression, and the reads over several stores that they join."""

import math

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
from test_kernel_regression import inputs, starts

from helpers import gradients, relative_error
from mosaics.ops.kernel_regression import (
    ALL_PAIRS,
    FORMS,
    Bandwidth,
    Narrow,
    Reach,
    compiled,
    kernel_regression,
    merged,
    single,
    sliced,
)

HERE = [form for form in FORMS if form not in ("single", "shifted") and (form != "compiled" or compiled.available())]
needs_compiler = pytest.mark.skipif(not single.available(), reason="there is no C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def _flex_on_a_processor():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_validate_device", lambda *_: None)
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


def both(pair):
    """Answers and the sums as one tensor, where there are pairs."""
    read, logs = pair
    return torch.cat([read, logs.masked_fill(logs == -torch.inf, 0.0)[..., None]], dim=-1)


def test_log_sum_naive_is_the_logarithm_of_the_sum_of_weights():
    time, delay, window = 9, 2, 6
    keys, values, bandwidth = inputs(time)
    start = starts(2, time, 0, seed=4)
    _, logs = kernel_regression(keys, keys, values, bandwidth, Reach(delay, window, start), log_sum=True, form="naive")
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(time)).tolist():
        pairs = [i for i in range(time) if i >= start[b, t] and t - window + 1 <= i <= t - delay]
        if not pairs:
            assert logs[b, h, t] == -math.inf
            continue
        beta = bandwidth.slope[h] * len(pairs) ** bandwidth.exponent[h] + bandwidth.base[h]
        expected = sum(torch.exp(beta * (keys[b, h, t] * keys[b, h, i]).sum()) for i in pairs).log()
        assert relative_error(logs[b, h, t], expected) < 1e-12


@pytest.mark.parametrize("form", [f for f in HERE if f != "naive"])
@pytest.mark.parametrize(
    "time, stored, delay, window, documents",
    [
        (1, 0, 1, None, False),
        (1, 50, 0, 1, True),
        (33, 50, 7, None, True),
        (33, 0, 3, 5, True),
        (33, 50, None, None, False),
        (129, 0, 1, None, False),
    ],
)
@pytest.mark.parametrize("sharpness", [-30.0, 1.0, 30.0])
def test_log_sum_of_a_form_is_naives_in_value_and_gradient(form, time, stored, delay, window, documents, sharpness):
    start = starts(2, time, stored, seed=time) if documents else None
    keys, values, bandwidth = inputs(time, stored)
    bandwidth = bandwidth._replace(base=(sharpness * bandwidth.base).detach().requires_grad_())
    leaves = (keys, values, *bandwidth)
    given = keys[:, :, stored:], keys, values, bandwidth, Reach(delay, window, start)
    read = lambda f: kernel_regression(*given, form=f, log_sum=True)  # noqa: E731
    for found, expected in zip(read(form), read("naive"), strict=True):
        empty = expected == -torch.inf
        assert torch.equal(found == -torch.inf, empty)
        assert relative_error(found[~empty], expected[~empty]) < 1e-9
    for of in (both, lambda pair: pair[1]):  # what comes to the logarithm of an empty sum has no effect
        for g, e in zip(gradients(of(read(form)), leaves), gradients(of(read("naive")), leaves), strict=True):
            assert (g - e).norm() < 1e-9 * max(1.0, e.norm())


@pytest.mark.parametrize("form", HERE)
def test_log_sum_gradcheck(form):
    keys, values, bandwidth = inputs(11, batch=1, heads=2, width=3)
    queries = torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0] * 6 + [6] * 5])
    function = lambda q, k, v, *beta: both(  # noqa: E731
        kernel_regression(q, k, v, Bandwidth(*beta), Reach(2, start=start), log_sum=True, form=form)
    )
    assert torch.autograd.gradcheck(function, (queries, keys, values, *bandwidth), fast_mode=form == "flex")


@pytest.mark.parametrize("form", HERE)
def test_log_sum_in_float32_is_near_the_exact_one(form):
    exact = inputs(400, width=16)
    keys, values, bandwidth = inputs(400, dtype=torch.float32, width=16)
    found = both(kernel_regression(keys, keys, values, bandwidth, Reach(5), log_sum=True, form=form))
    expected = both(kernel_regression(exact[0], *exact, Reach(5), log_sum=True, form="naive"))
    assert relative_error(found, expected) < 1e-5
    wanted = gradients(expected, (*exact[:2], *exact[2]))
    for g, e in zip(gradients(found, (keys, values, *bandwidth)), wanted, strict=True):
        assert relative_error(g, e) < 1e-5


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("slots", [1, 5, 300])
@pytest.mark.parametrize("form", ["single", "sliced"])
def test_log_sum_of_one_query_over_narrow_pairs(dtype, slots, form, monkeypatch):
    monkeypatch.setattr(sliced, "SLICE", 100)
    keys, values, bandwidth = inputs(1, slots - 1, width=8, dtype=torch.float32)
    stored = [x if dtype is None else Narrow.of(x, dtype) for x in (keys, values)]
    wide = [x if dtype is None else x.widened() for x in stored]
    for delay in (0, 2):
        reach = Reach(delay)
        found = kernel_regression(keys[:, :, -1:], *stored, bandwidth, reach, form=form, log_sum=True)
        expected = kernel_regression(keys[:, :, -1:], *wide, bandwidth, reach, form="naive", log_sum=True)
        assert torch.equal(found[1] == -torch.inf, expected[1] == -torch.inf)
        assert relative_error(both(found), both(expected)) < 1e-5


@pytest.mark.parametrize("form", [None, *HERE])
def test_merged_reads_of_a_split_store_are_the_read_of_the_whole(form):
    keys, values, bandwidth = inputs(90)
    queries = torch.randn(2, 2, 40, 4, dtype=torch.float64, requires_grad=True)
    leaves = (queries, keys, values, bandwidth.base)
    given = Bandwidth(bandwidth.base), ALL_PAIRS
    ask = lambda k, v: kernel_regression(queries, k, v, *given, log_sum=True, form=form)  # noqa: E731
    whole = ask(keys, values)
    parts = [slice(0, 1), slice(1, 1), slice(1, 60), slice(60, 90)]
    found = merged(*(ask(keys[:, :, p], values[:, :, p]) for p in parts))
    for one, expected in zip(found, whole, strict=True):
        assert relative_error(one, expected) < 1e-12
    for g, e in zip(gradients(both(found), leaves), gradients(both(whole), leaves), strict=True):
        assert relative_error(g, e) < 1e-12


@pytest.mark.parametrize("form", [None, *HERE])
@pytest.mark.parametrize("stored", [0, 20])
def test_merged_window_and_what_lies_behind_it_are_all_of_the_past(form, stored):
    keys, values, bandwidth = inputs(70, stored)
    leaves, beta = (keys, values, bandwidth.base), Bandwidth(bandwidth.base)
    start = starts(2, 70, stored, seed=1)
    given = keys[:, :, stored:], keys, values, beta
    read = lambda *far: kernel_regression(*given, Reach(*far, start=start), log_sum=True, form=form)  # noqa: E731
    parts = lambda: merged(read(1, 8), read(8, 31), read(31))  # noqa: E731
    whole, found = read(1), parts()
    assert torch.equal(found[1] == -torch.inf, whole[1] == -torch.inf)
    assert (found[1] == -torch.inf).any() or stored  # some positions read nothing at all
    for of in (both, lambda pair: pair[0], lambda pair: pair[1]):
        known = of(whole).isfinite()
        assert relative_error(of(found)[known], of(whole)[known]) < 1e-12
        for g, e in zip(gradients(of(parts()), leaves), gradients(of(read(1)), leaves), strict=True):
            assert g.isfinite().all() and relative_error(g, e) < 1e-12


def test_merged_reads_can_be_merged_again_and_have_their_dtype():
    reads = [(torch.randn(1, 2, 3, 4).bfloat16(), 30 * torch.randn(1, 2, 3)) for _ in range(3)]
    found, expected = merged(merged(*reads[:2]), reads[2]), merged(*reads)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    assert relative_error(found[0], expected[0]) < 1e-2 and relative_error(found[1], expected[1]) < 1e-6


def test_merged_refuses_reads_that_do_not_fit():
    read = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))
    for reads in ([], [read, (torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3))], [(read[0], torch.zeros(2, 3))]):
        with pytest.raises(ValueError, match="give reads of one"):
            merged(*reads)


def test_log_sum_never_takes_the_form_that_has_none(monkeypatch):
    keys, values, bandwidth = inputs(300)
    monkeypatch.setattr(compiled, "available", lambda: False)
    with pytest.raises(ValueError, match="no sums of weights"):
        kernel_regression(keys, keys, values, bandwidth, Reach(1), log_sum=True, form="shifted")
    taken = []
    for name in FORMS:
        monkeypatch.setitem(FORMS, name, lambda q, *_, name=name, **__: taken.append(name) or (q, q))
    for delay in (1, None):
        kernel_regression(keys, keys, values, bandwidth, Reach(delay), log_sum=True)
    assert taken == ["blockwise", "blockwise"]


@torch.no_grad()
@pytest.mark.parametrize("form", [None, *HERE])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_log_sum_takes_nothing_from_a_pair_that_may_not_be_read(form, what):
    keys, values, bandwidth = inputs(60, dtype=torch.float32, width=8)
    queries = keys.detach().clone()
    expected = kernel_regression(queries, keys, values, bandwidth, Reach(3), log_sum=True, form=form)
    (keys if what == "keys" else values).data[1, 0, 40, 1] = torch.nan
    found = kernel_regression(queries, keys, values, bandwidth, Reach(3), log_sum=True, form=form)
    for one, known in zip(found, expected, strict=True):
        assert torch.equal(one[:, :, :3], known[:, :, :3])
        assert relative_error(one[:, :, 3:43], known[:, :, 3:43]) < 1e-5
    assert found[0][1, 0, 43:].isnan().any(-1).all()


def test_dropout_of_merged_reads_is_that_of_the_whole():
    keys, _, bandwidth = inputs(200, batch=1)
    values, beta = torch.eye(200, dtype=torch.float64).expand(1, 2, 200, 200), Bandwidth(bandwidth.base)
    kept = kernel_regression(keys, keys, values, beta, ALL_PAIRS)
    parts = [
        kernel_regression(keys, keys[:, :, p], values[:, :, p], beta, ALL_PAIRS, dropout=0.3, log_sum=True)
        for p in (slice(0, 70), slice(70, 200))
    ]
    found, _ = merged(*parts)
    alive = found != 0
    assert abs((~alive).double().mean() - 0.3) < 0.02 and relative_error(found[alive], kept[alive] / 0.7) < 1e-9
