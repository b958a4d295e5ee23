"""Recipes: what is read, what is refused and how it is said."""

import pytest
import yaml

from mosaics.training.plan import plan
from mosaics.training.recipe import (
    Recipe,
    differences,
    find_recipe,
    load_recipe,
    make_recipe,
    parse_overrides,
    recipe_keys,
    shipped_recipes,
)
from mosaics.training.setup import build_config

RECIPES = [
    "quickstart",
    "novels-cpu",
    "memory-mosaics-v2-small",
    "memory-mosaics-v2-large",
    "memory-mosaics-v2-32k",
    "memory-mosaics-v1-babistories",
    "memory-mosaics-v1-stories-cpu",
]
V2_TWIN = {"model.preset": "memory-mosaics-v2-tiny", "model.intermediate_size": 507}
TRANSFORMER_TWIN = {"model.preset": "transformer-tiny", "model.intermediate_size": 683}


@pytest.mark.parametrize("name", RECIPES)
def test_load_recipe_reads_every_shipped_recipe(name):
    assert name in shipped_recipes()
    assert isinstance(load_recipe(name), Recipe)


@pytest.mark.parametrize(("size", "rate", "tokens"), [("small", 3e-4, 200e9), ("large", 1e-3, 1e12)])
def test_load_recipe_paper_recipes_are_appendix_c(size, rate, tokens):
    recipe = load_recipe(f"memory-mosaics-v2-{size}")
    training = recipe.training
    assert (training.batch_size, training.context_length, training.warmup_steps) == (1024, 4096, 2000)
    assert (training.betas, training.weight_decay, training.gradient_clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (training.learning_rate, training.final_learning_rate_ratio) == (rate, 0.01)
    assert recipe.data.long_documents == "truncate"
    assert 0 <= training.steps * recipe.tokens_per_step - tokens < recipe.tokens_per_step


def test_load_recipe_of_the_longer_context_has_as_many_tokens_in_a_step():
    recipe, before = load_recipe("memory-mosaics-v2-32k"), load_recipe("memory-mosaics-v2-small")
    assert recipe.training.context_length == 8 * before.training.context_length == 32768
    assert recipe.tokens_per_step == before.tokens_per_step and recipe.data.long_documents == "truncate"
    assert recipe.model.preset is None and recipe.model.overrides() == {}


def test_load_recipe_of_babistories_is_as_published():
    recipe = load_recipe("memory-mosaics-v1-babistories")
    training, planned = recipe.training, plan(recipe)
    assert (training.steps, training.batch_size, training.context_length, training.warmup_steps) == (
        80000,
        512,
        512,
        2000,
    )
    assert training.learning_rate * training.final_learning_rate_ratio == pytest.approx(1e-4)
    assert (training.learning_rate, training.betas, training.weight_decay) == (5e-3, (0.9, 0.95), 0.1)
    assert planned["micro_batches"] == 64 and planned["parameters"] == 123_588_336
    config = build_config(recipe)
    assert (config.dropout, config.attention_dropout, config.embedding_dropout) == (0.05, 0.05, 0.0)


@pytest.mark.parametrize("twin", [V2_TWIN, TRANSFORMER_TWIN])
def test_load_recipe_of_stories_has_twins_of_its_size(twin):
    ours, other = (plan(load_recipe("memory-mosaics-v1-stories-cpu", change)) for change in ({}, twin))
    assert ours["tokens"] == other["tokens"] and abs(other["parameters"] / ours["parameters"] - 1) < 1e-3
    assert abs(other["training_flops"] / ours["training_flops"] - 1) < 0.03


def test_load_recipe_resolved_yaml_reads_back_the_same(tmp_path):
    recipe = load_recipe("quickstart", {"training.learning_rate": 1.25e-3, "model.hidden_size": 64})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert not differences(load_recipe(path), recipe)
    written = yaml.safe_load(path.read_text())
    sections = {name for name in recipe_keys() if "." not in name}
    assert written.keys() == sections and written["training"]["eps"] == 1e-8


def test_load_recipe_overrides_replace_and_make_sections(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("training: {steps: 3}\nlogging:\n")
    recipe = load_recipe(path, {"training.steps": 5, "logging.every": 2, "model.window": 9, "seed": 4})
    assert (recipe.training.steps, recipe.logging.every, recipe.seed) == (5, 2, 4)
    assert recipe.model.overrides() == {"window": 9}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {step: 3}", "unknown key training.step (did you mean training.steps?)"),
        ("trainig: {steps: 3}", "unknown key trainig (did you mean training?)"),
        ("steps: 3", "unknown key steps (did you mean training.steps?)"),
        ("training: {frequency: 3}", "training has steps, context_length"),
        ("training: {steps: 0}", "training.steps = 0"),
        ("training: {learning_rate: .nan}", "training.learning_rate = nan"),
        ("training: {learning_rate: fast}", "training.learning_rate = 'fast'"),
        ("training: {steps: 0, batch_size: 0}", "(and 1 more)"),
        ("data: {long_documents: cut}", "'split' or 'truncate'"),
        ("checkpoint: {keep: 1}", "checkpoint.keep = 1"),
        ("training: 7", "training = 7"),
        ("- 1\n- 2", "a recipe is a mapping of sections"),
        ("training: {steps: [", "not valid YAML"),
        ("training: *unknown", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_load_recipe_refuses_and_says_why(tmp_path, text, said):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    assert said in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_load_recipe_refuses_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"seed: 1\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_recipe(path)


def test_find_recipe_names_the_nearest():
    with pytest.raises(ValueError, match=r"no recipe novels-gpu \(did you mean novels-cpu\?\)"):
        find_recipe("novels-gpu")


def test_parse_overrides_reads_both_forms_and_yaml_values():
    words = "--training.steps 100 --training.learning_rate=1e-3 rest --model.train_delay [8,32] --data.tokenizer null"
    overrides, rest = parse_overrides(
        [*words.split(), "--data.corpus", "*.txt", "--logging.tensorboard=true", "--seed", "3"]
    )
    assert rest == ["rest"]
    assert overrides.pop("training.learning_rate") in (
        1e-3,
        "1e-3",
    )  # YAML 1.1 reads it as text, the recipe as a number
    assert overrides == {
        "training.steps": 100,
        "model.train_delay": [8, 32],
        "data.tokenizer": None,
        "data.corpus": "*.txt",
        "logging.tensorboard": True,
        "seed": 3,
    }
    assert make_recipe({"training": {"learning_rate": "1e-3"}}).training.learning_rate == 1e-3


def test_parse_overrides_takes_negative_numbers():
    assert parse_overrides(["--training.steps", "-3"])[0] == {"training.steps": -3}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.steps"], "--training.steps needs a value"),
        (["--training.steps", "--seed", "1"], "--training.steps needs a value"),
        (["--trainig.steps", "3"], "unknown option --trainig.steps (did you mean --training.steps?)"),
        (["--steps", "3"], "unknown option --steps (did you mean --training.steps?)"),
        (["--dryrun"], "unknown option --dryrun (did you mean --dry-run?)"),
        (["-x"], "unknown option -x"),
    ],
)
def test_parse_overrides_refuses_and_says_why(words, said):
    with pytest.raises(ValueError) as error:
        parse_overrides(words, ["--dry-run", "--run"])
    assert said in str(error.value)


def test_differences_names_every_key_that_differs():
    old, new = make_recipe({"model": {"window": 4}}), make_recipe({"training": {"steps": 7}})
    assert differences(old, new) == [
        "model.window is 4 there and 'unset' here",
        "training.steps is 1000 there and 7 here",
    ]


@pytest.mark.parametrize("value", ["1" * 5000, "2001-99-99", "[" * 5000])
def test_load_recipe_names_the_file_of_a_value_that_cannot_be_read(tmp_path, value):
    path = tmp_path / "mine.yaml"
    path.write_text(f"training: {{steps: {value}}}")
    with pytest.raises(ValueError, match=r"mine\.yaml.*not valid YAML"):
        load_recipe(path)
    with pytest.raises(ValueError, match=r"training\.steps"):
        load_recipe("quickstart", parse_overrides(["--training.steps", value])[0])


def test_load_recipe_refuses_yaml_that_unfolds_without_end(tmp_path):
    path = tmp_path / "mine.yaml"
    lists = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path.write_text("\n".join(["a0: &a0 [1]", *lists, "data: {corpus: *a11}"]))
    with pytest.raises(ValueError, match=r"mine\.yaml holds more than 10000 values"):
        load_recipe(path)


def test_parse_overrides_refuses_what_would_be_dropped_silently():
    with pytest.raises(ValueError, match="--data.corpus is given twice"):
        parse_overrides(["--data.corpus", "a", "--data.corpus=b"])
    with pytest.raises(ValueError, match="--data.vocabulary_size says nothing beside --data.prepared"):
        parse_overrides(["--data.prepared", "data/a", "--data.vocabulary_size", "300"])
    assert parse_overrides(["--data.prepared", "null", "--data.vocabulary_size", "300"])[0]
