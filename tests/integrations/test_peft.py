"""PEFT's LoRA on an exported mosaic: its linear maps are plain named `nn.Linear` modules."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ["key_proj", "value_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def batch(exported, texts):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    return tokenizer(texts[:4], return_tensors="pt", padding=True, truncation=True, max_length=48)


def base(exported):
    return AutoModelForCausalLM.from_pretrained(exported)


def trained(exported, batch, targets):
    """A model with adapters after a few steps, and how its loss fell."""
    model = get_peft_model(base(exported), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch, labels=batch["input_ids"], draw=0.5).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch, use_cache=False).logits


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=["named", "all-linear"])
def test_lora_step_changes_the_adapters_alone(exported, batch, targets):
    before = base(exported).state_dict()
    model, losses = trained(exported, batch, targets)
    assert losses[-1] < losses[0]
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    for memory in ("short_term", "long_term", "feed_forward"):
        assert any(f".{memory}." in name for name in adapters)
    assert not torch.allclose(logits(model, batch), logits(base(exported), batch))


def test_lora_saved_loaded_and_merged_give_the_same_logits(exported, batch, tmp_path):
    model, _ = trained(exported, batch, TARGETS)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(exported), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base(exported))
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(base(tmp_path / "merged"), batch), logits(merged, batch))


def test_lora_generates_with_the_cache(exported, batch):
    model, _ = trained(exported, batch, TARGETS)
    options = dict(max_new_tokens=6, do_sample=False)
    cached = model.eval().generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
