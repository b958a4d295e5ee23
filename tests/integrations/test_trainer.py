"""transformers' `Trainer` on an exported mosaic."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import together
from trained import losses, trained

STEPS = 4


@pytest.fixture
def rows(exported, texts) -> list[dict]:
    """Four examples of equal length."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    found = [{"input_ids": tokenizer(text, truncation=True, max_length=32).input_ids} for text in texts]
    return [row for row in found if len(row["input_ids"]) == 32][:4]


@pytest.fixture
def train(exported, rows, tmp_path):
    """Trains four steps on the same four examples; gives the trainer."""
    return lambda name="run", **arguments: trained(exported, rows, tmp_path / name, **arguments)


def test_trainer_trains_evaluates_and_saves(train, exported, tmp_path):
    trainer = train(per_device_train_batch_size=4, save_strategy="steps", save_steps=STEPS)
    found = losses(trainer)
    assert len(found) == STEPS and found[-1] < found[0]
    before = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert not [name for name, value in trainer.model.state_dict().items() if torch.equal(value, before[name])]
    assert trainer.evaluate()["eval_loss"] < found[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{STEPS}").eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits)


def test_trainer_accumulated_gradients_equal_the_whole_batch(train):
    """The micro-batches of a step share the delay that is drawn for it."""
    whole = train("whole", per_device_train_batch_size=4)
    cut = train("cut", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
def test_trainer_of_two_processes_equals_one(train, exported, rows, tmp_path):
    """Processes share the delay, too; two of them, two rows each, in two micro-batches."""
    whole = train("whole", per_device_train_batch_size=4)
    arguments = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, ddp_backend="gloo")

    def start():
        AcceleratorState._reset_state(reset_partial_state=True)  # of one process, before the fork
        trainer = trained(exported, rows, tmp_path / "two", **arguments)
        assert trainer.args.world_size == 2
        if trainer.args.process_index == 0:
            (tmp_path / "losses").write_text(json.dumps(losses(trainer)))

    ended = together(2, start, tmp_path / "out")
    assert all(text.endswith("done\n") for text in ended), ended
    assert json.loads((tmp_path / "losses").read_text()) == pytest.approx(losses(whole), rel=1e-4)


def test_trainer_gradient_checkpointing_changes_nothing(train):
    plain = train("plain", per_device_train_batch_size=4)
    saving = train("saving", per_device_train_batch_size=4, gradient_checkpointing=True)
    assert saving.model.is_gradient_checkpointing
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)


@pytest.fixture
def uneven(exported, texts) -> list[dict]:
    """Rows of 60, 6, 60, 6 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = [tokenizer(text).input_ids for text in texts]
    long = [row for row in ids if len(row) >= 60]
    return [{"input_ids": long[i][:n]} for i, n in enumerate((60, 6, 60, 6))]


@pytest.mark.parametrize("family", ["mosaic", "llama"])
def test_trainer_weighs_tokens_alike_however_they_are_accumulated(family, exported, uneven, tmp_path):
    """Batches of 4, 2 and 1 with accumulation 1, 2 and 4: the same losses, as with a Llama."""
    source = exported
    if family == "llama":
        tokenizer = AutoTokenizer.from_pretrained(exported)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        source = tmp_path / "llama"
    found = [
        losses(
            trained(
                source,
                uneven,
                tmp_path / f"{size}",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
            )
        )
        for size in (4, 2, 1)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)
