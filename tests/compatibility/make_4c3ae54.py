"""Wrote tests/compatibility/4c3ae54: what users of that commit have, small. Run with that commit's package."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.data import open_corpus, prepare
from mosaics.models.kept import read_context, save_memory  # its name then
from mosaics.models.loading import load_exported
from mosaics.training import make_recipe, train

OUT = Path("4c3ae54")
shutil.rmtree(OUT, ignore_errors=True)
OUT.mkdir()
places, things, values = ("door", "river", "house", "road"), ("colour", "size", "name"), ("red", "old", "new", "far")
corpus = Path("corpus")
shutil.rmtree(corpus, ignore_errors=True)
corpus.mkdir()
for number in range(6):
    lines = [
        f"The {t} of the {p} is {values[(i + j + number) % 4]}."
        for i, t in enumerate(things)
        for j, p in enumerate(places)
    ]
    (corpus / f"{number}.txt").write_text("\n".join(lines * 2) + "\n")
prepare(open_corpus("corpus"), OUT / "prepared", vocab_size=270, validation=0.3)
recipe = make_recipe(
    {
        "model": {
            "preset": "memory-mosaics-v2-tiny",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "window": 8,
            "delay": 4,
            "train_delay": [4, 8],
            "dropout": 0.1,
        },
        "data": {"prepared": str(OUT / "prepared"), "vocabulary_size": 270, "validation": 0.3},
        "training": {
            "steps": 4,
            "context_length": 32,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 0.01,
            "warmup_steps": 1,
            "precision": "float32",
            "device": "cpu",
        },
        "validation": {"every": 2, "sequences": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "logging": {"every": 1},
    }
)
train(recipe, OUT / "run")
shutil.move(OUT / "run" / "export", OUT / "export")
shutil.copy(OUT / "run" / "metrics.jsonl", OUT / "metrics-of-the-whole-run.jsonl")
shutil.rmtree(next((OUT / "run" / "checkpoints").glob("step-*4")))
(OUT / "run" / "curves.png").unlink()
model, tokenizer = load_exported(OUT / "export")
ids = torch.randint(270, (2, 40), generator=torch.Generator().manual_seed(1))
found = {"input_ids": ids}
with torch.no_grad():
    found["export"] = model(ids).logits[:, -3:].clone()
    context = ids[:1, :30]
    save_memory(OUT / "context.memory", model, read_context(model, context), context)
    found["after the context"] = model(ids[:1]).logits[:, -3:].clone()
    for preset in (
        "memory-mosaics-v1-tiny",
        "memory-mosaics-v1-nano",
        "transformer-tiny",
        "transformer-long-short-tiny",
    ):
        torch.manual_seed(0)
        sizes = dict(vocab_size=270, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        sizes |= {"num_pairs": 6} if "v1" in preset else {"intermediate_size": 8}
        if "long-short" in preset:  # both halves have both, as every setting then had
            sizes |= {"window": 9, "delay": 2, "train_delay": [2, 5]}
        other = MosaicForCausalLM(MosaicConfig.from_preset(preset, **sizes)).eval()
        other.save_pretrained(OUT / preset)
        found[preset] = other(ids).logits[:, -3:].clone()
save_file(found, OUT / "logits.safetensors")
