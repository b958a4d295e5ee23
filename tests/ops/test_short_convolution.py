"""The short convolution is PyTorch's, cut anywhere and within documents."""

import pytest
import torch
import torch.nn.functional as F

from mosaics.ops.short_convolution import short_convolution


def inputs(time=20, width=3, size=4):
    return [torch.randn(shape, dtype=torch.float64) for shape in ((2, time, width), (width, size), (width,))]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_is_that_of_torch(size):
    x, weight, bias = inputs(size=size)
    expected = F.conv1d(F.pad(x.mT, (size - 1, 0)), weight[:, None], bias, groups=3).mT
    assert torch.allclose(short_convolution(x, weight, bias), expected, atol=1e-12)


def test_may_be_cut_anywhere_and_keeps_documents_apart():
    x, weight, bias = inputs()
    whole = short_convolution(x, weight, bias)
    parts = [
        short_convolution(x[:, :2], weight, bias),
        short_convolution(x[:, 2:], weight, bias, F.pad(x[:, :2], (0, 0, 1, 0))),
    ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)
    start = torch.where(torch.arange(20) < 7, -3, 7).expand(2, 20)
    found = short_convolution(x, weight, bias, start=start)
    assert torch.allclose(found[:, 7:], short_convolution(x[:, 7:], weight, bias), atol=1e-12)
    assert torch.allclose(found[:, :7], whole[:, :7], atol=1e-12)


def test_refuses_what_it_cannot_compute():
    x, weight, bias = inputs()
    for given in ((x, weight[:2]), (x, weight, bias[:1]), (x, weight, bias, x[:, :2]), (x[0], weight)):
        with pytest.raises(ValueError, match="short_convolution got"):
            short_convolution(*given)
