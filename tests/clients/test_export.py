"""Exported graphs in runtimes without Python: AOTInductor and ONNX."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import mosaics  # noqa: F401
from mosaics.ops.kernel_regression import compiled

pytestmark = pytest.mark.clients
LENGTHS = (2, 20, 61, 130)


class Logits(torch.nn.Module):
    """A model as a function of tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model.requires_grad_(False)

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.fixture
def model(exported):
    return Logits(AutoModelForCausalLM.from_pretrained(exported).eval())


def given(length):
    return torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(length))


TIME = ({1: torch.export.Dim("time", min=2, max=4096)},)


@pytest.mark.skipif(not compiled.available(), reason="no C++ compiler")
def test_aotinductor_equals_the_model_at_any_length(model, tmp_path):
    program = torch.export.export(model.double(), (given(20),), dynamic_shapes=TIME)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for length in LENGTHS:
        torch.testing.assert_close(run(given(length)), model(given(length)), rtol=1e-9, atol=1e-9)


def test_onnx_runtime_equals_the_model_at_any_length(model, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(model, (given(20),), tmp_path / "model.onnx", dynamic_shapes=TIME, dynamo=True)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (ids,) = session.get_inputs()
    for length in LENGTHS:
        (found,) = session.run(None, {ids.name: given(length).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(given(length)), rtol=1e-4, atol=1e-4)
