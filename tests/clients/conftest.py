"""The exported mosaic of the other integrations, and a Llama of its size beside it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from integrations.conftest import exported, texts  # noqa: F401


@pytest.fixture(scope="session")
def llama(exported, tmp_path_factory) -> Path:  # noqa: F811
    """The folder of a Llama with the same tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["mosaic", "llama"])
def folder(request) -> Path:
    """The folder of a model of each family."""
    return request.getfixturevalue("exported" if request.param == "mosaic" else "llama")
