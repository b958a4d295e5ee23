import math

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import gradients, relative_error
from mosaics.ops.kernel_regression import (
    ALL_PAIRS,
    FORMS,
    Bandwidth,
    Reach,
    blockwise,
    compiled,
    kernel_regression,
    weights,
)

HERE = [form for form in FORMS if form != "single" and (form != "compiled" or compiled.available())]
FAST = [form for form in HERE if form != "naive"]
DROPPING = [form for form in HERE if form not in ("compiled", "flex")]


@pytest.fixture(autouse=True, scope="module")
def _flex_on_a_processor():
    """FlexAttention as plain products, and with the gradient that these have but that it refuses on a processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_validate_device", lambda *_: None)
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


def inputs(time, stored=0, batch=2, heads=2, width=4, dtype=torch.float64, seed=0):
    """Unit keys as queries too (rows of `stored` older pairs first), values, and a bandwidth near Table 6's start."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    keys = F.normalize(normal(batch, heads, stored + time, width), dim=-1).to(dtype).requires_grad_()
    values = normal(batch, heads, stored + time, 3).to(dtype).requires_grad_()
    base, slope = (math.exp(1.5) + 0.1 * normal(heads) for _ in range(2))
    bandwidth = Bandwidth(*(x.to(dtype).requires_grad_() for x in (base, slope, 1 / 3 + 0.05 * normal(heads))))
    return keys, values, bandwidth


def starts(batch, time, stored, seed):
    """Documents that begin at random, the first of them within the stored pairs."""
    generator = torch.Generator().manual_seed(seed)
    border = torch.rand(batch, time, generator=generator) < 0.05
    open_since = -torch.randint(0, stored + 1, (batch, 1), generator=generator)
    if stored == 0:
        border[:, 0] = True
    return torch.where(border, torch.arange(time), open_since).cummax(1).values


def read(keys, values, bandwidth, time, form, reach, **options):
    return kernel_regression(keys[:, :, keys.shape[2] - time :], keys, values, bandwidth, reach, form=form, **options)


def serves(form, stored, window):
    return form != "shifted" or (stored == 0 and window is None)


def test_kernel_regression_naive_is_equations_3_and_6():
    time, delay, window = 9, 2, 6
    keys, values, bandwidth = inputs(time)
    start = starts(2, time, 0, seed=4)
    out = read(keys, values, bandwidth, time, "naive", Reach(delay, window, start))
    for b in range(2):
        for h in range(2):
            for t in range(time):
                pairs = [i for i in range(time) if i >= start[b, t] and t - window + 1 <= i <= t - delay]
                if not pairs:
                    assert (out[b, h, t] == 0).all()
                    continue
                beta = bandwidth.slope[h] * len(pairs) ** bandwidth.exponent[h] + bandwidth.base[h]
                # Equation 3: exp(-beta' |k - k_i|^2) with beta' = beta / 2, the factor that equation 4 absorbs.
                kernel = [torch.exp(-beta / 2 * (keys[b, h, t] - keys[b, h, i]).square().sum()) for i in pairs]
                expected = sum(k * values[b, h, i] for k, i in zip(kernel, pairs, strict=True)) / sum(kernel)
                assert relative_error(out[b, h, t], expected) < 1e-12


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("stored", [0, 1, 50])
@pytest.mark.parametrize("delay, window", [(1, None), (7, None), (64, None), (0, None), (1, 2), (1, 32), (3, 5)])
@pytest.mark.parametrize("time", [1, 63, 129, 300])
def test_kernel_regression_form_equals_naive_in_value_and_gradient(form, time, delay, window, stored, documents):
    if form == "flex" and time == 300:
        return  # slow where it is not compiled
    reach = Reach(delay, window, starts(2, time, stored, seed=time) if documents else None)
    if not serves(form, stored, window):
        with pytest.raises(ValueError, match="blockwise"):
            read(*inputs(time, stored), time, form, reach)
        return
    keys, values, bandwidth = inputs(time, stored)
    leaves = (keys, values, *bandwidth)
    value, expected = (read(keys, values, bandwidth, time, f, reach) for f in (form, "naive"))
    assert relative_error(value, expected) < 1e-9
    for g, e in zip(gradients(value, leaves), gradients(expected, leaves), strict=True):
        assert relative_error(g, e) < 1e-9


@pytest.mark.parametrize("window", [None, 256])
def test_kernel_regression_forms_agree_at_length_1000(window):
    keys, values, bandwidth = inputs(1000, batch=1, heads=1)
    expected = read(keys, values, bandwidth, 1000, "naive", Reach(64, window))
    for form in FAST:
        if serves(form, 0, window):
            assert relative_error(read(keys, values, bandwidth, 1000, form, Reach(64, window)), expected) < 1e-9


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70), st.integers(0, 30), st.integers(0, 20), st.none() | st.integers(1, 40), st.integers(0, 10**6)
)
def test_kernel_regression_forms_agree_on_any_shape(time, stored, delay, window, seed):
    keys, values, bandwidth = inputs(time, stored, seed=seed)
    reach = Reach(delay, window, starts(2, time, stored, seed) if seed % 2 else None)
    expected = read(keys, values, bandwidth, time, "naive", reach)
    block, blockwise.BLOCK = blockwise.BLOCK, 1 + seed % 17  # many tiles, however short the sequence
    try:
        for form in FAST:
            if serves(form, stored, window):
                assert relative_error(read(keys, values, bandwidth, time, form, reach), expected) < 1e-9
    finally:
        blockwise.BLOCK = block


@pytest.mark.parametrize("form", FAST)
def test_kernel_regression_form_equals_naive_in_float32(form):
    keys, values, bandwidth = inputs(400, dtype=torch.float32, width=16)
    exact_keys, exact_values, exact_bandwidth = inputs(400, width=16)
    value = read(keys, values, bandwidth, 400, form, Reach(5))
    expected = read(exact_keys, exact_values, exact_bandwidth, 400, "naive", Reach(5))
    assert relative_error(value, expected) < 1e-5
    leaves, exact = (keys, values, *bandwidth), (exact_keys, exact_values, *exact_bandwidth)
    for g, e in zip(gradients(value, leaves), gradients(expected, exact), strict=True):
        assert relative_error(g, e) < 1e-5


@pytest.mark.parametrize("form", HERE)
def test_kernel_regression_bfloat16_is_near_the_float32_twin(form):
    keys, values, bandwidth = inputs(2000, batch=1, heads=1, width=64)
    low_keys, low_values = keys.detach().bfloat16(), values.detach().bfloat16()
    wide = Bandwidth(*(x.detach().float() for x in bandwidth))
    value = read(low_keys, low_values, wide, 2000, form, Reach(64))
    expected = read(low_keys.float(), low_values.float(), wide, 2000, "naive", Reach(64))
    assert value.dtype == torch.bfloat16
    assert relative_error(value, expected) < 1e-2


@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize("time, delay", [(5, 5), (5, 9), (4, 3)])
def test_kernel_regression_without_pairs_is_exactly_zero(form, time, delay):
    keys, values, bandwidth = inputs(time)
    out = read(keys, values, bandwidth, time, form, Reach(delay))
    assert (out[:, :, :delay] == 0).all()
    assert out.isfinite().all() and (time <= delay or (out[:, :, delay:] != 0).all())
    if out.requires_grad:
        assert all(g.isfinite().all() for g in gradients(out, (keys, values, *bandwidth)))


@pytest.mark.parametrize("form", HERE)
def test_kernel_regression_does_not_depend_on_unreadable_pairs(form):
    keys, values, bandwidth = inputs(40)
    start = torch.where(torch.arange(40) >= 20, 20, 0).expand(2, 40)
    out = read(keys, values, bandwidth, 40, form, Reach(3, start=start))
    for t in (0, 2, 3, 19, 20, 22, 23, 39):
        (touched,) = torch.autograd.grad(out[:, :, t].sum(), values, retain_graph=True, allow_unused=True)
        reached = set() if touched is None else set(touched.abs().sum((0, 1, 3)).nonzero()[:, 0].tolist())
        assert reached == set(range(20 if t >= 20 else 0, t - 3 + 1))


@torch.no_grad()
@pytest.mark.parametrize("form", [None, *HERE])
@pytest.mark.parametrize("what, bad", [("values", math.nan), ("values", math.inf), ("keys", math.nan), ("keys", 1e38)])
@pytest.mark.parametrize("stored, window", [(0, None), (0, 20), (30, None), (30, 20)])
@pytest.mark.parametrize("documents, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_kernel_regression_passes_nothing_on_from_a_pair_that_may_not_be_read(
    form, what, bad, stored, window, documents, dtype
):
    start = torch.where(torch.arange(150) >= 70, 70, -5 if stored else 0).expand(2, 150) if documents else None
    reach = Reach(3, window, start)
    if not serves(form, stored, window):
        return
    keys, values, bandwidth = inputs(150, stored, width=8, dtype=dtype)
    queries, bandwidth = keys[:, :, stored:].detach(), Bandwidth(*(x.float() for x in bandwidth))
    expected = kernel_regression(queries, keys, values, bandwidth, reach, form=form)
    for slot in (stored // 2, stored + 65, stored + 149):
        spoilt = {"keys": keys.detach().clone(), "values": values.detach().clone()}
        spoilt[what][1, 0, slot, 1] = bad
        found = kernel_regression(queries, *spoilt.values(), bandwidth, reach, form=form)
        clean = torch.ones(2, 2, 150, dtype=torch.bool)
        clean[1, 0] = weights(queries, keys, bandwidth, reach)[1, 0, :, slot] == 0
        # The form may compute the others in another order.
        assert relative_error(found[clean], expected[clean]) < (1e-5 if dtype == torch.float32 else 1e-2)
        assert bad == 1e38 or not found[1, 0][~clean[1, 0]].isfinite().all(-1).any()


def test_kernel_regression_gives_gradients_where_only_a_pair_that_nobody_reads_is_no_number():
    keys, values, bandwidth = inputs(100)
    values.data[:, :, -1] = torch.nan
    spoilt = gradients(read(keys, values, bandwidth, 100, "blockwise", Reach(1)), (keys, values, *bandwidth))
    values.data[:, :, -1] = 0
    sound = gradients(read(keys, values, bandwidth, 100, "blockwise", Reach(1)), (keys, values, *bandwidth))
    assert all(relative_error(g, e) < 1e-9 for g, e in zip(spoilt, sound, strict=True))


def test_kernel_regression_can_be_vectorised():
    keys, values, bandwidth = inputs(20)
    found = torch.vmap(lambda q: kernel_regression(q, keys, values, bandwidth, Reach(1), form="naive"))(keys[None])
    assert relative_error(found[0], read(keys, values, bandwidth, 20, "naive", Reach(1))) < 1e-12


def test_kernel_regression_weights_sum_to_one_or_zero():
    keys, _, bandwidth = inputs(30)
    sums = weights(keys, keys, bandwidth, Reach(4, window=9)).sum(-1)
    assert (sums[:, :, :4] == 0).all() and (sums[:, :, 4:] - 1).abs().max() < 1e-12


@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize("window", [None, 5])
def test_kernel_regression_gradcheck(form, window):
    if not serves(form, 0, window):
        return
    keys, values, bandwidth = inputs(11, batch=1, heads=2, width=3)
    queries = torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0] * 6 + [6] * 5])

    def function(q, k, v, *beta):
        return kernel_regression(q, k, v, Bandwidth(*beta), Reach(2, window, start), form=form)

    assert torch.autograd.gradcheck(function, (queries, keys, values, *bandwidth), fast_mode=form == "flex")


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize("beta", [-800.0, -100.0, -61.0, -1.0, -0.05, 0.0, 0.05, 0.11])
@pytest.mark.parametrize("slope", [None, 3.0])
def test_kernel_regression_takes_bandwidths_of_either_sign(form, dtype, bound, beta, slope):
    """With a slope the bandwidth is 0 at one number of pairs, and beyond it of the other sign."""
    keys, values, _ = inputs(200, width=8)
    parts = (beta, None, None) if slope is None else (beta, slope, 0.5 if beta > -100 else 0.9)
    found = []
    for f, of in ((form, dtype), ("naive", torch.float64)):
        leaves = [x.detach().to(dtype).to(of).requires_grad_() for x in (keys, values)]
        sizes = (None if x is None else torch.full((2,), x, dtype=torch.float64).to(dtype) for x in parts)
        bandwidth = [None if x is None else x.to(of).requires_grad_() for x in sizes]
        out = read(*leaves, Bandwidth(*bandwidth), 200, f, Reach(1))
        found.append([out, *gradients(out, (*leaves, *(x for x in bandwidth if x is not None)))])
    for value, expected in zip(*found, strict=True):
        # In float32 a logit is rounded by a part of beta.
        assert relative_error(value, expected) < bound * (1 if dtype == torch.float64 else max(1, abs(beta) / 20))


def test_kernel_regression_refuses_a_form_that_there_is_not():
    keys, values, bandwidth = inputs(4)
    with pytest.raises(ValueError, match="did you mean 'shifted'"):
        kernel_regression(keys, keys, values, bandwidth, Reach(1), form="shift")


@pytest.mark.parametrize("form", HERE)
def test_kernel_regression_keeps_its_precision_under_autocast(form):
    keys, values, bandwidth = inputs(150, dtype=torch.float32, width=16)
    expected = read(keys, values, bandwidth, 150, form, Reach(5))
    with torch.autocast("cpu", torch.bfloat16):
        found = read(keys, values, bandwidth, 150, form, Reach(5))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_kernel_regression_backward_inside_autocast_keeps_its_precision():
    keys, values, bandwidth = inputs(150, dtype=torch.float32, width=16)
    out = read(keys, values, bandwidth, 150, "blockwise", Reach(5, window=40))
    weight = torch.randn_like(out)
    expected = torch.autograd.grad(out, (keys, values), weight, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, (keys, values), weight)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bandwidth_counts_more_pairs_than_the_dtype_of_its_parameters_can(dtype):
    count = torch.tensor([4000, 65536])
    low = Bandwidth(*(torch.full((1,), x, dtype=dtype) for x in (4.5, 4.5, 0.375)))
    assert relative_error(low.at(count), Bandwidth(*(x.double() for x in low)).at(count)) < 1e-6


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_kernel_regression_of_a_fixed_set_reads_every_pair(time, pairs, seed):
    keys, values, bandwidth = inputs(pairs, seed=seed)
    queries = torch.randn(2, 2, time, 4, dtype=torch.float64, requires_grad=True)
    leaves = (queries, keys, values, bandwidth.base, bandwidth.slope, bandwidth.exponent)
    logits = bandwidth.at(torch.tensor([pairs]))[..., None] * (queries @ keys.mT)
    expected = logits.softmax(-1) @ values
    wanted = gradients(expected, leaves)
    for form in (*HERE, None):
        found = kernel_regression(queries, keys, values, bandwidth, ALL_PAIRS, form=form)
        assert relative_error(found, expected) < 1e-9
        for g, e in zip(gradients(found, leaves), wanted, strict=True):
            assert (g - e).norm() < 1e-9 * max(1.0, e.norm())


@pytest.mark.parametrize("form", DROPPING)
@pytest.mark.parametrize("delay", [1, None])
def test_kernel_regression_dropout_keeps_the_mean_and_drops_the_share(form, delay):
    keys, _, bandwidth = inputs(200, batch=1, heads=2)
    values = torch.eye(200, dtype=torch.float64).expand(1, 2, 200, 200)  # what comes out is the weights
    block, blockwise.BLOCK = blockwise.BLOCK, 50
    try:
        kept = read(keys, values, bandwidth, 200, form, Reach(delay))
        dropped = [read(keys, values, bandwidth, 200, form, Reach(delay), dropout=0.3) for _ in range(2)]
    finally:
        blockwise.BLOCK = block
    there = kept > 0
    for found in dropped:
        assert abs((found[there] == 0).double().mean() - 0.3) < 0.02
        alive = found != 0
        assert relative_error(found[alive], kept[alive] / 0.7) < 1e-9
    assert not torch.equal(*dropped)
    tiles = dropped[0][0, 0, 50:100, :40] == 0, dropped[0][0, 0, 150:, :40] == 0
    assert not torch.equal(*tiles)  # one tile's draws are not the next one's


@pytest.mark.parametrize("form", DROPPING)
def test_kernel_regression_gradient_is_that_of_what_was_not_dropped(form):
    keys, values, bandwidth = inputs(9, batch=1, heads=2, width=3)
    start = torch.tensor([[0] * 5 + [5] * 4])

    def function(k, v, *beta):
        torch.manual_seed(3)
        return kernel_regression(k, k, v, Bandwidth(*beta), Reach(1, start=start), dropout=0.4, form=form)

    block, blockwise.BLOCK = blockwise.BLOCK, 3
    try:
        assert torch.autograd.gradcheck(function, (keys, values, *bandwidth))
    finally:
        blockwise.BLOCK = block


def test_kernel_regression_with_dropout_keeps_no_weights():
    keys, values, bandwidth = inputs(300, batch=1, heads=1)
    largest = 0

    def pack(x):
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    for delay in (1, None):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            kernel_regression(keys, keys, values, bandwidth, Reach(delay), dropout=0.1)
    assert largest <= keys.numel()


needs_compiler = pytest.mark.skipif(not compiled.available(), reason="there is no C++ compiler")


@needs_compiler
@settings(deadline=None, max_examples=15)
@given(
    st.integers(2, 900), st.integers(0, 300), st.integers(1, 130), st.integers(1, 70), st.none() | st.integers(1, 500)
)
def test_kernel_regression_compiled_equals_naive_at_any_width(time, stored, width, value_width, window):
    torch.manual_seed(time)
    double = dict(dtype=torch.float64)
    queries, keys = (F.normalize(torch.randn(1, n, 3, width, **double), dim=-1) for n in (time, stored + time))
    values = torch.randn(1, stored + time, 3, value_width, **double)
    leaves = [x.transpose(1, 2).requires_grad_() for x in (queries, keys, values)]
    beta = torch.tensor([1.0, 30.0, 100.0], **double, requires_grad=True)
    found, expected = (
        kernel_regression(*leaves, Bandwidth(beta), Reach(1, window), form=form) for form in ("compiled", "naive")
    )
    assert relative_error(found, expected) < 1e-9
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (*leaves, beta), weight)
    for g, e in zip(torch.autograd.grad(found, (*leaves, beta), weight), wanted, strict=True):
        assert (g - e).norm() < 1e-9 * max(1.0, e.norm())


@needs_compiler
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("beta", [0.0, 59.0, 61.0, 150.0, 800.0])
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_kernel_regression_compiled_needs_no_maximum(beta, near, wide, dtype, bound, monkeypatch):
    calls = []
    call = compiled._call
    monkeypatch.setattr(compiled, "_call", lambda name, *given: (calls.append((name, given[-1])), call(name, *given)))
    # Keys within a cone, asked with keys of the cone or of the opposite one: then every logit is far below the bound.
    around = torch.full((16,), 0.25, dtype=torch.float64)
    keys, values, _ = inputs(260, width=16)
    opening = 0.4 if wide else 1 / max(beta, 4.0)
    keys = F.normalize(around + opening * keys.detach(), dim=-1).to(dtype).requires_grad_()
    queries = (keys.detach() * (1 if near else -1)).requires_grad_()
    leaves = (queries, keys, values.detach().to(dtype).requires_grad_())
    exact = [x.detach().double().requires_grad_() for x in leaves]
    outputs = []
    for form, of in (("compiled", leaves), ("naive", leaves), ("naive", exact)):
        out = kernel_regression(*of, Bandwidth(torch.full((2,), beta, dtype=of[0].dtype)), Reach(1), form=form)
        outputs.append([out, *gradients(out, of)])
    for found, twin, expected in zip(*outputs, strict=True):
        # Logits near beta may differ by about 1 here, so float32 costs the twin itself up to 1e-4 at a beta of 800.
        assert relative_error(found, expected) < max(bound, 1.5 * relative_error(twin, expected))
    again = ("forward", True) in calls  # the largest logits were looked for
    assert again == (not near and beta > 50) or (near and wide)  # a wide cone has queries with nothing near, too


@needs_compiler
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_kernel_regression_compiled_has_accurate_exponentials(dtype, bound):
    logits = torch.linspace(-40, 40, 3001, dtype=dtype)
    keys, values = torch.tensor([[0.0], [1.0]], dtype=dtype)[None, None], torch.eye(2, dtype=dtype)[None, None]
    one = Bandwidth(torch.ones(1, dtype=dtype))
    out = kernel_regression(logits[None, None, :, None], keys, values, one, ALL_PAIRS, form="compiled")[0, 0].double()
    expected = torch.stack([torch.sigmoid(-logits.double()), torch.sigmoid(logits.double())], dim=-1)
    assert ((out - expected).abs() / expected).max() < bound


@needs_compiler
@pytest.mark.parametrize("period", [10, 50, 500, None])
@pytest.mark.parametrize("theta", [(1.5, 1.5, 1 / 3), (3.0, 4.0, 0.6)])
@pytest.mark.parametrize("window", [None, 256])
def test_kernel_regression_compiled_gradient_of_beta_keeps_its_digits_where_keys_repeat(period, theta, window):
    """All logits of a repeated key are nearly the same: what is left of their sum is small."""

    class Sharp(Bandwidth):
        def at(self, count):
            return beta

    drawn = torch.randn(1, 2, 1000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = F.normalize(drawn if period is None else drawn[:, :, torch.arange(1000) % period], dim=-1).float()
    values, count = torch.randn(1, 2, 1000, 16), torch.arange(1000).clamp(1, window or 1000)
    base, slope, exponent = (torch.full((2,), x) for x in theta)
    sharp = Bandwidth(base.exp(), slope.exp(), exponent).at(count)[None]
    grads = []
    for form, dtype in (("compiled", torch.float32), ("naive", torch.float64)):
        beta, k, v = (x.to(dtype).requires_grad_() for x in (sharp, keys, values))
        out = kernel_regression(k, k, v, Sharp(base), Reach(1, window), form=form)
        grads.append(gradients(out, (k, v, beta)))
    # A logit is rounded by up to a 2^-24th of beta, and its weight by as much of itself.
    bound = max(1e-5, 2**-24 * sharp.max().item())
    assert all(relative_error(g, e) < bound for g, e in zip(*grads, strict=True))
    if period in (10, 50):
        assert relative_error(grads[0][2], grads[1][2]) < bound / 5  # these lose less than their logits


@needs_compiler
@pytest.mark.parametrize("heads", [3, 1])
@pytest.mark.parametrize("window", [100, None])
@pytest.mark.parametrize("start", [None, torch.tensor([[0] * 200 + [200] * 100])])
def test_kernel_regression_compiled_does_not_depend_on_threads(start, window, heads):
    keys, values, bandwidth = inputs(300, 150, dtype=torch.float32, batch=1, heads=heads, width=16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = read(keys, values, bandwidth, 300, "compiled", Reach(1, window, start))
            found.append([out, *torch.autograd.grad(out.square().sum(), (keys, values, *bandwidth))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_kernel_regression_compiled_passes_on_what_is_no_number():
    keys, values, bandwidth = inputs(200, dtype=torch.float32, width=16)
    values.data[0, 0, 50, 1] = torch.nan
    out = read(keys, values, bandwidth, 200, "compiled", Reach(1))
    assert out[0, 0, 51:, 1].isnan().all() and not out[1].isnan().any()
    keys.data[0, 0, 50] = torch.nan
    assert read(keys, values, bandwidth, 200, "compiled", Reach(1))[0, 0, 50:].isnan().all()


@needs_compiler
def test_kernel_regression_compiled_keeps_no_weights():
    keys, values, bandwidth = inputs(3000, batch=1, heads=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x if x.numel() <= 4 * 3000 else 1 / 0, lambda x: x):
        read(keys, values, bandwidth, 3000, "compiled", Reach(1))


@needs_compiler
def test_kernel_regression_takes_the_compiled_form_with_any_number_of_threads(monkeypatch):
    keys, values, bandwidth = inputs(20, batch=1, heads=2)
    taken = []
    for name in FORMS:
        monkeypatch.setitem(FORMS, name, lambda q, *_, name=name, **__: taken.append(name) or q)
    for threads, grad, window, dropout in [
        (2, True, 5, 0.0),
        (2, True, None, 0.0),
        (3, True, 5, 0.0),
        (3, False, 5, 0.0),
        (2, True, None, 0.1),
    ]:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with torch.set_grad_enabled(grad):
            kernel_regression(keys, keys, values, bandwidth, Reach(1, window), dropout=dropout)
    assert taken == ["compiled", "compiled", "compiled", "compiled", "blockwise"]


def test_kernel_regression_compiled_refuses_dropout():
    keys, values, bandwidth = inputs(4)
    with pytest.raises(ValueError, match="without dropout"):
        read(keys, values, bandwidth, 4, "compiled", Reach(1), dropout=0.5)


def test_kernel_regression_without_a_compiler_takes_another_form(monkeypatch):
    keys, values, bandwidth = inputs(200)
    expected = read(keys, values, bandwidth, 200, None, Reach(1, window=30))
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert relative_error(read(keys, values, bandwidth, 200, None, Reach(1, window=30)), expected) < 1e-12
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        read(keys, values, bandwidth, 200, "compiled", Reach(1))


@pytest.mark.parametrize("form", ["naive", "blockwise", "compiled", "single"])
@pytest.mark.parametrize("time", [1, 6])
@pytest.mark.parametrize("delay, window, documents", [(1, None, False), (0, 4, False), (3, None, True)])
def test_kernel_regression_of_slots_that_are_filled_so_far_equals_each_row_alone(form, time, delay, window, documents):
    if form in ("compiled", "single") and not compiled.available() or (form == "single" and time > 1):
        pytest.skip("not of this form")
    keys, values, bandwidth = inputs(time, stored=20)
    filled, here = torch.tensor([3, 17]), torch.arange(time)[None]
    start = torch.stack([torch.full((time,), -9), here[0].where(here[0] > 2, -2)]) if documents else None
    slots = (filled[:, None] + here)[:, None, :, None].expand(2, 2, time, 4)
    queries = keys.detach().gather(2, slots).requires_grad_()
    if form == "single":
        queries, keys, values = queries.detach(), keys.detach(), values.detach()
        bandwidth = Bandwidth(*(x.detach() for x in bandwidth))
    reach = Reach(delay, window, start, filled)
    found = kernel_regression(queries, keys, values, bandwidth, reach, form=form)
    alone = []
    for row, count in enumerate((filled + time).tolist()):
        own = Reach(delay, window, start[row, None] if documents else None)
        part = [x[row, None, :, :count] for x in (keys, values)]
        alone.append(kernel_regression(queries[row, None], *part, bandwidth, own, form="naive"))
    expected = torch.cat(alone)
    assert relative_error(found, expected) < 1e-9
    if form != "single":
        tensors = (queries, keys, values, *bandwidth)
        for g, e in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
            assert relative_error(g, e) < 1e-9


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"naive", "blockwise", "compiled", "single"}))
def test_kernel_regression_refuses_a_form_that_reads_all_slots(form):
    keys, values, bandwidth = inputs(4, stored=5)
    with pytest.raises(ValueError, match="reads slots that are all filled"):
        kernel_regression(keys[:, :, :4], keys, values, bandwidth, Reach(1, stored=torch.tensor([1, 5])), form=form)
