"""`mosaics train` and `mosaics export`."""

import json
import shutil

import pytest

from .conftest import OPTIONS


def test_train_prints_progress_and_falls(small_run, mosaics, text_folder):
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    command = ["train", "quickstart", "--run", small_run, "--data.corpus", text_folder, *OPTIONS]
    code, output, _ = mosaics(*command)
    assert (code, output) == (0, f"{small_run} is finished: step 4 of 4\n")


def test_train_takes_the_recipe_anywhere_and_a_file(mosaics, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("training: {steps: 7}\n")
    for words in (
        ["--training.batch_size", "2", recipe, "--dry-run"],
        [recipe, "--dry-run", "--training.batch_size=2"],
    ):
        code, output, _ = mosaics("train", *words)
        assert code == 0 and "2 x 512 tokens" in output and "7,168" in output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("memory-mosaics-v2-small", ["47,684", "4,194,304", "200 B", "2,038,535,936", "35.11 GiB"]),
        ("memory-mosaics-v2-large", ["238,419", "4,194,304", "1 T", "9,926,096,896", "155.02 GiB"]),
    ],
)
def test_train_dry_run_prints_the_plan_of_the_paper(mosaics, name, numbers):
    code, output, _ = mosaics("train", name, "--dry-run")
    assert code == 0 and "Assumed:" in output
    for number in numbers:
        assert number in output


@pytest.mark.parametrize("name", ["quickstart", "novels-cpu"])
def test_train_dry_run_plans_every_other_recipe(mosaics, name):
    assert mosaics("train", name, "--dry-run")[0] == 0


def test_train_refuses_in_one_sentence_and_writes_nothing(refused, tmp_path, small_run):
    run = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    for words, said in [
        ([], "name the run's folder"),
        (["--run", run, "--training.context_length", 32], "not longer than the delay of long_term"),
        (["--run", run, "--training.stesp", 3], "did you mean training.steps?"),
        (["--run", run, "--model.preset", "memory-mosaics-v2-tini"], "memory-mosaics-v2-tiny"),
        (["--run", run, "--data.corpus", tmp_path / "missing.txt"], "missing.txt"),
        (["--run", run, "--data.corpus", tmp_path / "empty"], "empty"),
        (["--run", run, "--data.corpus", tmp_path / "bad.txt"], "bad.txt"),
        (["--run", run, "--data.prepared", tmp_path / "nothing"], "nothing"),
        (["--run", run, "--resume"], "no run"),
        (["--run", small_run], "another recipe"),
        (["quickstart", "--run", run], "one recipe"),
    ]:
        assert said in refused("train", "quickstart", *words)
    assert not (run / "recipe.yaml").exists() and not (run / "data").exists()


def test_export_makes_a_model_and_refuses_to_overwrite(mosaics, refused, small_run, tmp_path):
    code, output, _ = mosaics("export", small_run, "--output", tmp_path / "model", "--step", 2)
    assert (code, output) == (0, f"exported to {tmp_path / 'model'}\n")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }
    assert "exists already" in refused("export", small_run, "--output", tmp_path / "model")
    assert "has no checkpoint of step 3; it has 2, 4" in refused(
        "export", small_run, "--output", tmp_path / "x", "--step", 3
    )
    assert "no run folder" in refused("export", tmp_path, "--output", tmp_path / "x")


def test_train_goes_on_without_a_recipe_and_extends(mosaics, refused, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    code, output, _ = mosaics("train", "--run", run)
    assert (code, output) == (0, f"{run} is finished: step 4 of 4\n")
    for words, said in [
        (["--extend", 0], "'--extend'"),
        (["--extend", -2], "'--extend'"),
        (["--extend", "many"], "'--extend'"),
        (["--extend", 2, "--schedule", "cosine"], "'constant', 'rewarm'"),
        (["--extend", 2, "--schedule", "rewarm"], "ends before it has warmed up again"),
        (["quickstart", "--extend", 2], "--extend goes on with a finished run by its own recipe"),
        (["--extend", 2, "--training.learning_rate", 1e-3], "by its own recipe"),
        (["--extend", 2, "--dry-run"], "leave out --extend"),
        (["--training.steps", 6], "was given none"),
    ]:
        assert said in refused("train", "--run", run, *words)
    assert "by its own recipe" in refused("train", "--run", tmp_path / "new", "--extend", 2)
    assert "by its own recipe" in refused("train", "--extend", 2)
    assert "was given none" in refused("train", "--run", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    code, output, _ = mosaics("train", "--run", run, "--extend", 2)
    assert code == 0 and "extended to step 6 by 2 steps (constant)" in output and "step 6/6" in output
    assert "Plan of" in mosaics("train", "--run", run, "--dry-run")[1]
