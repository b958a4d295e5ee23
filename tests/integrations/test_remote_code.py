"""Other people's programs on an exported mosaic, by `trust_remote_code=True`, with the package installed or without."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mosaics.models.code import write_code

pytestmark = pytest.mark.clients
SOURCE = Path(__file__).parents[2] / "src"
HELPERS = Path(__file__).parents[1]
WAYS = ("installed", "self-contained")


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    return request.param


@pytest.fixture(scope="module")
def folder(way, exported, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(way) / "model"
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(place)
    AutoTokenizer.from_pretrained(exported).save_pretrained(place)
    if way == "self-contained":
        write_code(place, self_contained=True)
    return place


def python(way: str, cwd: Path, code: str, *words: str) -> str:
    """What a program prints that never imports mosaics, and in one way can't."""
    start = "import sys\n" + f"sys.path[:0] = [{str(SOURCE)!r}, {str(HELPERS)!r}]\n"
    start += "" if way == "installed" else "from stranger import Refused; sys.meta_path.insert(0, Refused())\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    environment |= {"HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "1", "MOSAICS_COMPILE": "0"}
    command = [sys.executable, "-I", "-c", start + code, *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pipeline_generates_what_the_package_does(way, folder, tmp_path):
    code = """
from transformers import pipeline
write = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(write("def ", max_new_tokens=12, do_sample=False, return_full_text=True)[0]["generated_text"])
"""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert python(way, tmp_path, code, str(folder)).rstrip("\n") == expected.rstrip("\n")


def test_lm_eval_measures_what_the_package_does(way, folder, tmp_path, texts):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    (tmp_path / "pieces.yaml").write_text(f"""
task: pieces
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "texts.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")
    words = f"--model hf --model_args pretrained={folder},trust_remote_code=True,dtype=float32 --device cpu".split()
    words += f"--tasks pieces --include_path {tmp_path} --output_path {tmp_path / 'found'}".split()
    code = "import runpy; sys.argv[0] = 'lm-eval'; runpy.run_module('lm_eval', run_name='__main__')"
    python(way, tmp_path, code, *words)
    (found,) = (tmp_path / "found").rglob("results*.json")
    measured = json.loads(found.read_text())["results"]["pieces"]["bits_per_byte,none"]

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=str(folder), batch_size=1)
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts[:3])]
    nats = -sum(harness.loglikelihood_rolling(asked, disable_tqdm=True))
    assert measured == pytest.approx(nats / sum(len(text.encode()) for text in texts[:3]) / math.log(2), rel=1e-5)


def test_trainer_checkpoints_and_merged_adapters_load_again(way, folder, tmp_path, texts):
    train = """
import json, torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
folder, texts = sys.argv[1], json.loads(sys.argv[2])
load = lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
rows = [dict(input_ids=(ids := tokenizer(text).input_ids[:24]), labels=ids) for text in texts]
options = dict(report_to="none", use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True, save_steps=2)
trainer = Trainer(load(), TrainingArguments("trained", max_steps=2, learning_rate=0.01, **options), train_dataset=rows)
trainer.train()
adapted = get_peft_model(load(), LoraConfig(r=2, task_type="CAUSAL_LM"))
again = dict(max_steps=2, learning_rate=0.05, save_strategy="no")
Trainer(adapted, TrainingArguments("adapted", **options | again), train_dataset=rows).train()
merged = adapted.merge_and_unload()
merged.save_pretrained("merged")
ids = torch.tensor([rows[0]["input_ids"]])
with torch.no_grad():
    save_file({name: m.eval()(ids).logits.clone() for name, m in
        {"trained/checkpoint-2": trainer.model, "merged": merged, "before": load()}.items()}, "logits")
"""
    python(way, tmp_path, train, str(folder), json.dumps([text for text in texts if len(text) > 200][:4]))
    load = """
import json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
text = json.loads(sys.argv[2])
ids = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)(text, return_tensors="pt").input_ids[:, :24]
found = {}
with torch.no_grad():
    for name in ("trained/checkpoint-2", "merged"):
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
        found[name] = model(ids).logits.clone()
save_file(found, "again")
"""
    python(way, tmp_path, load, str(folder), json.dumps([text for text in texts if len(text) > 200][:1]))
    expected, found = load_file(tmp_path / "logits"), load_file(tmp_path / "again")
    for name, logits in found.items():
        assert torch.equal(logits, expected[name])
        assert not torch.allclose(logits, expected["before"])
