"""Runs: start, continue, refuse, stop, survive."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from helpers import Forked
from mosaics.training import run_folder as module
from mosaics.training import train
from mosaics.training.checkpoint import checkpoint_folder, checkpoint_steps
from mosaics.training.metrics import read_metrics

_RESULTS = ("model.safetensors", "optimizer.safetensors", "state.json")


def _process(recipe, folder: Path, words: tuple = (), fresh: bool = False) -> subprocess.Popen | Forked:
    """`mosaics train` in a process of its own, forked from this one or fresh."""
    command = ["train", "--run", str(folder), *words]
    if recipe is not None:
        path = folder.parent / f"{folder.name}.yaml"
        path.write_text(recipe.to_yaml())
        command.insert(1, str(path))
    if not fresh:
        return Forked(command, folder.parent / f"{folder.name}.txt")
    command = [sys.executable, "-m", "mosaics", *command]
    source = str(Path(module.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _cut(run: Path, step: int) -> None:
    """Make a finished run one that was killed after the checkpoint of a step."""
    for later in checkpoint_steps(run / "checkpoints"):
        if later > step:
            shutil.rmtree(checkpoint_folder(run / "checkpoints", later))
    shutil.rmtree(run / "export")
    (run / "curves.png").unlink()


def _losses(run: Path) -> list:
    timed = {"tokens_per_second"}
    return [
        {key: value for key, value in line.items() if key not in timed} for line in read_metrics(run / "metrics.jsonl")
    ]


def _same(one: Path, other: Path, step: int = 6) -> bool:
    folders = [checkpoint_folder(run / "checkpoints", step) for run in (one, other)]
    return all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in _RESULTS)


def test_train_leaves_a_whole_run_folder(finished, tiny):
    assert {path.name for path in finished.iterdir() if path.name[0] != "."} == {
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints",
        "export",
        "curves.png",
    }
    assert yaml.safe_load((finished / "recipe.yaml").read_text()) == tiny().resolved()
    assert checkpoint_steps(finished / "checkpoints") == [2, 4, 6]
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    validated = [line for line in lines if "validation_bits_per_byte" in line]
    assert [line["step"] for line in validated] == [0, 3, 6]
    assert validated[-1]["validation_bits_per_byte"] < validated[0]["validation_bits_per_byte"] - 0.05
    steps = [line for line in lines if "loss" in line]
    assert {"learning_rate", "gradient_norm", "draw", "tokens", "tokens_per_second"} <= steps[0].keys()
    assert steps[-1]["tokens"] == 6 * 4 * 48 and len({line["draw"] for line in steps}) == 6


def test_train_prepares_its_corpus_into_the_run_and_needs_it_no_more(tiny, corpus, tmp_path):
    own = shutil.copytree(corpus, tmp_path / "corpus")
    recipe = tiny({"data.prepared": None, "data.corpus": str(own), "training.steps": 2, "validation.every": 100})
    assert train(recipe, tmp_path / "run").finished
    assert (tmp_path / "run" / "data" / "manifest.json").is_file()
    shutil.rmtree(own)
    shutil.rmtree(tmp_path / "run" / "export")
    assert train(recipe, tmp_path / "run").finished and (tmp_path / "run" / "export").is_dir()


def test_train_warns_of_a_text_that_a_step_takes_whole(tiny, tmp_path, capsys):
    warning = "warning: the training text has"
    (tmp_path / "text.txt").write_text("A text of a few words, too few to learn from. " * 5)
    changes = {"data.prepared": None, "data.corpus": str(tmp_path / "text.txt"), "training.steps": 1}
    train(tiny(changes), tmp_path / "few")
    assert capsys.readouterr().out.count(warning) == 1
    train(tiny({"training.steps": 1}), tmp_path / "enough")
    assert warning not in capsys.readouterr().out


@pytest.mark.slow
def test_train_resumed_in_a_fresh_process_equals_the_uninterrupted_run_bit_for_bit(finished, run, tiny):
    _cut(run, 2)
    process = _process(tiny(), run, fresh=True)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "continuing" in output and "after step 2 of 6" in output, output
    assert _same(finished, run)
    assert _losses(run) == _losses(finished)


@pytest.mark.parametrize("dropped", ["random numbers of torch", "delay", "optimizer", "position in the data"])
def test_train_resumed_without_a_part_of_the_state_is_not_the_same(finished, run, tiny, monkeypatch, dropped):
    _cut(run, 4)
    if dropped == "random numbers of torch":
        monkeypatch.setattr("mosaics.training.loop.seed_step", lambda seed, step, row: None)
    elif dropped == "delay":
        monkeypatch.setattr("mosaics.models.draws.draw_step", lambda seed, step: 0.0)
    elif dropped == "optimizer":
        load = module.load_checkpoint
        monkeypatch.setattr(module, "load_checkpoint", lambda folder, model, optimizer, group: load(folder, model))
    else:
        from mosaics.data import PackedDataset

        batch = PackedDataset.batch
        monkeypatch.setattr(PackedDataset, "batch", lambda self, first, count: batch(self, first % 16, count))
    assert train(tiny(), run).finished
    assert not _same(finished, run)


def test_train_resumed_in_this_process_is_the_same(finished, run, tiny):
    _cut(run, 4)  # the control of the test above
    assert train(tiny(), run, resume=True).finished
    assert _same(finished, run)


def test_train_says_that_a_finished_run_is_finished(run, tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert train(tiny(), run).finished
    assert "is finished: step 6 of 6" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_train_clears_what_a_process_killed_after_its_last_save_left(run, tiny):
    (run / "checkpoints" / ".old-step-00000002").mkdir()
    assert train(tiny(), run).finished
    assert not list((run / "checkpoints").glob(".*"))


def test_train_refuses_a_run_of_another_recipe(run, tiny):
    with pytest.raises(ValueError, match="training.steps is 6 there and 7 here; a finished run goes on by .* --extend"):
        train(tiny({"training.steps": 7}), run)
    with pytest.raises(ValueError, match=r"model.window is 8 there and 9 here \(and 1 more\)"):
        train(tiny({"model.window": 9, "training.steps": 7}), run)


def test_train_refuses_folders_that_are_no_runs(tmp_path, tiny):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(notes.txt\) and holds no run"):
        train(tiny(), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        train(tiny(), tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_train_resume_insists_on_something_to_continue(tmp_path, run, tiny):
    with pytest.raises(ValueError, match="there is no run in .*new to go on with"):
        train(tiny(), tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="--resume: .* has no checkpoint"):
        train(tiny(), run, resume=True)


def test_train_refuses_what_cannot_work_before_writing_anything(tmp_path, tiny):
    for changes, said in [
        ({"training.context_length": 8}, "not longer than the delay of long_term, up to 8"),
        ({"model.preset": "memory-mosaic-v2"}, "no preset"),
        ({"model.hidden_sise": 8}, "hidden_sise"),
        ({"model.num_attention_heads": 3}, "heads"),
    ]:
        with pytest.raises(ValueError, match=said):
            train(tiny(changes), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.context_length": 8}, "not longer than the delay of long_term, up to 8"),
        ({"model.hidden_size": 2**31 - 1, "model.num_attention_heads": 1}, "no tensor can be as large"),
        ({"model.num_attention_heads": 3}, "heads"),
        ({"model.vocab_size": 290}, "data.vocabulary_size asks for 300 tokens and model.vocab_size is 290"),
        ({"model.vocab_size": 290, "data.tokenizer": "TOKENIZER"}, "the tokenizer has 300 tokens"),
        ({"data.tokenizer": "not/here/at/all"}, "not/here/at/all"),
    ],
)
def test_train_refuses_what_cannot_work_before_it_reads_the_corpus(
    tmp_path, tiny, corpus, prepared, monkeypatch, changes, said
):
    monkeypatch.setattr("mosaics.data.corpus._read_files", lambda *args: pytest.fail("reads the corpus"))
    changes = {k: str(prepared / "tokenizer") if v == "TOKENIZER" else v for k, v in changes.items()}
    recipe = tiny({"data.prepared": None, "data.corpus": str(corpus)} | changes)
    with pytest.raises((ValueError, OSError), match=said):
        train(recipe, tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


def test_train_leaves_nothing_of_a_start_that_failed_and_all_that_was_there(tmp_path, tiny, monkeypatch):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "one.txt").write_text("a")
    recipe = tiny({"data.prepared": None, "data.corpus": str(tmp_path / "short")})
    with pytest.raises(ValueError, match="too short to hold out a part"):
        train(recipe, tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["short"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".mine").write_text("")
    monkeypatch.setattr(module, "_open_data", _failing)
    with pytest.raises(ValueError, match="after the text was prepared"):
        train(tiny({"data.prepared": None, "data.corpus": __file__}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".mine"]


def _failing(recipe, folder, verify):
    assert (folder / "data" / "manifest.json").is_file()
    raise ValueError("after the text was prepared")


def test_train_refuses_a_tokenizer_larger_than_the_model(tmp_path, tiny):
    with pytest.raises(ValueError, match="the tokenizer has 300 tokens and model.vocab_size is 290"):
        train(tiny({"model.vocab_size": 290}), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert train(tiny({"model.vocab_size": 310, "training.steps": 1}), tmp_path / "run").finished


def test_train_refuses_data_other_than_it_began_with(run, tiny, prepared, tmp_path):
    _cut(run, 4)
    other = shutil.copytree(prepared, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"version": 1, "note": "changed"}))
    recipe = tiny({"data.prepared": str(other)})
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    digest = module._recipe_digests(run)[-1]
    _rewrite_recipe_digest(run, digest)
    with pytest.raises(ValueError, match="are not those that .* was trained on"):
        train(recipe, run)


def _rewrite_recipe_digest(run: Path, digest: str) -> None:
    from mosaics.training import checkpoint

    for step in checkpoint_steps(run / "checkpoints"):
        path = checkpoint_folder(run / "checkpoints", step) / "manifest.json"
        manifest = json.loads(path.read_text()) | {"recipe": digest}
        manifest.pop("digest")
        path.write_text(json.dumps(manifest | {"digest": checkpoint._digest(manifest)}))


def test_train_passes_over_a_damaged_checkpoint_and_keeps_it_aside(finished, run, tiny, capsys):
    _cut(run, 4)
    (checkpoint_folder(run / "checkpoints", 4) / "model.safetensors").write_bytes(b"")
    assert train(tiny(), run).finished
    output = capsys.readouterr().out
    assert "model.safetensors has 0 bytes" in output and "after step 2 of 6" in output
    assert (run / "checkpoints" / "damaged-step-00000004").is_dir()
    assert _same(finished, run)


def test_train_stops_when_no_checkpoint_can_be_used(run, tiny):
    for step in checkpoint_steps(run / "checkpoints"):
        (checkpoint_folder(run / "checkpoints", step) / "state.json").write_text("{}")
    for _ in range(2):  # the second time as well: nothing was moved or begun anew
        with pytest.raises(ValueError, match="no checkpoint in .* can be used"):
            train(tiny(), run)


def test_train_refuses_a_second_process_on_one_folder(run, tiny):
    with module._locked(run):
        with pytest.raises(ValueError, match="is in use by another process"):
            train(tiny(), run)
    assert train(tiny(), run).finished


def test_train_names_the_documents_of_a_loss_that_is_not_finite(tmp_path, tiny, monkeypatch):
    from mosaics.training.loop import NonFinite

    step = module.optimisation_step

    def break_at_four(model, optimizer, data, recipe, number, *others):
        if number == 4:
            raise NonFinite("the loss of step 4 is nan")
        return step(model, optimizer, data, recipe, number, *others)

    monkeypatch.setattr(module, "optimisation_step", break_at_four)
    with pytest.raises(ValueError, match="step 4"):
        train(tiny(), tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["step"] == 4 and "nan" in last["error"] and last["documents"][0][0].endswith(".txt")
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]


def _not_finite_at(monkeypatch, *steps):
    """Make the loss of some steps infinite, as an overflow behind the last block would."""
    step = module.optimisation_step

    def broken(model, optimizer, data, recipe, number, *others):
        handle = None
        if number in steps:
            handle = model.model.norm.register_forward_hook(lambda *call: call[-1] * float("inf"))
        try:
            return step(model, optimizer, data, recipe, number, *others)
        finally:
            if handle:
                handle.remove()

    monkeypatch.setattr(module, "optimisation_step", broken)


def test_train_skips_a_step_that_is_not_finite_when_the_recipe_says_so(tmp_path, tiny, monkeypatch, capsys):
    _not_finite_at(monkeypatch, 3, 4)
    recipe = tiny({"training.if_not_finite": "skip"})
    assert train(recipe, tmp_path / "run").finished
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 5, 6]
    skipped = [line for line in lines if "error" in line]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(3, True), (4, True)]
    assert len(skipped[0]["documents"]) == 4 and skipped[0]["documents"][0][0].endswith(".txt")
    assert "the loss of step 3 (sequences 8 to 11 of the stream) is nan" in capsys.readouterr().out
    # The steps were left out, not repeated: parameters as they were, schedule and data went on.
    two, four = (checkpoint_folder(tmp_path / "run" / "checkpoints", step) for step in (2, 4))
    assert (two / "model.safetensors").read_bytes() == (four / "model.safetensors").read_bytes()
    assert json.loads((four / "state.json").read_text())["skipped"] == 2
    _cut(tmp_path / "run", 4)
    assert train(recipe, tmp_path / "run").finished
    assert _losses(tmp_path / "run") == [
        {key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines
    ]


def test_train_stops_when_too_many_steps_in_a_row_are_skipped_also_after_a_resume(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(module, "MOST_SKIPPED", 3)
    _not_finite_at(monkeypatch, 2, 3, 4)
    recipe = tiny({"training.if_not_finite": "skip"})
    for _ in range(2):  # the second time, the count of those before the checkpoint comes from there
        with pytest.raises(ValueError, match="the loss of step 4"):
            train(recipe, tmp_path / "run")
        assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["step"], last["skipped"]) == (4, False)


def test_train_stops_at_a_damaged_checkpoint_when_the_recipe_says_so(tmp_path, tiny):
    recipe, run = tiny({"checkpoint.if_damaged": "stop"}), tmp_path / "run"
    train(recipe, run)
    _cut(run, 4)
    newest = checkpoint_folder(run / "checkpoints", 4)
    (newest / "state.json").write_text("{}")
    for _ in range(2):  # nothing was moved
        with pytest.raises(ValueError, match="state.json has .*; checkpoint.if_damaged is stop, so move step-00000004"):
            train(recipe, run)
    newest.rename(tmp_path / "away")
    assert train(recipe, run).finished


def _wait_for_steps(process: subprocess.Popen | Forked, run: Path, steps: int) -> None:
    end = time.monotonic() + 100
    while len(read_metrics(run / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_train_finishes_the_step_saves_and_exits_0_on_a_signal(tmp_path, tiny, number):
    recipe = tiny({"training.steps": 100000, "checkpoint.every": 100000, "validation.every": 100000})
    run = tmp_path / "run"
    process = _process(recipe, run)
    _wait_for_steps(process, run, 5)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    [step] = checkpoint_steps(run / "checkpoints")
    assert f"stopped after step {step} of 100000, which is saved; the same command continues" in output
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == step


@pytest.mark.slow
def test_train_survives_kill_9(finished, tmp_path, tiny):
    recipe, run = tiny({"training.steps": 6}), tmp_path / "run"
    for lines in (3, 6):
        process = _process(recipe, run)
        _wait_for_steps(process, run, lines)
        process.kill()
        process.communicate()
    assert train(recipe, run).finished
    assert _same(finished, run) and _losses(run) == _losses(finished)
