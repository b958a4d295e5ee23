import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import relative_error, tokens
from memory_mosaics_v1 import random_weights, twin
from mosaics.cli import main

from .conftest import OPTIONS

ATTENTION = "--model.preset transformer-tiny --model.window null --model.delay 0 --model.train_delay null".split()


@pytest.fixture()
def llama(tmp_path):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_convert_there_and_back_keeps_every_weight(llama, tmp_path, capsys):
    mosaic, back = tmp_path / "mosaic", tmp_path / "back"
    assert main(["convert", str(llama), "--to", "mosaic", "--output", str(mosaic)]) == 0
    assert main(["convert", str(mosaic), "--to", "llama", "--output", str(back)]) == 0
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (llama, mosaic, back)]
    ids = torch.arange(20)[None]
    first, second, third = (model(ids).logits for model in models)
    assert torch.equal(first, third) and (first - second).abs().max() < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "llama", "mosaic"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda words: [*words[:2], "--to", "llama", *words[4:]], "takes a mosaic"),
        (lambda words: [*words[:5], words[1]], "exists already"),
        (lambda words: [*words[:2], "--to", "gpt", *words[4:]], "is not one of"),
        (lambda words: [words[0], "no/such/folder/here", *words[2:]], "no/such/folder/here"),
    ],
)
def test_convert_refuses_wrong_input_in_one_sentence(llama, tmp_path, capsys, change, message):
    words = ["convert", str(llama), "--to", "mosaic", "--output", str(tmp_path / "out")]
    assert main(change(words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_convert_takes_a_run_at_any_time_and_keeps_its_tokenizer(tmp_path, capsys, small_run):
    pairs = zip(OPTIONS[::2], OPTIONS[1::2], strict=True)
    sizes = [word for pair in pairs if not pair[0].startswith("--data.") for word in pair]
    words = ["train", "quickstart", "--run", str(tmp_path / "run"), "--data.prepared", str(small_run / "data")]
    assert main([*words, *sizes, *ATTENTION, "--training.steps", "2"]) == 0
    shutil.rmtree(tmp_path / "run" / "export")
    assert main(["convert", str(tmp_path / "run"), "--to", "llama", "--output", str(tmp_path / "llama")]) == 0
    assert "without a tokenizer" not in capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(tmp_path / "llama")("import os", return_tensors="pt").input_ids
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (checkpoint, tmp_path / "llama"))
    assert (ours - theirs).abs().max() < 1e-5


def test_convert_makes_a_mosaic_of_the_authors_memory_mosaics_v1(tmp_path, capsys):
    weights, ids = random_weights("nano"), tokens(1, 7)
    save_file(weights, tmp_path / "v1.safetensors")
    words = ["convert", str(tmp_path / "v1.safetensors"), "--output", str(tmp_path / "out"), "--to"]
    assert main([*words, "llama"]) == 2 and "--to mosaic" in capsys.readouterr().err
    assert main([*words, "mosaic", "--key-clamp", "1.5"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert relative_error(model(ids).logits[0], twin(weights, ids[0], "nano", clamp=1.5)) < 1e-9
    (tmp_path / "v1.safetensors").rename(tmp_path / "ckpt.pt")
    words[1], words[3] = str(tmp_path / "ckpt.pt"), str(tmp_path / "other")
    assert main([*words, "mosaic"]) == 2
    assert "pickles are not loaded" in capsys.readouterr().err
