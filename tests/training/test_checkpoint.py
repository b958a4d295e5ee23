"""Checkpoints: whole, verified, kept; and what happens when something breaks them."""

import errno
import json
import shutil

import pytest
import torch

from mosaics.training import checkpoint as module
from mosaics.training.checkpoint import (
    DamagedCheckpoint,
    checkpoint_folder,
    checkpoint_steps,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from mosaics.training.optimizer import make_optimizer
from mosaics.training.setup import build_config, build_model

FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def _model_and_optimizer(tiny, steps=1, **changes):
    recipe = tiny(changes)
    model = build_model(build_config(recipe))
    optimizer = make_optimizer(model, recipe.training)
    for _ in range(steps):
        model(torch.randint(0, 300, (1, 12)), labels=torch.randint(0, 300, (1, 12)), draw=0.5).loss.backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def trained(tiny):
    return _model_and_optimizer(tiny)


@pytest.fixture
def root(trained, tmp_path):
    """Checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, *trained, {"step": step, "recipe": "mine"})
    return tmp_path


@pytest.mark.parametrize("changes", [{}, {"model.tie_word_embeddings": True}])
def test_load_checkpoint_gives_back_model_optimizer_and_state(tiny, tmp_path, changes):
    model, optimizer = _model_and_optimizer(tiny, **changes)
    folder = save_checkpoint(tmp_path, 3, model, optimizer, {"step": 3, "tokens": 5})
    other, other_optimizer = _model_and_optimizer(tiny, steps=0, **changes)
    assert load_checkpoint(folder, other, other_optimizer) == {"step": 3, "tokens": 5}
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        saved, loaded = optimizer.state[mine], other_optimizer.state[theirs]
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved), name


def test_save_checkpoint_is_a_model_that_transformers_loads(trained, tmp_path):
    import transformers

    model = trained[0].eval()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(save_checkpoint(tmp_path, 1, *trained, {})).eval()
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_save_checkpoint_can_be_read_by_torch_distributed(trained, tmp_path):
    from torch.distributed import checkpoint as distributed

    folder = save_checkpoint(tmp_path, 1, *trained, {})
    name, parameter = next(iter(trained[0].named_parameters()))
    wanted = {name: torch.zeros_like(parameter), f"optimizer.exp_avg.{name}": torch.zeros_like(parameter)}
    distributed.load(wanted, storage_reader=distributed.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert torch.equal(wanted[name], parameter)
    assert torch.equal(wanted[f"optimizer.exp_avg.{name}"], trained[1].state[parameter]["exp_avg"])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "flipped bit"])
def test_newest_checkpoint_names_and_passes_over_a_damaged_one(root, file, damage):
    path = checkpoint_folder(root, 2) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    damages = {"truncated": path.read_bytes()[:-2], "empty": b"", "flipped bit": bytes(content)}
    path.unlink() if damage == "missing" else path.write_bytes(damages[damage])
    folder, passed_over = newest_checkpoint(root)
    assert folder == checkpoint_folder(root, 1)
    assert list(passed_over) == [checkpoint_folder(root, 2)] and file in passed_over[checkpoint_folder(root, 2)]


def test_newest_checkpoint_every_single_bit_of_a_manifest_counts(root):
    path = checkpoint_folder(root, 2) / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        same = json.loads(content)
        try:
            unchanged = json.loads(path.read_bytes()) == same  # white space
        except ValueError:
            unchanged = False
        if not unchanged:
            with pytest.raises(DamagedCheckpoint):
                verify_checkpoint(path.parent)


def test_newest_checkpoint_passes_over_another_recipe_and_a_renamed_folder(root):
    assert newest_checkpoint(root, recipes=["mine"])[0] == checkpoint_folder(root, 2)
    shutil.copytree(checkpoint_folder(root, 1), checkpoint_folder(root, 9))
    folder, passed_over = newest_checkpoint(root)
    assert folder == checkpoint_folder(root, 2) and "holds step 1" in passed_over[checkpoint_folder(root, 9)]
    with pytest.raises(DamagedCheckpoint, match="another recipe"):
        newest_checkpoint(root, recipes=["yours"])


def test_newest_checkpoint_refuses_when_none_is_whole_and_gives_none_without_any(root, tmp_path):
    for step in (1, 2):
        (checkpoint_folder(root, step) / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="no checkpoint in .* can be used: .*state.json is missing"):
        newest_checkpoint(root)
    assert newest_checkpoint(tmp_path / "nothing") == (None, {})


def test_verify_checkpoint_refuses_a_path_in_a_file_name(root):
    path = checkpoint_folder(root, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../state.json"] = manifest["files"]["state.json"]
    manifest["digest"] = module._digest({key: value for key, value in manifest.items() if key != "digest"})
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="no plain file name"):
        verify_checkpoint(path.parent)


def test_load_checkpoint_refuses_other_shapes_and_names(tiny, root):
    folder = checkpoint_folder(root, 2)
    with pytest.raises(DamagedCheckpoint, match="has shape"):
        load_checkpoint(folder, *_model_and_optimizer(tiny, steps=0, **{"model.intermediate_size": 32}))
    with pytest.raises(DamagedCheckpoint, match="lacks tensor"):
        load_checkpoint(folder, *_model_and_optimizer(tiny, steps=0, **{"model.num_hidden_layers": 3}))


def test_save_checkpoint_keeps_the_newest_and_every_nth(trained, tmp_path):
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, *trained, {}, keep=2, keep_every=3)
    assert checkpoint_steps(tmp_path) == [3, 6, 7]
    assert {path.name for path in tmp_path.iterdir()} == {f"step-0000000{step}" for step in (3, 6, 7)}


@pytest.mark.parametrize("broken", ["_write_tensors", "_write_json", "sync", "_fingerprint"])
def test_save_checkpoint_on_a_full_disk_leaves_what_was_there(root, trained, monkeypatch, broken):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))

    monkeypatch.setattr(module, broken, full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(root, 3, *trained, {"step": 3})
    monkeypatch.undo()
    assert {path.name for path in root.iterdir()} == {"step-00000001", "step-00000002"}
    for step in (1, 2):
        verify_checkpoint(checkpoint_folder(root, step))


def test_save_checkpoint_says_what_the_system_said(trained, tmp_path):
    with pytest.raises(OSError) as error:  # safetensors raises a class of its own
        module._write_tensors(tmp_path / "missing" / "model.safetensors", {"a": torch.zeros(4)})
    assert error.value.errno == errno.ENOENT and error.value.filename.endswith("model.safetensors")


def test_save_checkpoint_clears_what_a_killed_process_left(root, trained):
    (root / ".new-step-00000003").mkdir()
    (root / ".new-step-00000003" / "model.safetensors").write_bytes(b"half")
    (root / ".old-step-00000001").mkdir()
    assert newest_checkpoint(root)[0] == checkpoint_folder(root, 2)
    save_checkpoint(root, 3, *trained, {})
    assert {path.name for path in root.iterdir()} == {"step-00000002", "step-00000003"}


def test_save_checkpoint_refuses_parameters_that_are_not_finite(trained, tmp_path):
    with torch.no_grad():
        trained[0].lm_head.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="lm_head.weight is not finite"):
        save_checkpoint(tmp_path, 1, *trained, {})
    assert not list(tmp_path.iterdir())


def test_save_checkpoint_refuses_averages_that_are_not_finite(trained, tmp_path):
    model, optimizer = trained
    optimizer.state[model.lm_head.weight]["exp_avg_sq"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="after step 1 tensor optimizer.exp_avg_sq.lm_head.weight is not finite"):
        save_checkpoint(tmp_path, 1, *trained, {})
    assert not list(tmp_path.iterdir())
