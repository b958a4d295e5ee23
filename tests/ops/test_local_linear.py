"""Local linear attention: conjugate gradients against the closed form, both against a ridge regression of others and
against what is known of its limits."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import relative_error
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach, kernel_regression
from mosaics.ops.local_linear import FORMS, LONGEST, blockwise, local_linear

KINDS = {"relative": dict(relative=True), "absolute": dict(relative=False), "probe": {}}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 5)


def inputs(kind, time, stored=0, width=4, value_width=3, batch=2, heads=2, seed=0, dtype=torch.float64):
    """Tensors by name; what else the op takes for a kind is in `KINDS`."""
    draw = torch.Generator().manual_seed(seed)

    def normal(time, width):
        return torch.randn(batch, heads, time, width, generator=draw, dtype=torch.float64).to(dtype)

    tensors = dict(queries=normal(time, width), keys=normal(stored + time, width))
    tensors["values"] = normal(stored + time, value_width)
    if kind == "probe":
        return tensors | dict(probe=normal(time, width))
    return tensors | dict(ridge=(0.3 + torch.rand(heads, generator=draw, dtype=torch.float64)).to(dtype))


def results(tensors, **options):
    """What is read, and the gradients of a random projection of it."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    read, _ = local_linear(**leaves, **options)
    draw = torch.Generator().manual_seed(9)
    weight = torch.randn(read.shape, generator=draw, dtype=torch.float64).to(read.dtype)
    return [read, *torch.autograd.grad(read, list(leaves.values()), weight)]


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    time=st.integers(1, 40),
    stored=st.integers(0, 20),
    width=st.integers(1, 6),
    value_width=st.integers(1, 5),
    documents=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blockwise_equals_the_closed_form(kind, time, stored, width, value_width, documents, seed):
    tensors, start = inputs(kind, time, stored, width, value_width, seed=seed), None
    if documents:
        border = torch.rand(2, time, generator=torch.Generator().manual_seed(seed)) < 0.1
        start = torch.where(border, torch.arange(time).expand(2, time), -stored // 2).cummax(1).values
    options = dict(KINDS[kind], start=start, iterations=100)
    expected = results(tensors, form="naive", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 7)
        found = results(tensors, form="blockwise", **options)
    for one, wanted in zip(found, expected, strict=True):  # with one pair to read, some gradients are 0
        assert torch.dist(one, wanted) <= 1e-9 * max(wanted.norm(), 1e-3)


@pytest.mark.parametrize("width, iterations, bound", [(8, 9, 1e-9), (32, 32, 1e-9), (32, 24, 1e-7), (32, 16, 1e-4)])
def test_gradients_are_as_exact_as_the_iterations_allow(width, iterations, bound):
    tensors = inputs("relative", 150, width=width)
    expected = results(tensors, form="naive")
    for found, wanted in zip(results(tensors, form="blockwise", iterations=iterations), expected, strict=True):
        assert relative_error(found, wanted) < bound


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_residual_bounds_the_error_of_what_was_read(iterations):
    """|o - o*| <= |Cov(k, v)| |r - r*| and |r - r*| <= |residual| / lambda."""
    tensors = inputs("relative", 30)
    queries, keys, values, ridge = tensors.values()
    exact, none = local_linear(**tensors, form="naive")
    found, residual = local_linear(**tensors, iterations=iterations)
    logits = (queries @ keys.mT / 2).masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf)
    weights = logits.softmax(-1)
    mean = weights @ keys
    covariance = torch.einsum("bhts,bhsd,bhsv->bhtdv", weights, keys, values) - torch.einsum(
        "bhtd,bhtv->bhtdv", mean, weights @ values
    )
    left = residual * (mean - queries).norm(dim=-1)
    bound = torch.linalg.matrix_norm(covariance, 2) * left / ridge[:, None]
    error = (found - exact).norm(dim=-1)
    assert (none == 0).all() and not residual.requires_grad
    assert (error <= bound + 1e-12).all() and (error[:, :, 10:] > 1e-4 * bound[:, :, 10:]).all()
    again = local_linear(**tensors, iterations=2 * iterations).residual
    assert again.mean() < 0.5 * residual.mean()
    assert local_linear(**tensors, iterations=5).residual.max() < 1e-12  # as many as keys are wide, and one


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("relative", [True, False])
def test_local_linear_is_the_ridge_regression_of_scikit_learn(relative, form, shared):
    path = shared / "fixtures" / f"lla_ridge_{'relative' if relative else 'absolute'}.safetensors"
    file = load_file(path)
    with safe_open(path, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    assert config["relative"] is relative
    queries, keys, values = (file[f"input/{name}"].transpose(1, 2) for name in "qkv")
    ridge = torch.full((2,), config["lambda"], dtype=torch.float64)
    options = dict(ridge=ridge, relative=relative, scale=1 / config["bandwidth"], form=form)
    read, residual = local_linear(queries, keys, values, **options)
    assert relative_error(read.transpose(1, 2), file["output/o"]) < 1e-12
    assert residual.max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_probe_is_parallax_of_flash_linear_attention(form, shared):
    file = load_file(shared / "fixtures" / "lla_parallax_fla.safetensors")
    queries, probe, keys, values = inputs = [file[f"input/{name}"].requires_grad_() for name in "qrkv"]
    queries, probe = queries.transpose(1, 2), probe.transpose(1, 2)
    keys, values = (x.transpose(1, 2).repeat_interleave(2, dim=1) for x in (keys, values))
    read, residual = local_linear(queries, keys, values, probe=probe, form=form)
    assert residual is None
    assert relative_error(read.transpose(1, 2), file["output/o"]) < 1e-12
    found = torch.autograd.grad((read.transpose(1, 2) * file["weight/o"]).sum(), inputs)
    for gradient, name in zip(found, "qrkv", strict=True):
        assert relative_error(gradient, file[f"grad/{name}"]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_linear_data_are_answered_exactly_and_a_large_ridge_is_softmax_attention(form):
    """The two ends that the method lies between."""
    tensors = inputs("relative", 40, width=4)
    queries, keys, values, ridge = tensors.values()
    slope, offset = torch.randn(2, 2, 4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    options = dict(form=form, iterations=30)
    read, _ = local_linear(queries, keys, keys @ slope + offset, ridge=torch.full_like(ridge, 1e-10), **options)
    assert relative_error(read[:, :, 8:], (queries @ slope + offset)[:, :, 8:]) < 1e-6
    read, _ = local_linear(queries, keys, values, ridge=torch.full_like(ridge, 1e12), **options)
    softmax = kernel_regression(queries, keys, values, Bandwidth(torch.full_like(ridge, 0.5)), Reach(0))
    assert relative_error(read, softmax) < 1e-9
    nothing = torch.zeros_like(queries)
    assert relative_error(local_linear(queries, keys, values, probe=nothing, form=form).read, softmax) < 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind, form, small_tiles):
    tensors = inputs(kind, 6, stored=2, width=2, value_width=2, batch=1, heads=1)
    start = torch.tensor([[-1] * 3 + [3] * 3])

    def function(*given):
        torch.manual_seed(3)  # of the dropout
        named = dict(zip(tensors, given, strict=True))
        return local_linear(**named, **KINDS[kind], start=start, iterations=8, dropout=0.3, form=form).read

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("kind", ["relative", "probe"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-3)])
def test_lower_precision_keeps_its_digits(kind, dtype, bound):
    rounded = inputs(kind, 300, width=16, dtype=dtype)
    expected, _ = local_linear(**{name: x.double() for name, x in rounded.items()}, form="naive")
    read, residual = local_linear(**rounded)
    assert read.dtype == dtype and relative_error(read, expected) < bound
    assert residual is None or (residual.dtype == torch.float32 and residual.max() < 1e-4)


def test_a_relative_ridge_knows_no_size_of_weights():
    """Logits of several hundreds, in float32."""
    tensors = inputs("relative", 60, width=4)
    expected = results(tensors, form="naive", scale=100.0)
    narrow = {name: x.float() for name, x in tensors.items()}
    assert relative_error(results(narrow, scale=100.0)[0], expected[0]) < 1e-3
    assert all(x.isfinite().all() for x in results(narrow, scale=1000.0))


@pytest.mark.parametrize("kind", ["relative", "probe"])
def test_backward_inside_autocast_keeps_its_precision(kind):
    tensors = {name: x.float() for name, x in inputs(kind, 30).items()}
    plain = results(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(tensors)
    for one, wanted in zip(found, plain, strict=True):
        assert torch.equal(one, wanted)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_blockwise_holds_no_matrix_of_all_pairs(kind):
    tensors = inputs(kind, 500, width=4, batch=1, heads=1)
    with Largest() as largest:
        results(tensors, form="blockwise", **KINDS[kind])
    assert largest.numbers <= blockwise.BLOCK * 500
    with Largest() as largest:
        results(tensors | {name: x[:, :, :100] for name, x in tensors.items() if x.dim() == 4}, form="naive")
    assert largest.numbers >= 100 * 100


@pytest.mark.parametrize("kind", ["relative", "probe"])
def test_dropout_keeps_the_mean_and_drops_the_share(kind, small_tiles):
    tensors = inputs(kind, 60, batch=1) | dict(values=torch.eye(60, dtype=torch.float64).expand(1, 2, 60, 60))
    for form in FORMS:
        kept = local_linear(**tensors, form=form).read
        dropped = [local_linear(**tensors, form=form, dropout=0.3).read for _ in range(2)]
        there = kept.abs() > 1e-6
        assert abs((dropped[0][there] == 0).double().mean() - 0.3) < 0.03
        alive = dropped[0] != 0
        assert relative_error(dropped[0][alive], kept[alive] / 0.7) < 1e-9
        assert not torch.equal(*dropped)
        assert relative_error(kept.sum(-1), torch.ones(1, 2, 60)) < 1e-9  # weights of sum 1


def test_pairs_in_fewer_bits_are_read_as_they_were_rounded():
    tensors = {name: x.float() for name, x in inputs("relative", 20).items()}
    narrow = {name: Narrow.of(tensors[name], torch.int8) for name in ("keys", "values")}
    rounded = {name: x.widened() for name, x in narrow.items()}
    assert torch.equal(local_linear(**tensors | narrow).read, local_linear(**tensors | rounded).read)


def test_local_linear_runs_on_the_meta_device():
    for kind in KINDS:
        tensors = {name: x.to("meta") for name, x in inputs(kind, 600).items()}
        assert local_linear(**tensors, **KINDS[kind]).read.shape == (2, 2, 600, 3)


def test_refuses_what_it_cannot_compute():
    tensors, probe = inputs("relative", 6), torch.zeros(2, 2, 6, 4, dtype=torch.float64)
    wrong = {
        "give one of them": dict(probe=probe),
        "got keys of shape": dict(keys=tensors["keys"][:1]),
        "got ridges of shape": dict(ridge=tensors["ridge"][:1]),
        "3 pairs for 6 positions": {name: tensors[name][:, :, :3] for name in ("keys", "values")},
        "at least 1": dict(iterations=0),
        "probability": dict(dropout=1.0),
        "did you mean 'naive'": dict(form="naiv"),
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            local_linear(**tensors | change)
    with pytest.raises(ValueError, match="give one of them"):
        local_linear(**{name: x for name, x in tensors.items() if name != "ridge"})
    with pytest.raises(ValueError, match=f"up to {LONGEST} positions, not {LONGEST + 1}"):
        local_linear(**inputs("relative", LONGEST + 1), form="naive")
