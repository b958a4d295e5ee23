"""Training that begins with the weights of another model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mosaics.models import MosaicConfig
from mosaics.models.convert import from_llama
from mosaics.training import train
from mosaics.training.checkpoint import checkpoint_folder, checkpoint_steps
from mosaics.training.metrics import read_metrics
from mosaics.training.plan import plan
from mosaics.training.recipe import load_recipe

TAKEN = {"model": {"preset": None}}  # the source's arrangement and sizes


@pytest.fixture
def begun(tiny, finished):
    """Makes a recipe that begins with the finished run's model, or another."""

    def make(source=None, **changes):
        return tiny({"training.init_from": str(source or finished / "export"), "training.steps": 3} | changes)

    return make


def _first_validation(run):
    return next(line for line in read_metrics(run / "metrics.jsonl") if "validation_bits_per_byte" in line)


@pytest.mark.parametrize("kind", ["run", "export", "checkpoint"])
@pytest.mark.parametrize("model", [{}, TAKEN])
def test_train_from_a_model_begins_where_that_ended(begun, finished, tmp_path, kind, model, capsys):
    source = {"run": finished, "export": finished / "export"}.get(kind)
    source = source or checkpoint_folder(finished / "checkpoints", 6)
    assert train(begun(source, **model), tmp_path / "run").finished
    before = read_metrics(finished / "metrics.jsonl")[-1]
    assert _first_validation(tmp_path / "run") == before | {"step": 0}
    assert f"begins with the weights of {source}\n" in capsys.readouterr().out
    assert f"begun with the weights of `{source}`" in (tmp_path / "run" / "export" / "README.md").read_text()


def _llama(prepared, folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = dict(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(3)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=3e-6, max_position_embeddings=48, **special))
    llama.save_pretrained(folder / "llama")
    model = from_llama(llama).to(torch.bfloat16)
    model.save_pretrained(folder / "mosaic")
    tokenizer.save_pretrained(folder / "mosaic")
    return model


def test_train_from_a_converted_llama_in_bfloat16_keeps_its_numbers_and_settings(begun, prepared, tmp_path):
    model = _llama(prepared, tmp_path)
    recipe = begun(tmp_path / "mosaic", **TAKEN, **{"checkpoint.keep_every": 1})
    assert train(recipe, tmp_path / "run").finished
    saved = load_file(checkpoint_folder(tmp_path / "run" / "checkpoints", 0) / "model.safetensors")
    weights = dict(model.named_parameters())
    assert saved.keys() == weights.keys()
    assert all(
        torch.equal(saved[name], weight.float()) and saved[name].dtype == torch.float32
        for name, weight in weights.items()
    )
    config = AutoConfig.from_pretrained(tmp_path / "run" / "export")
    assert (config.norm_eps, config.vocab_size, str(config.dtype)) == (3e-6, 320, "torch.float32")


def test_train_from_a_model_needs_it_no_more_once_it_has_begun(begun, finished, tmp_path):
    source = shutil.copytree(finished / "export", tmp_path / "model")
    for name in ("whole", "killed"):
        assert train(begun(source, **TAKEN, **{"checkpoint.keep_every": 1}), tmp_path / name).finished
    run = tmp_path / "killed"
    for step in (1, 2, 3):
        shutil.rmtree(checkpoint_folder(run / "checkpoints", step), ignore_errors=True)
    assert checkpoint_steps(run / "checkpoints") == [0]
    shutil.rmtree(run / "export")
    shutil.rmtree(source)
    assert train(begun(source, **TAKEN, **{"checkpoint.keep_every": 1}), run).finished
    for path in (checkpoint_folder(run / "checkpoints", 3)).iterdir():
        if path.name != "manifest.json":
            assert (
                path.read_bytes() == (checkpoint_folder(tmp_path / "whole" / "checkpoints", 3) / path.name).read_bytes()
            )
    ours, theirs = (
        [line | {"tokens_per_second": 0} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("killed", "whole")
    )
    assert ours == theirs and ours[0]["step"] == 0


def test_train_from_a_model_changes_what_has_no_weights_and_says_so(begun, tmp_path, capsys):
    changes = {"training.context_length": 96, "model": {"preset": None, "train_delay": [4, 16]}}
    assert train(begun(**changes), tmp_path / "run").finished
    said = "max_position_embeddings 48 there and 96 here; long_term.train_delay [4, 8] there and [4, 16] here"
    assert said in capsys.readouterr().out
    config = MosaicConfig.from_pretrained(tmp_path / "run" / "export")
    assert (config.max_position_embeddings, config.train_delay, config.window) == (96, [4, 16], 8)


def test_train_from_a_model_prepares_text_with_its_tokenizer(begun, corpus, finished, tmp_path):
    recipe = begun(**{"data.prepared": None, "data.corpus": str(corpus), "data.vocabulary_size": 512})
    assert train(recipe, tmp_path / "run").finished
    vocabularies = [AutoTokenizer.from_pretrained(run / "export").get_vocab() for run in (tmp_path / "run", finished)]
    assert vocabularies[0] == vocabularies[1]


def _other_tokenizer(source, change):
    config = json.loads((source / "tokenizer.json").read_text())
    change(config)
    (source / "tokenizer.json").write_text(json.dumps(config))


def _swapped(config):
    vocabulary = config["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("changes", "damage", "said"),
    [
        ({"model.hidden_size": 32}, None, r"is \(300, 16\) there and \(300, 32\) here \(hidden_size 16 there and 32"),
        ({"model.num_hidden_layers": 3}, None, r"stack.blocks.2.* is not there .*num_hidden_layers 2 there and 3 here"),
        ({"model.tie_word_embeddings": True}, None, "lm_head.weight is .* there and not here"),
        ({"model": {"preset": "transformer-tiny", "hidden_size": 16}}, None, "does not fit"),
        ({"model": {"preset": None, "intermediate_size": 32}}, None, "intermediate_size 24 there and 32 here"),
        ({"model.preset": None, "training.init_from": None}, None, "model.preset is null"),
        ({"training.init_from": "no/such/model"}, None, "no/such/model"),
        ({"training.init_from": "memory-mosaics-v2-tiny"}, None, "is a preset, which has no weights"),
        ({"training.init_from": "CORPUS"}, None, "no config.json"),
        ({"training.init_from": "LLAMA"}, None, "llama is a llama; a Llama becomes a mosaic by mosaics convert"),
        ({}, lambda source: (source / "model.safetensors").write_bytes(b""), "damaged or foreign"),
        ({}, lambda source: _other_tokenizer(source, _swapped), "token 'a' is number .* prepare the text with it"),
        ({"data.prepared": None, "data.corpus": "CORPUS"}, lambda s: (s / "tokenizer.json").unlink(), "no tokenizer"),
    ],
)  # fmt: skip
def test_train_from_a_model_refuses_what_does_not_fit_before_anything_is_written(
    begun, finished, corpus, prepared, tmp_path, monkeypatch, changes, damage, said
):
    source = shutil.copytree(finished / "export", tmp_path / "model")
    if damage is not None:
        for name in ("manifest.json", "tokenizer_config.json") if "tokenizer" in said else ("manifest.json",):
            if name == "manifest.json" or said == "no tokenizer":
                (source / name).unlink()
        damage(source)
    if "LLAMA" in changes.values():
        _llama(prepared, tmp_path)
    places = {"CORPUS": str(corpus), "LLAMA": str(tmp_path / "llama")}
    changes = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    monkeypatch.setattr("mosaics.data.corpus._read_files", lambda *args: pytest.fail("reads the corpus"))
    with pytest.raises((ValueError, OSError), match=said):
        train(begun(source, **changes), tmp_path / "runs" / "run")
    assert not (tmp_path / "runs").exists()


def test_plan_of_a_training_from_a_model_is_of_that_model(begun, tiny):
    ours, theirs = plan(begun(**TAKEN)), plan(tiny({"training.steps": 3}))
    assert ours["parameters"] == theirs["parameters"] and ours["training_flops"] == theirs["training_flops"]


def test_train_by_the_recipe_of_the_longer_context_goes_on_from_a_model(finished, prepared, tmp_path):
    small = {"context_length": 8 * 48, "batch_size": 2, "steps": 2, "warmup_steps": 1, "precision": "float32"}
    changes = {f"training.{key}": value for key, value in small.items()}
    changes |= {"training.init_from": str(finished), "data.prepared": str(prepared), "validation.sequences": 2}
    assert train(load_recipe("memory-mosaics-v2-32k", changes), tmp_path / "run").finished
    before, after = (AutoModelForCausalLM.from_pretrained(run / "export") for run in (finished, tmp_path / "run"))
    assert (before.config.max_position_embeddings, after.config.max_position_embeddings) == (48, 384)
    assert before.config.blocks == after.config.blocks and not torch.equal(before.lm_head.weight, after.lm_head.weight)
