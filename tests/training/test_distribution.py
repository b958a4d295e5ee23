"""Several processes as one run. Most are forked here, which costs no imports; one run is torchrun's own."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import together
from mosaics.data import PackedDataset
from mosaics.training import checkpoint, loop, train
from mosaics.training import run_folder as module
from mosaics.training.checkpoint import DamagedCheckpoint, checkpoint_folder, checkpoint_steps, verify_checkpoint
from mosaics.training.distribution import Group
from mosaics.training.draws import seed_step
from mosaics.training.metrics import read_metrics
from mosaics.training.recipe import Extension

distributed = pytest.importorskip("torch.distributed")
for _late in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"):
    pytest.importorskip(_late)  # here once, not in every forked process
pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and distributed.is_available() and distributed.is_gloo_available()),
    reason="needs fork and a torch with gloo",
)
SHARED = {"training.batch_size": 8, "validation.sequences": 5}  # 3 batches to validate: one process gets a left-over


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> Path:
    """A finished run of one process. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train(tiny(SHARED), folder).finished
    return folder


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory) -> tuple[Path, list[str], list[list[int]]]:
    """A finished run of two processes, what they printed, and which rows each read. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("shared")
    batch = PackedDataset.batch

    def noted(self, first, count):
        if count == 4:  # training: 8 sequences for two; validation takes 2 at a time
            with (folder / f"rows-{os.environ['RANK']}").open("a") as file:
                file.writelines(f"{row}\n" for row in range(first, first + count))
        return batch(self, first, count)

    def start():
        PackedDataset.batch = noted
        train(tiny(SHARED), folder / "run")

    printed = together(2, start, folder / "out")
    rows = [[int(line) for line in (folder / f"rows-{rank}").read_text().split()] for rank in range(2)]
    return folder / "run", printed, rows


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def _figures(run: Path) -> list[tuple]:
    keys = ("loss", "gradient_norm", "validation_bits_per_byte", "validation_tokens")
    return [(line["step"], *(line[key] for key in keys if key in line)) for line in read_metrics(run / "metrics.jsonl")]


def _cut(run: Path, step: int) -> None:
    for later in checkpoint_steps(run / "checkpoints"):
        if later > step:
            shutil.rmtree(checkpoint_folder(run / "checkpoints", later))
    shutil.rmtree(run / "export")


def _close(one: Path, other: Path) -> bool:
    ours, theirs = _figures(one), _figures(other)
    same = len(ours) == len(theirs) and all(a == pytest.approx(b, rel=1e-5) for a, b in zip(ours, theirs, strict=True))
    mine, yours = (load_file(run / "export" / "model.safetensors") for run in (one, other))
    return same and all(torch.allclose(mine[name], yours[name], rtol=1e-3, atol=1e-4) for name in mine)


def test_train_with_two_processes_gives_the_figures_and_the_model_of_one(alone, shared):
    run, printed, _ = shared
    assert [text.splitlines()[-1] for text in printed] == ["done", "done"]
    assert _close(alone, run)


def test_train_only_the_first_process_prints(shared):
    first, second = shared[1]
    assert "step 6/6" in first and "2 processes" in first and second == "done\n"


def test_train_shares_the_rows_out_without_overlap(shared):
    first, second = shared[2]
    assert not set(first) & set(second) and sorted(first + second) == list(range(6 * 8))


def test_train_with_two_processes_writes_shards_that_a_manifest_covers(shared):
    folder = checkpoint_folder(shared[0] / "checkpoints", 6)
    names = {path.name for path in folder.iterdir()}
    assert sum(name.startswith("shard-") for name in names) == 2 and "model.safetensors" not in names
    assert verify_checkpoint(folder)["files"].keys() == names - {"manifest.json"}
    versions = verify_checkpoint(folder)["versions"]
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0] and len(versions["code"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["rows", "dropout", "tokens"])
def test_train_with_two_processes_is_not_the_same_when_they_share_wrongly(alone, tiny, tmp_path, broken):
    def start():
        if broken == "rows":
            batch = PackedDataset.batch
            PackedDataset.batch = lambda self, first, count: batch(self, first - first % 8, count)
        elif broken == "dropout":
            loop.seed_step = lambda seed, step, row: seed_step(seed, step)
        else:
            Group.sum = lambda self, *values: list(values)
        module.evaluate = lambda *_, **__: {"validation_bits_per_byte": 0.0, "validation_nats_per_token": 0.0}
        module.save_checkpoint = module._finish = lambda *_, **__: {}
        train(tiny(SHARED | {"training.steps": 1}), tmp_path / "run")

    together(2, start, tmp_path / "out")
    [loss] = _losses(tmp_path / "run")
    assert loss != pytest.approx(_losses(alone)[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (2, 4), (1, 2)])
def test_train_resumes_with_any_number_of_processes(alone, shared, tiny, tmp_path, before, after):
    run = shutil.copytree(alone if before == 1 else shared[0], tmp_path / "run")
    _cut(run, 4)
    printed = together(after, lambda: train(tiny(SHARED), run), tmp_path / "out")
    assert all(text.endswith("done\n") for text in printed), printed
    assert "after step 4 of 6" in printed[0]
    assert _close(alone, run)
    if before == after:  # bit for bit
        assert _figures(run) == _figures(shared[0])
        ours, theirs = (checkpoint_folder(r / "checkpoints", 6).glob("*.safetensors") for r in (run, shared[0]))
        for mine, yours in zip(map(load_file, sorted(ours)), map(load_file, sorted(theirs)), strict=True):
            assert mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


@pytest.mark.slow
def test_train_with_two_processes_in_bfloat16_checkpointed_and_tied(tiny, tmp_path):
    changes = {"training.precision": "bfloat16", "training.activation_checkpointing": True}
    recipe = tiny(SHARED | changes | {"model.tie_word_embeddings": True, "training.steps": 1})
    assert train(recipe, tmp_path / "one").finished
    printed = together(2, lambda: train(recipe, tmp_path / "two"), tmp_path / "out")
    assert printed[0].endswith("done\n"), printed
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), rel=2e-3)
    assert "lm_head.weight" not in load_file(tmp_path / "two" / "export" / "model.safetensors")


def test_train_says_once_what_several_processes_cannot_do(tiny, tmp_path):
    recipe = tiny(SHARED | {"training.batch_size": 5})
    first, second = together(2, lambda: train(recipe, tmp_path / "run"), tmp_path / "out")
    assert first.startswith("ValueError: training.batch_size is 5, which 2 processes can't share equally")
    assert second.startswith("Told: ") and not (tmp_path / "run").exists()
    with module._locked(tmp_path / "run"):
        first, second = together(2, lambda: train(tiny(SHARED), tmp_path / "run"), tmp_path / "out")
    assert "is in use by another process" in first and second.startswith("Told: ")


@pytest.mark.slow
def test_train_with_a_full_disk_on_one_process_keeps_what_was_there(tiny, tmp_path):
    def start():
        sync = checkpoint.sync

        def full(path):
            if path.name.startswith("shard-00002") and "00000004" in str(path):
                raise OSError(28, "No space left on device", str(path))
            sync(path)

        checkpoint.sync = full
        train(tiny(SHARED), tmp_path / "run")

    first, second = together(2, start, tmp_path / "out")
    assert re.search(r"OSError: .*No space left on device: '.*shard-00002", first) and "Told: " in second
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    verify_checkpoint(checkpoints / "step-00000002")


@pytest.mark.slow
def test_save_checkpoint_refuses_a_folder_that_not_all_processes_see(tiny, tmp_path):
    def start():
        write = checkpoint._write_shard

        def elsewhere(folder, tensors):
            write(folder, tensors)
            if os.environ["RANK"] == "1":  # as if it were on a disk of its own
                fingerprint = checkpoint._fingerprint
                checkpoint._fingerprint = lambda path: [fingerprint(path), path.unlink()][0]

        checkpoint._write_shard = elsewhere
        train(tiny(SHARED | {"training.steps": 1}), tmp_path / "run")

    first, _ = together(2, start, tmp_path / "out")
    assert "shard-00002-model-00001-of-00001.safetensors is not there: the processes do not share" in first
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["missing", "flipped bit", "foreign"])
def test_newest_checkpoint_passes_over_damaged_shards(shared, tmp_path, damage):
    run = shutil.copytree(shared[0], tmp_path / "run")
    path = next(checkpoint_folder(run / "checkpoints", 6).glob("shard-00002*"))
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        shutil.copy(path, path.with_name("shard-00003-model-00001-of-00001.safetensors"))
    else:
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
    folder, passed_over = checkpoint.newest_checkpoint(run / "checkpoints")
    assert folder.name == "step-00000004" and "shard-0000" in passed_over[path.parent]


class _Trap:
    def __reduce__(self):
        return os.system, (f"touch {_Trap.mark}",)


def test_load_checkpoint_never_opens_a_pickle(shared, tiny, tmp_path):
    run = shutil.copytree(shared[0], tmp_path / "run")
    _Trap.mark = tmp_path / "opened"
    (checkpoint_folder(run / "checkpoints", 6) / ".metadata").write_bytes(pickle.dumps(_Trap()))
    shutil.rmtree(run / "export")
    assert train(tiny(SHARED), run).finished and (run / "export").is_dir()
    assert not _Trap.mark.exists()


def test_load_checkpoint_refuses_shards_with_a_gap(shared, tiny, tmp_path):
    from mosaics.training.setup import build_config, build_model

    folder = shutil.copytree(checkpoint_folder(shared[0] / "checkpoints", 6), tmp_path / "step-00000006")
    next(folder.glob("shard-00001*")).unlink()
    config = build_config(tiny(SHARED), PackedDataset(tiny().data.prepared, "train", 48).prepared.tokenizer())
    with pytest.raises(DamagedCheckpoint, match="do not make a whole|lacks tensor"):
        checkpoint.load_checkpoint(folder, build_model(config))


@pytest.mark.slow
def test_torchrun_ends_soon_when_a_process_dies(tiny, tmp_path):
    changes = {"training.steps": 100000, "checkpoint.every": 5, "validation.every": 100000}
    recipe, run = tiny(SHARED | changes), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mosaics", "--", "train", str(tmp_path / "recipe.yaml"), "--run", str(run)]
    source = os.pathsep.join([str(Path(module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": source}
    )
    try:
        end = time.monotonic() + 100
        while not checkpoint_steps(run / "checkpoints"):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        [second] = [pid for pid in workers if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
        began = time.monotonic()
        os.kill(int(second), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert output.count("error: another process of this run has ended or can't be reached") == 1, output
    assert "SIGKILL" in output  # in torchrun's own report
    step = checkpoint_steps(run / "checkpoints")[-1]
    verify_checkpoint(checkpoint_folder(run / "checkpoints", step))


@pytest.mark.slow
def test_train_from_a_model_with_two_processes_gives_the_figures_of_one(alone, tiny, tmp_path):
    changes = {"training.init_from": str(alone / "export"), "model": {"preset": None}, "training.steps": 2}
    recipe = tiny(SHARED | changes)
    assert train(recipe, tmp_path / "one").finished
    printed = together(2, lambda: train(recipe, tmp_path / "two"), tmp_path / "out")
    assert printed[0].endswith("done\n") and printed[0].count("begins with the weights of") == 1, printed
    assert _close(tmp_path / "one", tmp_path / "two")
    verify_checkpoint(checkpoint_folder(tmp_path / "two" / "checkpoints", 0))
    run = tmp_path / "two"  # and goes on from the checkpoint of step 0 with another number
    shutil.rmtree(checkpoint_folder(run / "checkpoints", 2))
    shutil.rmtree(run / "export")
    assert train(recipe, run).finished and _close(tmp_path / "one", run)


@pytest.mark.slow
def test_train_extended_with_two_processes_gives_the_figures_of_one(alone, shared, tmp_path):
    runs = [shutil.copytree(run, tmp_path / name) for run, name in ((alone, "one"), (shared[0], "two"))]
    extension = Extension(steps=3, schedule="rewarm")
    assert train(None, runs[0], extend=extension).finished
    printed = together(2, lambda: train(None, runs[1], extend=extension), tmp_path / "out")
    assert all(text.endswith("done\n") for text in printed) and "extended to step 9" in printed[0], printed
    assert len(_losses(runs[1])) == 9 and _close(*runs)


@pytest.mark.slow
def test_train_with_two_processes_writes_samples_and_tells_a_tracker(tiny, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr("mosaics.training.validation.WRITTEN", 12)
    changes = {"validation.samples": 2, "training.steps": 2, "logging.tracker": "tensorboard"}
    printed = together(2, lambda: train(tiny(SHARED | changes), tmp_path / "run"), tmp_path / "out")
    assert all(text.endswith("done\n") for text in printed), printed
    assert train(tiny(SHARED | changes), tmp_path / "one").finished
    ours, theirs = (
        [line["samples"] for line in read_metrics(run / "metrics.jsonl") if "samples" in line]
        for run in (tmp_path / "run", tmp_path / "one")
    )
    assert len(ours) == 2 and ours[0] == theirs[0] and any((tmp_path / "run" / "tensorboard").rglob("events.*"))
