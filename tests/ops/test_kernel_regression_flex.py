"""What is special about the form for CUDA, as far as a processor can tell; test_kernel_regression.py has the rest."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from helpers import relative_error
from mosaics.ops import kernel_regression as op
from mosaics.ops.kernel_regression import Bandwidth, Reach, flex, kernel_regression


def documents(batch, time, share=0.01):
    border = (torch.rand(batch, time) < share).index_fill(1, torch.tensor([0]), True)
    return torch.where(border, torch.arange(time), 0).cummax(1).values


def bandwidth(heads=2, device="cpu"):
    return Bandwidth(*(torch.full((heads,), x, device=device, requires_grad=True) for x in (4.5, 4.5, 0.35)))


@pytest.mark.parametrize("share", [None, 0.01, 0.2])
@pytest.mark.parametrize("stored", [0, 200])
@pytest.mark.parametrize("delay, window", [(1, None), (64, None), (1, 256), (1, 2), (3, 300), (0, None), (None, None)])
@pytest.mark.parametrize("time", [40, 700])
def test_flex_blocks_are_those_of_the_mask(time, delay, window, stored, share):
    start = None if share is None or delay is None else documents(3, time, share)
    span = Reach(delay, window, start).span(*(torch.empty(3, 1, slots, 1) for slots in (time, stored + time)))
    mask = flex._block_mask(*span, 3, stored + time)
    expected = flex_attention.create_block_mask(mask.mask_mod, 3, 1, time, stored + time, device="cpu")
    assert mask.seq_lengths == expected.seq_lengths
    for kind, columns in (("full_kv", stored + time), ("full_q", time), ("kv", stored + time), ("q", time)):
        lists = ((getattr(m, f"{kind}_num_blocks"), getattr(m, f"{kind}_indices")) for m in (mask, expected))
        found, wanted = (flex_attention._ordered_to_dense(*x, -(-columns // flex.BLOCK)) for x in lists)
        # Between two documents there may be a block that none of the queries reads; it is masked.
        assert (found >= wanted).all() if start is not None and "full" not in kind else (found == wanted).all()


@torch.no_grad()
def test_flex_is_compiled_once_for_all_delays_windows_and_documents(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(flex, "flex_attention", torch.compile(flex.flex_attention, backend=counter))
    keys = F.normalize(torch.randn(2, 2, 300, 16), dim=-1)
    for seed, (delay, window) in enumerate([(1, None), (1, 64), (7, None), (64, 200), (70, None), (3, 5)]):
        torch.manual_seed(seed)
        start = documents(2, 300)
        found, expected = (
            kernel_regression(keys, keys, keys, bandwidth(), Reach(delay, window, start), form=form)
            for form in ("flex", "naive")
        )
        assert relative_error(found, expected) < 1e-5
    assert counter.frame_count == 1


@torch.no_grad()
def test_flex_does_not_break_a_compiled_graph():
    keys, start, sharp = F.normalize(torch.randn(2, 2, 300, 16), dim=-1), documents(2, 300), bandwidth()

    def plain(delay):
        return kernel_regression(keys, keys, keys, sharp, Reach(delay, 70, start), form="flex")

    expected = [plain(delay) for delay in range(2, 7)]
    counter = CompileCounter()
    whole = torch.compile(plain, backend=counter, fullgraph=True)
    assert all(map(torch.equal, map(whole, range(2, 7)), expected))
    assert counter.frame_count == 2  # for one delay, and for any


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_flex_compiled_for_a_processor_equals_naive(monkeypatch):
    monkeypatch.setattr(flex, "flex_attention", flex._compiled())  # which reads by the lists of blocks
    keys = F.normalize(torch.randn(2, 2, 300, 16), dim=-1)
    for delay, window, share in [(3, 70, 0.01), (9, None, 0.01), (140, None, 0.002), (1, 64, None), (300, None, None)]:
        start = None if share is None else documents(2, 300, share)
        reach = Reach(delay, window, start)
        found, expected = (
            kernel_regression(keys, keys, keys, bandwidth(), reach, form=form) for form in ("flex", "naive")
        )
        assert relative_error(found, expected) < 1e-5
        assert (found[:, :, :delay] == 0).all()


@pytest.mark.parametrize("share", [None, 0.01])
def test_flex_does_not_wait_for_the_device(share, monkeypatch):
    start = None if share is None else documents(2, 300)
    monkeypatch.setattr(flex, "flex_attention", lambda queries, *_, **__: queries)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # whose tensors have no numbers to wait for
        start = None if start is None else mode.from_tensor(start)
        keys = torch.empty(2, 2, 300, 16)
        assert (
            kernel_regression(keys, keys, keys, bandwidth(), Reach(3, window=70, start=start), form="flex") is not None
        )
        with pytest.raises(DataDependentOutputException):
            keys.amax().item()


def test_flex_in_bfloat16_rounds_no_query():
    keys = F.normalize(torch.randn(1, 2, 1000, 64), dim=-1).bfloat16()
    values = torch.randn(1, 2, 1000, 64).bfloat16()
    wide = keys.float(), values.float()
    sharp = Bandwidth(torch.full((2,), 150.0))
    reach = Reach(8, start=documents(1, 1000, 0.002))
    expected = kernel_regression(wide[0], *wide, sharp, reach, form="naive")
    found, rounded = (kernel_regression(keys, keys, values, sharp, reach, form=f) for f in ("flex", "shifted"))
    assert relative_error(found, expected) < 3e-3 < relative_error(rounded, expected)


@torch.no_grad()
def test_flex_reads_values_of_another_dtype_than_the_keys():
    keys = F.normalize(torch.randn(1, 2, 100, 16), dim=-1)
    values = torch.randn(1, 2, 100, 16).bfloat16()
    found, expected = (
        kernel_regression(keys, keys, values, bandwidth(), Reach(2, window=40), form=f) for f in ("flex", "naive")
    )
    assert found.dtype == torch.bfloat16 and relative_error(found, expected) < 1e-3


def test_flex_refuses_dropout():
    keys = torch.randn(1, 2, 20, 16)
    with pytest.raises(ValueError, match="no dropout"):
        kernel_regression(keys, keys, keys, bandwidth(), Reach(1), dropout=0.1, form="flex")


def test_kernel_regression_takes_flex_on_cuda_for_windows_and_documents(monkeypatch):
    def asked(
        time=40, slots=40, width=64, cuda=True, dtype=torch.bfloat16, delay=1, window=None, start=None, dropout=0.0
    ):
        device = SimpleNamespace(type="cuda" if cuda else "cpu")
        shapes = ((2, 3, n, width) for n in (time, slots, slots))
        tensors = (SimpleNamespace(shape=s, is_cuda=cuda, device=device, dtype=dtype) for s in shapes)
        return op._fastest(*tensors, Reach(delay, window, start), dropout)

    start = torch.zeros(2, 40, dtype=torch.long)
    monkeypatch.setattr(flex, "HAS_TRITON", True)
    monkeypatch.setattr(op.compiled, "pays", lambda *_: False)
    monkeypatch.setattr(op, "has_numbers", lambda *_: True)
    assert asked(window=8) == asked(start=start) == asked(window=8, start=start) == "flex"
    assert asked() == asked(delay=None) == "shifted" and asked(time=1, window=8) == "naive"
    for without in (dict(slots=50), dict(width=8), dict(dtype=torch.float64), dict(dropout=0.1), dict(cuda=False)):
        assert asked(window=8, **without) == "blockwise"
    monkeypatch.setattr(flex, "HAS_TRITON", False)
    assert asked(window=8) == asked(start=start) == "blockwise"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("time, delay, window, cut", [(300, 5, None, True), (1000, 1, 256, False), (1024, 1, 64, True)])
def test_flex_equals_naive_on_cuda(time, delay, window, cut, dtype, bound):
    keys = F.normalize(torch.randn(2, 2, time, 64), dim=-1).cuda().to(dtype).requires_grad_()
    values = torch.randn(2, 2, time, 64).cuda().to(dtype).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (keys, values)]
    sharp = bandwidth(device="cuda")
    reach = Reach(delay, window, documents(2, time).cuda() if cut else None)
    found = kernel_regression(keys, keys, values, sharp, reach, form="flex")
    expected = kernel_regression(exact[0], *exact, sharp, reach, form="naive")
    assert relative_error(found, expected) < bound and (found[:, :, :delay] == 0).all()
    weight = torch.randn_like(found)
    found = torch.autograd.grad(found, (keys, values, *sharp), weight)
    for g, e in zip(found, torch.autograd.grad(expected, (*exact, *sharp), weight.double()), strict=True):
        assert relative_error(g, e) < 2 * bound
