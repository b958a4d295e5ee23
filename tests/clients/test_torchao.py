"""torchao's weight-only quantisation of an exported mosaic, as of a Llama."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import mosaics  # noqa: F401

pytestmark = pytest.mark.clients
pytest.importorskip("torchao")
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup  # noqa: E402

# torchao's Int4WeightOnlyConfig has no form for processors; this one has.
CONFIGS = {"int8": Int8WeightOnlyConfig(), "int4": IntxWeightOnlyConfig(torch.int4, PerGroup(16))}


@pytest.mark.parametrize("bits", CONFIGS)
@torch.no_grad()
def test_quantised_model_equals_one_of_the_rounded_weights(folder, bits):
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(CONFIGS[bits])).eval()
    rounded, changed = copy.deepcopy(plain), 0
    weights = dict(model.named_parameters())
    for name, weight in rounded.named_parameters():
        if type(weights[name].data) is not torch.Tensor:
            weight.copy_(weights[name].dequantize())
            changed += 1
    linear = [m for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert changed == len(linear)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("import os\n\n\ndef path(name):\n", return_tensors="pt").input_ids
    found, expected, before = (m(ids, use_cache=False).logits for m in (model, rounded, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, before, rtol=1e-3, atol=1e-3)
    options = dict(max_new_tokens=8, do_sample=False)
    assert model.generate(ids, **options).equal(rounded.generate(ids, **options))
