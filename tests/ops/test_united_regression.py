"""A read over a context and a store beside it equals the list of all their pairs, in value and gradient."""

import pytest
import torch

from helpers import gradients, relative_error
from mosaics.ops.kernel_regression import Bandwidth, Reach
from mosaics.ops.kernel_regression.united import united_regression, united_weights


def given(dtype=torch.float64, batch=2, heads=3, time=7, slots=11, store=13, width=4):
    make = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = draw(batch, heads, time, width), draw(batch, heads, slots, width), draw(batch, heads, slots, 5)
    bandwidth = (torch.rand(3, heads, generator=make, dtype=torch.float64) + 0.2).unbind()
    bandwidth = [x.to(dtype).requires_grad_() for x in bandwidth]
    return [*tensors, draw(1, heads, store, width), draw(1, heads, store, 5), *bandwidth]


START = torch.tensor([[-4, -4, -4, 3, 3, 5, 5], [-2, 1, 1, 1, 1, 1, 1]])


REACHES = [Reach(1), Reach(3, start=START), Reach(9), Reach(2, stored=torch.tensor([4, 2])), Reach(1, window=3)]


@pytest.mark.parametrize("reach", REACHES, ids=range(len(REACHES)))
@pytest.mark.parametrize("store", [13, 0])
@pytest.mark.parametrize("sizes, offsets", [(False, False), (True, False), (False, True), (True, True)])
def test_united_regression_equals_the_naive_form(reach, store, sizes, offsets):
    tensors = given(store=store)
    more = dict(sizes=torch.arange(store) % 4 + 1 if sizes else None)
    more["offsets"] = torch.rand(1, 3, store, 1, dtype=torch.float64) if offsets else None
    bandwidth = Bandwidth(*tensors[5:])
    one, other = (united_regression(*tensors[:5], bandwidth, reach, form=form, **more) for form in ("merged", "naive"))
    assert relative_error(one, other) < 1e-9
    if store:
        assert one.abs().amax((0, 1, 3)).min() > 0
    for a, b in zip(gradients(one, tensors), gradients(other, tensors), strict=True):
        assert relative_error(a, b) < 1e-9


def test_united_regression_counts_sizes_as_repeated_pairs():
    tensors = given()
    sizes = torch.arange(13) % 3 + 1
    repeated = [x.repeat_interleave(sizes, dim=2) for x in tensors[3:5]]
    bandwidth = Bandwidth(*tensors[5:])
    for form in ("merged", "naive"):
        one = united_regression(*tensors[:5], bandwidth, Reach(2), sizes=sizes, form=form)
        other = united_regression(*tensors[:3], *repeated, bandwidth, Reach(2), form=form)
        assert relative_error(one, other) < 1e-9


def test_united_weights_give_the_answer():
    tensors, offsets = given(), torch.rand(1, 3, 13, 1, dtype=torch.float64)
    how = Bandwidth(*tensors[5:]), Reach(2)
    own, of_store = united_weights(tensors[0], tensors[1], tensors[3], *how, offsets=offsets)
    answer = own @ tensors[2] + of_store @ tensors[4]
    assert relative_error(united_regression(*tensors[:5], *how, offsets=offsets), answer) < 1e-9


def test_united_regression_adds_offsets_to_the_products_of_keys():
    *tensors, base, slope, exponent = given()
    queries, keys, values, store_keys, store_values = (x.detach().clone() for x in tensors)
    queries[..., -1], keys[..., -1], offset = 1, 0, store_keys[..., -1:].clone()
    how, others = (Bandwidth(base, slope, exponent), Reach(2)), store_keys.clone()
    others[..., -1] = 0
    one = united_regression(queries, keys, values, store_keys, store_values, *how)
    for form in ("merged", "naive"):
        other = united_regression(queries, keys, values, others, store_values, *how, offsets=offset, form=form)
        assert relative_error(one, other) < 1e-9


def test_united_regression_is_precise_in_float32_and_bfloat16():
    exact = united_regression(*given()[:5], Bandwidth(*given()[5:]), Reach(2), form="naive")
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        tensors = given(dtype)
        one = united_regression(*tensors[:5], Bandwidth(*tensors[5:]), Reach(2))
        twin = united_regression(
            *(x.double() for x in tensors[:5]), Bandwidth(*(x.double() for x in tensors[5:])), Reach(2), form="naive"
        )
        assert one.dtype == dtype and relative_error(one, twin) < bound
        assert relative_error(one, exact) < 0.1


def test_united_regression_refuses_a_store_that_does_not_fit():
    tensors = given()
    with pytest.raises(ValueError, match="keys of the store"):
        united_regression(*tensors[:3], tensors[3][..., :3], tensors[4], Bandwidth(*tensors[5:]), Reach(1))
    with pytest.raises(ValueError, match="sizes"):
        united_regression(*tensors[:5], Bandwidth(*tensors[5:]), Reach(1), sizes=torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="offsets"):
        united_regression(*tensors[:5], Bandwidth(*tensors[5:]), Reach(1), offsets=torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="no form"):
        united_regression(*tensors[:5], Bandwidth(*tensors[5:]), Reach(1), form="fast")
