"""`torch.compile` of a mosaic's forward pass, as of a Llama's."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import mosaics  # noqa: F401

pytestmark = pytest.mark.clients
LENGTHS = (9, 17, 33, 40, 64, 65, 90, 100, 127, 150)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_forward_of_varying_lengths_stays_below_the_limit_of_recompilations(folder, training):
    torch.compiler.reset()
    model = AutoModelForCausalLM.from_pretrained(folder).train(training)
    compiled = torch.compile(model, backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.set_grad_enabled(training):
        for length in LENGTHS:
            ids = torch.randint(3, 300, (2, length))
            loss = compiled(ids, labels=ids, use_cache=False).loss
            torch.testing.assert_close(loss, model(ids, labels=ids, use_cache=False).loss)
            if training:
                loss.backward()
                assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
