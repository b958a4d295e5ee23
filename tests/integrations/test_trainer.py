"""transformers' `Trainer` on an exported mosaic."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


@pytest.fixture
def train(exported, texts, tmp_path):
    """Trains three steps on the same four examples; gives the trainer."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    rows = [{"input_ids": tokenizer(text, truncation=True, max_length=32).input_ids} for text in texts]
    rows = [row for row in rows if len(row["input_ids"]) == 32][:4]

    def run(name: str = "run", **arguments) -> Trainer:
        # A range of one delay: a pass in training draws, and these runs have different numbers of passes.
        model = AutoModelForCausalLM.from_pretrained(exported, train_delay=[4, 4])
        settings = dict(max_steps=3, learning_rate=0.01, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Trainer(
            model,
            TrainingArguments(str(tmp_path / name), **{**settings, "save_strategy": "no", **arguments}),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer

    return run


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_trains_evaluates_and_saves(train, exported, tmp_path):
    trainer = train(per_device_train_batch_size=4, save_strategy="steps", save_steps=3)
    found = losses(trainer)
    assert len(found) == 3 and found[-1] < found[0]
    before = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert not [name for name, value in trainer.model.state_dict().items() if torch.equal(value, before[name])]
    assert trainer.evaluate()["eval_loss"] < found[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3").eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits)


def test_trainer_accumulated_gradients_equal_the_whole_batch(train):
    whole = train("whole", per_device_train_batch_size=4)
    cut = train("cut", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)


def test_trainer_gradient_checkpointing_changes_nothing(train):
    plain = train("plain", per_device_train_batch_size=4)
    saving = train("saving", per_device_train_batch_size=4, gradient_checkpointing=True)
    assert saving.model.is_gradient_checkpointing
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)
