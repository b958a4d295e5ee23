"""Held-out loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from mosaics.data import PackedDataset
from mosaics.training import train, validation
from mosaics.training.checkpoint import checkpoint_folder
from mosaics.training.setup import build_config, build_model
from mosaics.training.validation import evaluate, write_samples

from .test_run_folder import _cut, _losses


@pytest.fixture
def model(tiny):
    torch.manual_seed(2)
    recipe = tiny()
    return build_model(build_config(recipe)).train()


def test_evaluate_equals_every_document_scored_alone(model, prepared):
    data = PackedDataset(prepared, "validation", 48)
    found = evaluate(model, data, batch_size=3)
    tokenizer = data.prepared.tokenizer()
    nats = ends = 0.0
    tokens = end_count = text_bytes = 0
    model.eval()
    with torch.no_grad():
        for batch in data.batches(1):
            ids, documents = batch["input_ids"][0], batch["document_ids"][0]
            mask = batch["attention_mask"]
            used = documents if mask is None else documents[mask[0] == 1]
            for document in used.unique():
                piece = ids[documents == document]
                logits = model(piece[None], use_cache=False).logits[0]
                lost = F.cross_entropy(logits[:-1].double(), piece[1:], reduction="none")
                is_end = piece[1:] == tokenizer.eos_token_id
                nats, ends = nats + float(lost[~is_end].sum()), ends + float(lost[is_end].sum())
                tokens, end_count = tokens + int((~is_end).sum()), end_count + int(is_end.sum())
                names = tokenizer.convert_ids_to_tokens(piece[1:][~is_end].tolist())
                text_bytes += sum(map(len, names))  # byte-level: a character of a token's name is a byte
    assert found["validation_tokens"] == tokens and found["validation_bytes"] == text_bytes
    assert found["validation_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert found["validation_end_of_text_nats"] == pytest.approx(ends / end_count, rel=1e-5)


def test_evaluate_does_not_depend_on_the_batch_and_keeps_the_mode(model, prepared):
    data = PackedDataset(prepared, "validation", 48)
    one, many = (evaluate(model, data, sequences=5, batch_size=size) for size in (1, 4))
    assert model.training
    assert one["validation_tokens"] == many["validation_tokens"]
    assert one["validation_bits_per_byte"] == pytest.approx(many["validation_bits_per_byte"], rel=1e-5)
    assert one["validation_tokens"] < evaluate(model, data)["validation_tokens"]


def test_evaluate_uses_the_evaluation_delay_and_no_dropout(model, prepared):
    data = PackedDataset(prepared, "validation", 48)
    assert evaluate(model, data, sequences=4) == evaluate(model, data, sequences=4)


@pytest.mark.slow
def test_write_samples_goes_on_from_held_out_text_and_draws_nothing_of_the_training(model, prepared, monkeypatch):
    monkeypatch.setattr(validation, "WRITTEN", 12)
    data = PackedDataset(prepared, "validation", 48)
    tokenizer = data.prepared.tokenizer()
    options = {"seed": 0, "step": 3}
    first, again, other = (write_samples(model, data, tokenizer, 2, **options | more) for more in ({}, {}, {"step": 4}))
    assert model.training and first == again != other and len(first) == 2
    for number, text in enumerate(first):
        beginning = tokenizer.decode(data.batch(number, 1)["input_ids"][0, :8], skip_special_tokens=True)
        assert text.startswith(beginning) and len(text) > len(beginning)


@pytest.mark.slow
def test_train_with_samples_is_the_same_training_and_keeps_them(finished, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validation, "WRITTEN", 12)
    run = tmp_path / "run"
    assert train(tiny({"validation.samples": 2}), run).finished
    printed = capsys.readouterr().out
    lines = _losses(run)
    written = [line.pop("samples") for line in lines if "validation_bits_per_byte" in line]
    assert lines == _losses(finished) and [len(samples) for samples in written] == [2, 2, 2]
    assert all(f"  | {line}\n" in printed for samples in written for text in samples for line in text.splitlines())
    weights = ("model.safetensors", "optimizer.safetensors")
    ours, theirs = (checkpoint_folder(folder / "checkpoints", 6) for folder in (run, finished))
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in weights)
    _cut(run, 2)
    assert train(tiny({"validation.samples": 2}), run).finished
    again = [line["samples"] for line in _losses(run) if "samples" in line]
    assert again == written
