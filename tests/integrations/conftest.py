"""A tiny model with a tokenizer, exported as transformers reads it."""

import sysconfig
from pathlib import Path

import pytest
import torch

from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.data import train_tokenizer

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
REACH = dict(window=8, delay=4, train_delay=[4, 12], max_position_embeddings=64)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real text: sources of a few modules of the standard library, in pieces of a few lines."""
    folder = Path(sysconfig.get_path("stdlib"))
    lines = [line for name in ("bisect", "heapq", "textwrap") for line in (folder / f"{name}.py").open()]
    return ["".join(lines[i : i + 12]) for i in range(0, len(lines), 12)]


@pytest.fixture(scope="session")
def exported(texts, tmp_path_factory) -> Path:
    """The folder of the exported model, with weights so large that every memory matters to the logits."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = train_tokenizer(texts, 320)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = MosaicConfig.from_preset("memory-mosaics-v2-tiny", vocab_size=len(tokenizer), **SIZES, **REACH, **ids)
    model = MosaicForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
