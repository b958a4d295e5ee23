"""The exported model."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from mosaics.cli import main
from mosaics.memories.mosaic.long_term import LongTermMemory
from mosaics.models import PRESETS
from mosaics.models.loading import load_exported
from mosaics.training import train
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


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("-tiny")])
def test_every_preset_is_trained_exported_and_loaded(preset, tiny, tmp_path):
    one = {"training.steps": 1, "training.warmup_steps": 1, "training.context_length": 80}
    one |= {"training.batch_size": 1, "training.micro_batch_size": 1, "validation": {"every": 1, "sequences": 1}}
    recipe = tiny(one | {"model": {"preset": preset, "num_hidden_layers": 1}})
    assert train(recipe, tmp_path / "run").finished
    model, _ = load_exported(tmp_path / "run")
    context = re.search(r"training context \| (.*) \|", (tmp_path / "run/export/README.md").read_text())[1]
    state = [model.describe(length)["state_bytes"] for length in (80, 320)] if "longer" in context else [0, 0]
    says = {
        "80 tokens; longer ones can be read, memory grows with the context": state[0] < state[1],
        "80 tokens; longer ones can be read, in the same memory": state[0] == state[1],
        "80 tokens; no more can be read": model.model.embed_positions is not None,
    }
    assert says[context]


def test_model_card_names_the_heads_of_every_memory(tiny, tmp_path):
    changes = {"training.steps": 1, "training.warmup_steps": 1, "model.long_term.num_attention_heads": 4}
    assert train(tiny(changes), tmp_path / "run").finished
    assert "| 2, 16, 2 and 4 |" in (tmp_path / "run/export/README.md").read_text()


def test_export_run_model_card_snippet_runs(run, capsys):
    text = (run / "export" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("PATH_OF_THIS_FOLDER", str(run / "export"))
    exec(code, {})
    assert capsys.readouterr().out.startswith("<|begin_of_text|>")


@pytest.mark.slow
def test_export_self_contained_card_snippet_runs_without_mosaics(run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(run), "--output", str(out), "--self-contained"]) == 0
    text = (out / "README.md").read_text()
    assert "import mosaics  #" not in text and "LICENSE-CODE.txt" in text and (out / "LICENSE-CODE.txt").is_file()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("PATH_OF_THIS_FOLDER", str(out))
    refused = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from stranger import Refused\n"
    refused += "sys.meta_path.insert(0, Refused())\n"
    done = subprocess.run([sys.executable, "-I", "-c", refused + code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("<|begin_of_text|>"), done.stderr
    model, _ = load_exported(out)  # with the package, and all files as they were written
    assert torch.equal(model.lm_head.weight, load_exported(run / "export")[0].lm_head.weight)
    (out / "modeling_mosaic.py").write_text("print('something else')")
    with pytest.raises(ValueError, match=r"modeling_mosaic\.py has changed since it was exported"):
        load_exported(out)


def test_export_self_contained_refuses_the_memory_of_another_package(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LongTermMemory, "__module__", "elsewhere.memories")
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--self-contained"]) == 2
    assert "error: the memory 'long_term' is of another package (elsewhere.memories)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
