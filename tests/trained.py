"""transformers' `Trainer` on an exported mosaic."""

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import mosaics  # noqa: F401


def trained(exported, rows: list[dict], folder, **arguments) -> Trainer:
    """Train a few steps on rows of token ids."""
    # Trainer counts every label but the first of a row as a target: with padding on the left, the first token too.
    tokenizer = AutoTokenizer.from_pretrained(exported, padding_side="right")
    settings = dict(max_steps=4, learning_rate=0.01, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(exported),
        TrainingArguments(str(folder), **{**settings, "save_strategy": "no", **arguments}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    """Of every step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
