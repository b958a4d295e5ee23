"""What users of earlier versions have: it loads and says the same, or is refused in one sentence with the version."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import relative_error
from mosaics.data import PackedDataset, open_corpus, prepare
from mosaics.models.loading import load_exported
from mosaics.models.memory_file import load_memory
from mosaics.training import train
from mosaics.training.metrics import read_metrics
from mosaics.training.run_folder import open_recipe

FOLDERS = [path.name for path in sorted(Path(__file__).parent.iterdir()) if (path / "logits.safetensors").is_file()]
MODELS = ["memory-mosaics-v1-tiny", "memory-mosaics-v1-nano", "transformer-tiny", "transformer-long-short-tiny"]


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path, monkeypatch) -> Path:
    """A copy of what was written, in the current folder."""
    shutil.copytree(Path(__file__).parent / request.param, tmp_path / request.param)
    monkeypatch.chdir(tmp_path)
    return Path(request.param)


def test_there_is_something_of_an_earlier_version():
    assert FOLDERS


@torch.no_grad()
@pytest.mark.parametrize("preset", MODELS)
def test_earlier_models_give_equal_logits(folder, preset):
    known = load_file(folder / "logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / preset)
    assert relative_error(model(known["input_ids"]).logits[:, -3:], known[preset]) < 1e-5
    again = folder / "again"
    model.save_pretrained(again)
    model = AutoModelForCausalLM.from_pretrained(again)
    assert relative_error(model(known["input_ids"]).logits[:, -3:], known[preset]) < 1e-5


@torch.no_grad()
def test_earlier_exports_give_equal_logits(folder):
    known = load_file(folder / "logits.safetensors")
    model, tokenizer = load_exported(folder / "export")
    assert relative_error(model(known["input_ids"]).logits[:, -3:], known["export"]) < 1e-5
    assert tokenizer.decode(tokenizer("The door").input_ids, skip_special_tokens=True) == "The door"


def test_earlier_runs_go_on_with_equal_losses(folder):
    before = [line for line in read_metrics(folder / "metrics-of-the-whole-run.jsonl")]
    outcome = train(open_recipe(folder / "run"), folder / "run", resume=True)
    assert outcome.finished
    after = read_metrics(folder / "run" / "metrics.jsonl")
    for key in ("loss", "draw", "validation_bits_per_byte"):
        expected = [(line["step"], line[key]) for line in before if key in line]
        found = [(line["step"], line[key]) for line in after if key in line]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-5)


def test_earlier_memories_are_taken_up_or_refused_with_their_version(folder):
    model, _ = load_exported(folder / "export")
    known = load_file(folder / "logits.safetensors")
    try:
        cache, context = load_memory(folder / "context.memory", model)
    except ValueError as error:
        assert "mosaics-memory-2 of another version" in str(error)
        return
    more = known["input_ids"][:1, context.shape[1] :]
    found = model(more, past_key_values=cache).logits[:, -3:]
    assert relative_error(found, known["after the context"]) < 1e-5


def test_earlier_corpora_are_read(folder):
    rows = PackedDataset(folder / "prepared", "train", 32).batch(0, 2)
    assert rows["input_ids"].shape == (2, 32)
    shutil.copytree(folder / "prepared", "again")
    texts = Path("corpus")
    texts.mkdir()
    (texts / "other.txt").write_text("other")
    with pytest.raises(ValueError, match="again"):  # it is known to be of another text
        prepare(open_corpus(str(texts)), "again", vocab_size=270, validation=0.3)
