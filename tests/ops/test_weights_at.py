"""The weights of some positions are those of all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import relative_error
from mosaics.ops.kernel_regression import ALL_PAIRS, Bandwidth, Narrow, Reach, weights, weights_at


def inputs(time, stored, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, stored + time, 4, generator=generator, dtype=torch.float64)
    bandwidth = Bandwidth(*torch.rand(3, 3, generator=generator, dtype=torch.float64))
    start = torch.randint(0, 3, (2, time), generator=generator).cumsum(1) - stored
    return keys, bandwidth, torch.minimum(start, torch.arange(time))


@settings(max_examples=30, deadline=None)
@given(
    time=st.integers(1, 12),
    stored=st.integers(0, 5),
    delay=st.sampled_from([0, 1, 3, None]),
    window=st.sampled_from([None, 4]),
    documents=st.booleans(),
    begin=st.integers(0, 11),
    length=st.integers(1, 12),
)
def test_weights_at_are_those_of_weights(time, stored, delay, window, documents, begin, length):
    keys, bandwidth, start = inputs(time, stored)
    reach = ALL_PAIRS if delay is None else Reach(delay, window, start if documents else None)
    begin = min(begin, time - 1)
    asked = keys[:, :, stored:]
    whole = weights(asked, keys, bandwidth, reach)[:, :, begin : begin + length]
    found, first = weights_at(asked, keys, bandwidth, reach, slice(begin, begin + length))
    end = first + found.shape[-1]
    assert relative_error(found, whole[..., first:end]) < 1e-9
    assert not whole[..., :first].any() and not whole[..., end:].any()
    if window is not None and delay is not None:
        assert found.shape[-1] <= max(1, window + length)  # and not all that is stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_weights_at_reads_narrow_keys_as_weights_does(dtype):
    keys, bandwidth, _ = inputs(9, 3)
    narrow = Narrow.of(keys, dtype)
    found, first = weights_at(keys[:, :, 3:], narrow, bandwidth, Reach(1, window=4), slice(2, 5))
    whole = weights(keys[:, :, 3:], narrow, bandwidth, Reach(1, window=4))[:, :, 2:5]
    assert relative_error(found, whole[..., first : first + found.shape[-1]]) < 1e-9
