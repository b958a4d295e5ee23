"""The exported model."""

import errno
import json
import re
import shutil

import pytest
import torch
import transformers
import yaml

from mosaics.training.checkpoint import checkpoint_folder
from mosaics.training.export import export_run


def test_export_run_reloads_with_the_logits_of_the_checkpoint(run):
    exported = transformers.AutoModelForCausalLM.from_pretrained(run / "export").eval()
    trained = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_folder(run / "checkpoints", 6)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert ids[0, 0] == exported.config.bos_token_id
    assert exported.config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(exported(ids).logits, trained(ids).logits)
    assert exported.config.max_position_embeddings == 48


def test_export_run_model_card_says_what_it_is(run):
    text = (run / "export" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and front["license"] == "unknown"
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"{last['validation_bits_per_byte']:.4f} bits per byte" in text
    assert "{" not in re.sub(r"```.*?```", "", text, flags=re.S)


def test_export_run_model_card_snippet_runs(run, capsys):
    text = (run / "export" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("PATH_OF_THIS_FOLDER", str(run / "export"))
    exec(code, {})
    assert capsys.readouterr().out.startswith("<|begin_of_text|>")


def test_export_run_takes_a_step(run, tmp_path):
    early = transformers.AutoModelForCausalLM.from_pretrained(export_run(run, tmp_path / "early", step=2))
    late = transformers.AutoModelForCausalLM.from_pretrained(run / "export")
    assert not torch.equal(early.lm_head.weight, late.lm_head.weight)
    assert "Not validated" not in (run / "export" / "README.md").read_text()


def test_export_run_refuses_and_leaves_nothing(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="export exists already"):
        export_run(run, run / "export")
    with pytest.raises(ValueError, match="no checkpoint of step 3; it has 2, 4, 6"):
        export_run(run, tmp_path / "out", step=3)
    with pytest.raises(ValueError, match="no run folder"):
        export_run(tmp_path, tmp_path / "out")
    (checkpoint_folder(run / "checkpoints", 4) / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="model.safetensors has 7 bytes"):
        export_run(run, tmp_path / "out", step=4)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_run_falls_back_to_the_checkpoint_before_a_damaged_one(run, tmp_path):
    (checkpoint_folder(run / "checkpoints", 6) / "state.json").unlink()
    shutil.rmtree(run / "export")
    export_run(run, tmp_path / "out")
    assert "4 steps" in (tmp_path / "out" / "README.md").read_text()
