"""Models from folders: whole and unchanged, or refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import tiny_model
from mosaics.models.loading import _check_manifest, load_config, load_model, write_manifest


@pytest.fixture
def folder(tmp_path):
    """A saved model with its manifest."""
    tiny_model(torch.float32).save_pretrained(tmp_path / "model")
    write_manifest(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Change the tensors of a model without a manifest."""
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_load_model_gives_what_was_saved(folder):
    model = load_model(folder)
    assert not model.training
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_load_model_takes_a_state_dtype_of_mosaics_alone(folder, tmp_path):
    assert load_model(folder).config.state_dtype is None
    model = load_model(folder, "int8")
    assert {memory.common.state_dtype for memory in model.model.stack.memories()} == {"int8"}
    model = load_model(folder, read_tolerance=0.01)
    assert {memory.common.read_tolerance for memory in model.model.stack.memories()} == {0.01}
    with pytest.raises(ValueError, match="read_tolerance is 2.0; give a number above 0"):
        load_model(folder, read_tolerance=2.0)
    with pytest.raises(ValueError, match="state_dtype is 'int4'; choose bfloat16 or int8"):
        load_model(folder, "int4")
    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="is a llama; only a mosaic has a state_dtype"):
        load_model(tmp_path / "llama", "int8")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json", "manifest.json"])
def test_load_model_finds_every_changed_file(folder, file):
    data = bytearray((folder / file).read_bytes())
    data[-12] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(ValueError, match=file):
        load_model(folder)


def test_load_model_finds_every_changed_value_of_the_manifest(folder):
    content = (folder / "manifest.json").read_bytes()
    for place in range(0, len(content), 3):
        (folder / "manifest.json").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=str(folder)):
            _check_manifest(folder / "manifest.json")


def test_load_model_finds_a_missing_file_and_names_outside_the_folder(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"generation_config\.json is missing"):
        load_model(folder)
    manifest["files"] = {"../model/config.json": manifest["files"]["config.json"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="no file of that folder"):
        load_model(folder)


def test_load_model_lets_the_model_card_be_edited_and_changes_be_owned(folder):
    (folder / "README.md").write_text("mine")
    load_model(folder)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    load_model(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
        (lambda t: t.update(more=torch.zeros(2)), "has no place for the tensor more"),
        (lambda t: t["lm_head.weight"].__setitem__((0, 0), torch.nan), r"not finite, lm_head\.weight"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}), "can't be loaded"),
    ],
)
def test_load_model_refuses_weights_that_are_not_the_configs(folder, change, said):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=said):
        load_model(folder)


def test_load_model_refuses_shards_outside_the_folder(folder, tmp_path):
    (folder / "manifest.json").unlink()
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    names = load_file(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere\.safetensors'"):
        load_model(folder)


def test_load_model_never_opens_a_pickle(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_load_model_never_runs_code_of_the_folder(folder, tmp_path):
    (folder / "manifest.json").unlink()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {name: "own.Own" for name in ("AutoConfig", "AutoModelForCausalLM")}
    for changes in ({"auto_map": auto}, {"auto_map": auto, "model_type": "own"}):
        (folder / "config.json").write_text(json.dumps(config | changes))
        try:
            load_model(folder)
        except ValueError as error:
            assert "can't be loaded" in str(error)
    assert not (tmp_path / "exploded").exists()


def test_load_config_says_what_is_no_model(folder, tmp_path):
    assert load_config(folder).model_type == "mosaic"
    with pytest.raises(ValueError, match="no config.json"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match="there is no model"):
        load_config(tmp_path / "nothing")
    (folder / "config.json").write_text("[]")
    with pytest.raises((ValueError, OSError), match=str(folder)):
        load_config(folder)


def test_load_config_of_a_name_says_at_once_that_the_hub_is_out_of_reach(monkeypatch):
    import socket

    def nobody(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits to try again"))
    with pytest.raises(OSError, match="no-such-owner/no-such-model"):
        load_config("no-such-owner/no-such-model")
