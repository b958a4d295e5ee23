"""TRL's trainers on an exported mosaic, as on a Llama."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import mosaics  # noqa: F401

pytestmark = pytest.mark.clients
trl = pytest.importorskip("trl")

SETTINGS = dict(max_steps=4, learning_rate=0.01, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
SETTINGS |= dict(save_strategy="no", bf16=False, seed=0)


@pytest.fixture
def documents(texts) -> Dataset:
    """Texts of various lengths."""
    return Dataset.from_dict({"text": [text[: 40 + 15 * i] for i, text in enumerate(texts[:8])]})


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def sft(model, tokenizer, data, output, **arguments):
    settings = trl.SFTConfig(str(output), **SETTINGS | dict(max_length=128) | arguments)
    return trl.SFTTrainer(model=model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def test_sft_by_path_equals_sft_of_a_model(folder, documents, tmp_path):
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for model in (str(folder), AutoModelForCausalLM.from_pretrained(folder)):
        trainer = sft(model, tokenizer, documents, tmp_path, per_device_train_batch_size=4)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == 4 and found[0][-1] < found[0][0]


@torch.no_grad()
def test_sft_packed_equals_each_document_alone(exported, documents, tmp_path):
    """A Llama without flash attention reads across the borders of documents here; a mosaic does not."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    trainer = sft(str(exported), tokenizer, documents, tmp_path, packing=True, per_device_eval_batch_size=8)
    rows = trainer.eval_dataset["seq_lengths"]
    assert max(len(row) for row in rows) > 1 and len(rows) < len(documents)
    found = trainer.evaluate()["eval_loss"]
    model, nats, targets = AutoModelForCausalLM.from_pretrained(exported).eval(), 0.0, 0
    for text in documents["text"]:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id][:128]])
        count = ids.shape[1] - 1
        nats, targets = nats + model(ids, labels=ids).loss.item() * count, targets + count
    assert found == pytest.approx(nats / targets, rel=1e-4)
    joined = torch.tensor([[token for text in documents["text"] for token in tokenizer(text).input_ids]])
    assert model(joined, labels=joined).loss.item() != pytest.approx(nats / targets, rel=1e-3)


def test_sft_packed_trains(folder, documents, tmp_path):
    trainer = sft(str(folder), AutoTokenizer.from_pretrained(folder), documents, tmp_path, packing=True)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_dpo_by_path_begins_at_indifference_and_learns_to_prefer(folder, texts, tmp_path):
    pairs = {"prompt": ["def ", "import "] * 2, "chosen": texts[:4], "rejected": texts[4:8]}
    settings = trl.DPOConfig(str(tmp_path), **SETTINGS | dict(max_length=64, per_device_train_batch_size=4))
    trainer = trl.DPOTrainer(
        model=str(folder),
        args=settings,
        train_dataset=Dataset.from_dict(pairs),
        eval_dataset=Dataset.from_dict(pairs),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.6 and after["eval_rewards/accuracies"] == 1
