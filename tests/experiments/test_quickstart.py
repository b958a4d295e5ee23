"""The comparison of the quickstart takes its run as one of the models."""

import pytest
from tests.experiments.conftest import MICRO

from mosaics.experiments import trainings
from mosaics.experiments.quickstart import compare_run, in_words
from mosaics.experiments.trainings import Training
from mosaics.training import load_recipe, train

OTHER = {"data.long_documents": "truncate", "model.vocab_size": 700, "model.max_position_embeddings": 80}


def make(texts, changes):
    more = {"data.corpus": str(texts), "logging.every": 1, "validation.every": 3}
    return load_recipe("quickstart", MICRO | more | changes)


@pytest.fixture(scope="module")
def recipe(texts):
    return make(texts, {})


@pytest.mark.parametrize("asked", [{}, OTHER], ids=["", "other"])
@pytest.mark.slow
def test_compare_run_takes_the_run_for_what_it_would_train(texts, asked, tmp_path, monkeypatch):
    recipe = make(texts, asked)
    train(recipe, tmp_path / "run")
    changes = {key: value for key, value in (MICRO | asked).items() if not key.startswith("data.")}
    results = compare_run(recipe, tmp_path / "run", changes)
    adopted = next(m for m in results["models"] if (m["setting"], m["arrangement"]) == ("text", "memory-mosaics-v2"))

    text = next(s for s in results["study"]["settings"] if s["name"] == "text")
    setting = trainings.Setting.model_validate(text)
    first = trainings.Arrangement.model_validate(results["study"]["arrangements"][0])
    trained = trainings.train(Training(first, first, setting, recipe.seed), tmp_path / "another-cache")
    for key in ("curve", "held_out_loss", "parameters", "tokens", "steps", "hardware"):
        assert adopted[key] == trained[key], key

    def refuse(*arguments, **keywords):
        raise AssertionError("trained again")

    monkeypatch.setattr(trainings, "_train", refuse)
    assert compare_run(recipe, tmp_path / "run", changes)["rows"] == results["rows"]
    assert "memory-mosaics-v2" in in_words(results) and "transformer" in in_words(results)


def test_adopt_refuses_a_run_of_another_recipe(recipe, tmp_path):
    train(recipe, tmp_path / "run")
    first = trainings.Arrangement(label="v2", preset=recipe.model.preset)
    training = recipe.training.model_dump(mode="json") | {"steps": 5}
    data = trainings.Data(corpus=str(tmp_path / "run" / "data"))
    setting = trainings.Setting(name="text", data=data, model=recipe.model.overrides(), training=training)
    with pytest.raises(AssertionError, match="other recipe"):
        trainings.adopt(Training(first, first, setting, recipe.seed), tmp_path / "run", tmp_path / "cache")
