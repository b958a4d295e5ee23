"""Models by where they lie: runs at any time, checkpoints, exports."""

import shutil

import pytest
import torch

from mosaics.evaluation import Scorer
from mosaics.training import checkpoint as checkpoints
from mosaics.training.checkpoint import checkpoint_folder
from mosaics.training.sources import find_source, open_source


def _weights(source) -> dict[str, torch.Tensor]:
    return open_source(source)[0].state_dict()


def _equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_open_source_of_a_run_is_its_newest_whole_checkpoint(run, capsys):
    late, early = (_weights(checkpoint_folder(run / "checkpoints", step)) for step in (6, 4))
    assert _equal(_weights(run), late) and _equal(_weights(run / "export"), late) and not _equal(late, early)
    shutil.rmtree(run / "export")
    assert _equal(_weights(run), late) and capsys.readouterr().err == ""
    (checkpoint_folder(run / "checkpoints", 6) / "state.json").unlink()
    assert _equal(_weights(run), early)
    assert "state.json is missing; step-00000004 is taken" in capsys.readouterr().err


def test_open_source_of_a_run_without_checkpoints_is_its_export(run, capsys):
    expected = _weights(run)
    for step in (2, 4, 6):
        (checkpoint_folder(run / "checkpoints", step) / "state.json").unlink()
    assert _equal(_weights(run), expected) and "export is taken" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert _equal(_weights(run), expected)
    (run / "export").rename(run / "export-step-00000006")
    assert _equal(_weights(run), expected)
    shutil.rmtree(run / "export-step-00000006")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        open_source(run)


def test_open_source_of_a_run_is_the_same_model_to_an_evaluation_as_its_export(run):
    assert Scorer(*open_source(run)).fingerprint() == Scorer(*open_source(run / "export")).fingerprint()


def test_open_source_takes_a_state_dtype(run):
    assert open_source(run, "int8")[0].config.state_dtype == "int8"
    assert open_source(run, read_tolerance=0.01)[0].config.read_tolerance == 0.01
    with pytest.raises(ValueError, match="choose bfloat16 or int8"):
        open_source(run, "int4")


@pytest.mark.parametrize("moment", ["verified", "loaded"])
def test_open_source_of_a_run_that_drops_the_checkpoint_meanwhile_takes_the_next(run, monkeypatch, moment):
    """The run saves step 6 (which hides here at first), and drops those before, while step 4 is being looked at."""
    root, expected = run / "checkpoints", _weights(run / "export")
    shutil.rmtree(run / "export")
    six = checkpoint_folder(root, 6).rename(run / "six")

    def goes_on(folder):
        if six.exists():
            six.rename(checkpoint_folder(root, 6))
            for step in (2, 4):
                shutil.rmtree(checkpoint_folder(root, step))

    name = {"verified": "verify_checkpoint", "loaded": "read_json"}[moment]
    original = getattr(checkpoints, name)

    def late(path):
        goes_on(path)
        return original(path)

    if moment == "verified":
        monkeypatch.setattr(checkpoints, name, late)
    else:
        import mosaics.training.sources as sources

        load = sources.load_checkpoint
        monkeypatch.setattr(sources, "load_checkpoint", lambda *given: (goes_on(given[0]), load(*given))[1])
    assert _equal(_weights(run), expected)


def test_find_source_verifies_a_checkpoint(run):
    folder = checkpoint_folder(run / "checkpoints", 4)
    assert find_source(folder).tokenizer() is not None
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors has changed"):
        find_source(folder)
