"""The C++ forms as operators of torch: what compilers and distribution ask of one."""

import multiprocessing
import os
import socket

import pytest
import torch
from test_kernel_regression import inputs as pairs
from torch.distributed.fsdp import fully_shard

from helpers import tiny_model, tokens
from mosaics.ops.kernel_regression import Narrow, Reach, single
from mosaics.ops.kernel_regression import compiled as read
from mosaics.ops.leaky_average import compiled as average
from mosaics.ops.unit_values import compiled as values

needs_compiler = pytest.mark.skipif(
    not all(form.available() for form in (read, single, average, values)), reason="no C++ compiler"
)


def wanted(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def averaged(time=5, dtype=torch.float64):
    """What the recurrence takes, with inputs of strides that are not plain."""
    inputs = wanted(2, time, 3, 4, dtype=dtype).transpose(1, 2)
    gate, decay = wanted(2, 3, time, dtype=dtype), (-torch.rand(2, 3, time, dtype=dtype)).requires_grad_()
    return inputs, gate, decay, wanted(2, 3, 4, dtype=dtype), wanted(2, 3, dtype=dtype)


def asked(documents):
    """What the read takes: queries, keys, values, beta, first, end, and whether the sums of weights are wanted."""
    keys, stored, bandwidth = pairs(6, 3)
    start = torch.tensor([[0] * 6, [-2] * 4 + [4] * 2]) if documents else None
    queries = keys[:, :, -6:]
    first, end = Reach(1, 5, start).span(queries, keys)
    beta = bandwidth.at(end - first).expand(queries.shape[:3])
    queries, beta = (x.detach().requires_grad_() for x in (queries, beta))
    return queries, keys, stored, beta, first, end, documents


def one(kind=torch.float32):
    keys, stored, bandwidth = (x.detach().float() if isinstance(x, torch.Tensor) else x for x in pairs(1, 20))
    bandwidth = [x.detach().float() for x in bandwidth]
    narrow = [Narrow.of(x, kind) for x in (keys, stored)]
    parts = [part for x in narrow for part in (x.data, x.scale)]
    start, stored = torch.tensor([[-3], [-20]]), torch.tensor([20, 7])
    return keys[:, :, -1:].clone(), *parts, *bandwidth, *Reach(2, 9, start, stored), kind == torch.int8


CALLS = {
    "unit_values": (values.OPERATOR, lambda: (wanted(2, 7, 3, 4).transpose(1, 2), wanted(3), wanted(3), 0.5)),
    "leaky_average": (average.OPERATOR, averaged),
    "kernel_regression": (read.OPERATOR, lambda: asked(False)),
    "kernel_regression of documents": (read.OPERATOR, lambda: asked(True)),
    "single": (single.OPERATOR, one),
    "single of 8 bits": (single.OPERATOR, lambda: one(torch.int8)),
    "single of fixed pairs": (single.OPERATOR, lambda: (*one()[:5], torch.ones(2), *[None] * 6, True)),
}


@needs_compiler
@pytest.mark.parametrize("call", CALLS)
def test_operator_passes_torchs_checks(call):
    operator, given = CALLS[call]
    torch.manual_seed(0)
    torch.library.opcheck(operator, given())


@needs_compiler
@pytest.mark.parametrize("call", [call for call in CALLS if "single" not in call])
def test_backward_operator_passes_torchs_checks(call, monkeypatch):
    operator, given = CALLS[call]
    module, seen = {values.OPERATOR: values, average.OPERATOR: average, read.OPERATOR: read}[operator], []
    real = module.BACKWARD
    monkeypatch.setattr(module, "BACKWARD", lambda *args: seen.append(args) or real(*args))
    out = operator(*given())
    sum(x.sum() for x in out if x.requires_grad).backward()
    assert len(seen) == 1
    torch.library.opcheck(real, [x.detach() if isinstance(x, torch.Tensor) else x for x in seen[0]])


@needs_compiler
def test_decoding_goes_past_the_operators_and_all_else_through_them(monkeypatch):
    """A Python operator costs more than the read of a short context."""
    model, called = tiny_model(), []
    for module in (values, average, single, read):
        real = module.OPERATOR
        monkeypatch.setattr(module, "OPERATOR", lambda *given, m=module, real=real: called.append(m) or real(*given))
    with torch.no_grad():
        cache = model(tokens(2, 9)).past_key_values
        assert set(called) == {values, average, read}
        called.clear()
        for _ in range(3):
            model(tokens(2, 1), past_key_values=cache)
    assert called == []
    model(tokens(2, 2), use_cache=False)  # gradients are wanted
    assert set(called) == {values, average, read}


@needs_compiler
@pytest.mark.slow
def test_compiled_model_is_one_graph_at_any_length():
    """Neither a form in C++ nor another length breaks or remakes the graph."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (40, 33, 90):
            ids = tokens(2, length)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_compiler
@pytest.mark.slow
def test_compiled_training_equals_uncompiled_for_any_draw():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(num_hidden_layers=1).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length, draw in ((40, 0.0), (33, 0.9)):
        ids, found = tokens(2, length), []
        for each in (model, compiled):
            model.zero_grad()
            loss = each(ids, labels=ids, draw=draw).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def _sharded(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = tiny_model().train()
    for block in model.model.stack.blocks:
        fully_shard(block)
    fully_shard(model)
    losses, gradients = [], {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        ids = tokens(2, 50, seed=step)[rank : rank + 1]
        loss = model(ids, labels=ids, draw=0.3).loss
        loss.backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.save((losses, gradients), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_gloo_available()), reason="needs fork and a torch with gloo"
)
def test_sharded_training_of_two_processes_equals_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_sharded, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = tiny_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        ids = tokens(2, 50, seed=step)
        loss = model(ids, labels=ids, draw=0.3).loss
        loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        assert sum(losses[step] for losses, _ in found) / 2 == pytest.approx(loss.item(), rel=1e-9)
    for _, gradients in found:
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)
