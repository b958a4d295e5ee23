"""What is kept of weights that are not written out is what all weights say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights_at import inputs

from helpers import relative_error
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach, compiled, summary, summary_of, weights, widened

FORMS = ["naive", pytest.param("compiled", marks=pytest.mark.skipif(not compiled.available(), reason="no compiler"))]


def tokens_of(slots, kinds=4):
    return torch.randint(-1, kinds, (1 + slots,), generator=torch.Generator().manual_seed(slots))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    time=st.sampled_from([1, 2, 47, 49, 130, 300]),
    stored=st.sampled_from([0, 0, 3, 130]),
    delay=st.sampled_from([0, 1, 16]),
    window=st.sampled_from([None, 1, 40]),
    documents=st.booleans(),
    top=st.sampled_from([1, 3, 50]),
    near=st.sampled_from([0, 5, 1000]),
    sharp=st.sampled_from([1.0, 30.0, -30.0]),
)
def test_summary_is_that_of_all_weights(form, time, stored, delay, window, documents, top, near, sharp):
    keys, bandwidth, start = inputs(time, stored)
    bandwidth = Bandwidth(sharp * bandwidth.base, bandwidth.slope, bandwidth.exponent)
    reach = Reach(delay, window, start if documents else None)
    tokens, slots = tokens_of(stored + time), stored + time
    found = summary(keys[:, :, stored:], keys, bandwidth, reach, top, near, tokens, form=form)
    all_of = weights(keys[:, :, stored:], keys, bandwidth, reach)
    assert found.weights.shape == found.slots.shape == (*all_of.shape[:3], top)
    largest = all_of.topk(min(top, slots), dim=-1).values
    assert relative_error(found.weights[..., :slots], largest) < 1e-9 and not found.weights[..., slots:].any()
    there = found.slots >= 0
    assert torch.equal(there, found.weights > 0) and (there.sum(-1) == (all_of > 0).sum(-1).clamp(max=top)).all()
    assert relative_error(all_of.gather(-1, found.slots.clamp(min=0)) * there, found.weights) < 1e-9
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in found.slots.flatten(0, 2))
    assert relative_error(found.entropy, torch.special.entr(all_of).sum(-1)) < 1e-9
    own = stored + torch.arange(time)
    back = own[:, None] - torch.arange(slots)
    assert relative_error(found.near, (all_of * (back <= near)).sum(-1)) < 1e-9
    assert relative_error(found.distance, (all_of * back).sum(-1)) < 1e-9
    now = tokens[1:][own][:, None]
    for number, held in enumerate((tokens[1:], tokens[:-1])):
        expected = (all_of * ((held == now) & (now >= 0) & (back > 0))).sum(-1)
        assert relative_error(found.repeats[..., number], expected) < 1e-9


@pytest.mark.skipif(not compiled.available(), reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_summary_in_float32_is_near_its_twin(dtype):
    keys = torch.nn.functional.normalize(inputs(700, 130)[0], dim=-1).float()
    bandwidth = Bandwidth(*(torch.tensor([x] * 3) for x in (4.5, 4.5, 0.4)))
    stored = keys if dtype == torch.float32 else Narrow.of(keys, dtype)
    given = (Reach(1), 4, 64, tokens_of(830))
    found = summary(keys[:, :, 130:], stored, bandwidth, *given, form="compiled")
    exact = [x.double() for x in (keys[:, :, 130:], widened(stored))]
    twin = summary(*exact, Bandwidth(*(x.double() for x in bandwidth)), *given, form="naive")
    assert (found.slots == twin.slots).float().mean() > 0.99
    for own, expected in zip(found[1:], twin[1:], strict=True):
        assert own.dtype == torch.float32 and relative_error(own, expected) < 1e-5


@pytest.mark.skipif(not compiled.available(), reason="no compiler")
def test_summary_is_not_changed_by_pairs_that_may_not_be_read():
    keys, bandwidth, _ = inputs(60, 0)
    expected = summary(keys, keys, bandwidth, Reach(16), 3, 5, tokens_of(60))
    broken = keys.clone()
    broken[:, :, 50:] = torch.nan
    found = summary(keys, broken, bandwidth, Reach(16), 3, 5, tokens_of(60))
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_summary_refuses_what_it_cannot_read():
    keys, bandwidth, _ = inputs(6, 0)
    for wanted, access, said in (
        ((0, 5, tokens_of(6)), dict(), "top 0"),
        ((1, -1, tokens_of(6)), dict(), "near -1"),
        ((1, 5, tokens_of(6)), dict(delay=None), "delay is None"),
        ((1, 5, tokens_of(5)), dict(), "tokens of shape"),
        ((1, 5, tokens_of(6)), dict(form="quick"), "no form"),
    ):
        with pytest.raises(ValueError, match=said):
            summary(keys, keys, bandwidth, Reach(access.pop("delay", 1)), *wanted, **access)
    assert summary_of(keys.to("meta"), keys, bandwidth, Reach(1)) is None
