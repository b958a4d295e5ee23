"""The Triton form without a GPU: under Triton's interpreter, in a process of its own, and as far as machine code."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import gradients, relative_error
from mosaics.ops import leaky_average as op
from mosaics.ops.leaky_average import LeakyAverageState, leaky_average

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not op.triton.HAS_TRITON, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_leaky_average_triton_under_the_interpreter")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the run under the interpreter")
@pytest.mark.slow
def test_leaky_average_triton_under_the_interpreter():
    """All that test_leaky_average.py asks of any form, but for lengths at which the interpreter takes minutes."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", "(triton or any_) and not 1000 and not 1100"]
    command += [str(folder / "test_leaky_average.py"), str(folder / "test_leaky_average_triton.py")]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    run = subprocess.run(command, env=env, cwd=folder.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert int(run.stdout.splitlines()[-1].split(" passed")[0].split()[-1]) > 40


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled here")
@pytest.mark.parametrize("capability, dtype", [(80, "bf16"), (90, "bf16"), (90, "fp32")])
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_leaky_average_triton_compiles_for_gpus(kernel, capability, dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from mosaics.ops.leaky_average import triton_form

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_form, kernel)
    constants = dict(FLOOR=1e-18, SIZE=triton_form.CHUNK, WIDTH=64)
    sizes = {"heads", "time", "width", "stride_row", "stride_head", "stride_time"}
    rounded = {"inputs", "keys", "grad_keys", "grad_inputs"}
    signature = {
        name: "constexpr"
        if name in constants
        else "i32"
        if name in sizes
        else f"*{dtype if name in rounded else 'fp32'}"
        for name in inspect.signature(kernel.fn).parameters
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=triton_form.LAUNCH)
    assert built.asm["cubin"] and built.metadata.shared < 99 * 1024  # what the smallest of these GPUs has


@interpreted
@pytest.mark.parametrize("rounded", [True, False])
def test_leaky_average_triton_is_a_proper_operator(rounded):
    from mosaics.ops.leaky_average import triton_form

    tensors = torch.randn(2, 2, 40, 5), torch.randn(2, 2, 40), -torch.rand(2, 2, 40), torch.zeros(2, 2, 5)
    tensors = [x.requires_grad_() for x in (*tensors, torch.full((2, 2), -torch.inf))]
    torch.library.opcheck(triton_form._averages, (*tensors, rounded))


@interpreted
def test_leaky_average_triton_does_not_break_a_compiled_graph():
    tensors = [x.requires_grad_() for x in (torch.randn(1, 2, 40, 5), torch.randn(1, 2, 40), -torch.rand(1, 2, 40))]
    plain = lambda *x: leaky_average(*x, form="triton")[0]  # noqa: E731
    expected, found = plain(*tensors), torch.compile(plain, backend="aot_eager", fullgraph=True)(*tensors)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients(found, tensors), gradients(expected, tensors)))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on a processor")
@pytest.mark.parametrize("installed", [False, pytest.param(True, marks=needs_triton)])
def test_leaky_average_triton_says_what_it_needs(installed, monkeypatch):
    monkeypatch.setattr(op.triton, "HAS_TRITON", installed)
    with pytest.raises(ValueError, match="runs on CUDA, not on cpu" if installed else "is not installed"):
        leaky_average(torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), form="triton")


def test_leaky_average_takes_triton_on_cuda_alone(monkeypatch):
    asked = lambda *shape, cuda=True, dtype=torch.bfloat16: op._fastest(  # noqa: E731
        SimpleNamespace(shape=shape, is_cuda=cuda, dtype=dtype)
    )
    monkeypatch.setattr(op.compiled, "pays", lambda _: False)
    monkeypatch.setattr(op.triton, "HAS_TRITON", True)
    monkeypatch.setattr(op, "has_numbers", lambda _: True)
    assert asked(2, 3, 40, 64) == "triton"
    assert asked(2, 3, 40, 64, cuda=False) == asked(2, 3, 40, 256) == "chunked"
    assert asked(2, 3, 40, 64, dtype=torch.float64) == "chunked" and asked(2, 3, 1, 64) == "naive"
    monkeypatch.setattr(op.triton, "HAS_TRITON", False)
    assert asked(2, 3, 40, 64) == "chunked"


@needs_triton
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype, bounds", [(torch.float32, (1e-5, 1e-5)), (torch.bfloat16, (5e-3, 2e-2))])
@pytest.mark.parametrize("width", [5, 64, 128])
def test_leaky_average_triton_equals_naive_on_cuda(dtype, bounds, width):
    x, gate, decay = (
        torch.randn(2, 300, 3, width).transpose(1, 2),
        3 * torch.randn(2, 300, 3).mT,
        -torch.rand(2, 3, 300),
    )
    decay = decay.masked_fill(torch.rand(2, 1, 300) < 0.02, -torch.inf)
    low = [t.cuda().to(dtype).requires_grad_() for t in (x, gate, decay)]
    high = [t.detach().double().requires_grad_() for t in low]
    state = LeakyAverageState(
        torch.nn.functional.normalize(torch.randn(2, 3, width).cuda(), dim=-1), torch.zeros(2, 3).cuda()
    )
    value = leaky_average(*low, state, form="triton")[0]
    expected = leaky_average(*high, LeakyAverageState(*(s.double() for s in state)), form="naive")[0]
    assert value.dtype == dtype and relative_error(value, expected) < bounds[0]
    weight = torch.randn_like(value)
    found = torch.autograd.grad(value, low, weight)
    for g, e in zip(found, torch.autograd.grad(expected, high, weight.double()), strict=True):
        assert relative_error(g, e) < bounds[1]
