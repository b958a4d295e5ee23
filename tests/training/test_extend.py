"""Going on with a finished run."""

import json
import shutil
import signal

import pytest
import yaml

from mosaics.training import run_folder as module
from mosaics.training import train
from mosaics.training.checkpoint import checkpoint_folder, checkpoint_steps, read_json
from mosaics.training.metrics import read_metrics
from mosaics.training.optimizer import learning_rate
from mosaics.training.recipe import Extension, TrainingSection, make_recipe, open_recipe

from .test_run_folder import _losses, _process, _rewrite_recipe_digest, _same, _wait_for_steps

FIRST, SECOND = Extension(steps=4), Extension(steps=4, schedule="rewarm")


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory):
    """The finished run, extended twice and never stopped. Copy it before changing it."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("extended") / "run")
    for extension in (FIRST, SECOND):
        assert train(None, run, extend=extension).finished
    return run


def _files(run) -> dict:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_train_extended_twice_equals_a_run_that_had_it_in_its_recipe_bit_for_bit(extended, tiny, tmp_path):
    assert checkpoint_steps(extended / "checkpoints")[-1] == 14
    recipe = tiny({"training.extensions": [{"steps": 4}, {"steps": 4, "schedule": "rewarm"}]})
    assert open_recipe(extended) == recipe
    assert train(recipe, tmp_path / "run").finished
    assert _same(extended, tmp_path / "run", 14) and _losses(extended) == _losses(tmp_path / "run")


@pytest.mark.slow
def test_train_extended_twice_with_kills_between_equals_one_without_bit_for_bit(extended, finished, tiny, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for extension, lines in ((FIRST, 11), (SECOND, 17)):
        words = ["--extend", str(extension.steps), "--schedule", extension.schedule]
        for until in (lines, None):  # the same command goes on
            process = _process(None, run, words)
            if until is not None:
                _wait_for_steps(process, run, until)  # two more than there were
                process.kill()
            output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "that was begun goes on" in output, output
    assert _same(extended, run, 14) and _losses(run) == _losses(extended)
    assert open_recipe(run) == open_recipe(extended)


def test_train_extended_keeps_the_old_export_under_its_step_until_the_new_one_is_whole(run, monkeypatch):
    steps, whole = [], _files(run / "export")

    def stop(*given):
        if given[4] == 8:
            signal.raise_signal(signal.SIGTERM)
        steps.append(given[4])
        return step(*given)

    step = module.optimisation_step
    monkeypatch.setattr(module, "optimisation_step", stop)
    assert not train(None, run, extend=FIRST).finished and steps == [7, 8]
    old = run / "export-step-00000006"
    assert not (run / "export").exists() and {p.name: t for p, t in _files(old).items()} == {
        p.name: t for p, t in whole.items()
    }

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space"):
        broken.setattr(module, "export_run", full)
        train(None, run)
    assert old.is_dir() and not (run / "export").exists()
    assert train(None, run).finished
    assert not old.exists() and "10 steps" in (run / "export" / "README.md").read_text()
    assert "extended by 4 steps (constant)" in (run / "export" / "README.md").read_text()
    old.mkdir()  # killed before it was gone
    assert train(None, run).finished and not old.exists()


def test_train_extended_draws_the_curves_anew(run):
    before = (run / "curves.png").read_bytes()
    assert train(None, run, extend=FIRST).finished and (run / "curves.png").read_bytes() != before


def test_train_extended_belongs_to_its_history(run):
    assert train(None, run, extend=FIRST).finished
    before, after = module._recipe_digests(run)
    found = [read_json(checkpoint_folder(run / "checkpoints", step) / "manifest.json")["recipe"] for step in (6, 8, 10)]
    assert found == [before, after, after] and before != after
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["training"]["extensions"][0]["schedule"] = "rewarm"  # by hand
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    shutil.rmtree(checkpoint_folder(run / "checkpoints", 6))
    with pytest.raises(ValueError, match="written with another recipe"):
        train(None, run)


def test_train_the_recipe_that_an_extended_run_began_with_says_that_it_is_finished(extended, tiny, capsys):
    before = _files(extended)
    assert train(tiny(), extended).step == 14
    assert "is finished: step 14 of 14" in capsys.readouterr().out and _files(extended) == before


def test_train_extends_a_run_of_before_there_were_extensions(run, tiny):
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    del values["training"]["extensions"], values["training"]["init_from"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    _rewrite_recipe_digest(run, module._recipe_digests(run)[-1])
    assert train(tiny(), run).step == 6
    assert train(None, run, extend=FIRST).step == 10 and train(None, run, extend=SECOND).step == 14


def test_train_refuses_to_extend_and_changes_nothing(run, tiny, tmp_path):
    with pytest.raises(
        ValueError, match="training.steps is 6 there and 9 here; .* mosaics train --run .* --extend STEPS"
    ):
        train(tiny({"training.steps": 9}), run)
    with pytest.raises(ValueError, match="training.extensions is .* --extend STEPS"):
        train(tiny({"training.extensions": [{"steps": 3}]}), run)
    with pytest.raises(ValueError, match="is no run folder"):
        train(None, tmp_path / "nothing", extend=FIRST)
    with pytest.raises(ValueError, match="there is no run in .* to go on with"):
        train(tiny(), tmp_path / "nothing", extend=FIRST)
    before = _files(run)
    with pytest.raises(ValueError, match=r"an extension of 2 steps ends before it has warmed up again, which takes 2"):
        train(None, run, extend=Extension(steps=2, schedule="rewarm"))
    assert _files(run) == before and not (tmp_path / "nothing").exists()
    shutil.rmtree(run / "export")
    with pytest.raises(ValueError, match=r"is not finished \(step 6 of 6\); mosaics train --run .* goes on to the end"):
        train(None, run, extend=FIRST)
    assert open_recipe(run) == tiny()


def test_train_refuses_another_extension_before_the_last_is_done(run, monkeypatch):
    def killed(*given):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(module, "optimisation_step", killed)
        train(None, run, extend=FIRST)
    with pytest.raises(ValueError, match=r"is not finished \(step 6 of 10\)"):
        train(None, run, extend=SECOND)
    assert train(None, run, extend=FIRST).step == 10


def test_learning_rate_of_extensions_stays_or_rises_again():
    training = TrainingSection(steps=10, warmup_steps=2, learning_rate=2.0, final_learning_rate_ratio=0.1)
    own = [learning_rate(step, training) for step in range(1, 11)]
    longer = training.model_copy(update={"extensions": (Extension(steps=3), Extension(steps=6, schedule="rewarm"))})
    rates = [learning_rate(step, longer) for step in range(1, 20)]
    assert rates[:10] == own and rates[10:13] == [own[-1]] * 3 == pytest.approx([0.2] * 3)
    assert rates[13:15] == pytest.approx([1.1, 2.0])  # from 0.2 up
    assert rates[15:] == pytest.approx(
        [
            learning_rate(s, TrainingSection(steps=6, warmup_steps=2, learning_rate=2.0, final_learning_rate_ratio=0.1))
            for s in (3, 4, 5, 6)
        ]
    )
    assert longer.ends == [10, 13, 19]


def test_make_recipe_refuses_an_extension_that_never_warms_up():
    extensions = [{"steps": 100, "schedule": "rewarm"}]
    with pytest.raises(ValueError, match="^recipe: an extension of 100 steps"):
        make_recipe({"training": {"extensions": extensions}})


def test_train_extended_lines_of_the_log_go_on(extended):
    lines = read_metrics(extended / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 15))
    assert [line["step"] for line in lines if "validation_bits_per_byte" in line] == [0, 3, 6, 9, 10, 12, 14]
    assert json.loads((checkpoint_folder(extended / "checkpoints", 14) / "state.json").read_text())["step"] == 14
