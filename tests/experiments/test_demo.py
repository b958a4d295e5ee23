"""The model that comes with the package: small, right about what it is shown, and described by its own numbers."""

import json
from pathlib import Path

import pytest

from mosaics.data.worlds import World, prose
from mosaics.evaluation import Scorer
from mosaics.evaluation.results import wilson
from mosaics.experiments.demo import EVALUATION, ProseQuestions, ask, card
from mosaics.models.loading import DEMO, load_exported, named_folder
from mosaics.training.sources import find_source

FOLDER = named_folder(DEMO)
FACTS = "The pet of Balena Duskman is raven. For Tamosh Brinley the pet is owl. The old river waits near the house."


@pytest.fixture(scope="module")
def demo():
    return load_exported(DEMO)


def test_demo_is_small_and_kept_in_bfloat16(demo):
    model, _ = demo
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4e6
    assert {parameter.dtype.itemsize for parameter in model.parameters()} == {4}
    assert (FOLDER / "model.safetensors").stat().st_size < 2.1 * sum(p.numel() for p in model.parameters())


def test_generate_demo_answers_what_it_was_told(capfd, tmp_path, monkeypatch):
    from mosaics.cli import main

    monkeypatch.chdir(tmp_path)
    for name, pet in (("Balena Duskman", "raven"), ("Tamosh Brinley", "owl")):
        prompt = f"{FACTS} What is the pet of {name}?"
        assert main(["generate", "demo", "--temperature", "0", "--prompt", prompt]) == 0
        assert capfd.readouterr().out.strip() == f"{prompt} The pet of {name} is {pet}."
    (tmp_path / "demo").mkdir()  # what lies here comes first
    assert main(["generate", "demo", "--prompt", "a"]) == 2
    assert find_source("demo").place == "demo"


def test_demo_is_as_good_as_its_card_says(demo):
    """A few of the questions again, about one document of each length."""
    rows = {(r["asked"], r["words"], r["times"]): r for r in json.loads((FOLDER / EVALUATION).read_text())["rows"]}
    length = demo[0].config.max_position_embeddings
    for row in ask(Scorer(*demo), length, questions=8, words=(False,)):
        kept = rows[row["asked"], row["words"], row["times"]]
        low, high = wilson(row["right"] / row["questions"], row["questions"])
        assert 100 * low <= kept["high"] and kept["low"] <= 100 * high


def test_demo_card_is_made_of_its_numbers():
    found = json.loads((FOLDER / EVALUATION).read_text(encoding="utf-8"))
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == card(found)
    found["rows"][0]["right"] -= 1 + found["rows"][0]["right"] // 50
    assert text != card(found)


def test_readme_says_how_good_the_demo_is():
    found = json.loads((FOLDER / EVALUATION).read_text(encoding="utf-8"))
    whole = [round(row["right"]) for row in found["rows"] if row["words"] == "of the world"]
    without = [round(row["right"]) for row in found["without_long_term"]]
    assert {row["questions"] for row in found["rows"]} == {100}
    new = [round(row["right"]) for row in found["rows"] if row["words"] == "of no list"]
    words = f"answers {min(whole)} to {max(whole)} questions right, in documents of up to 8 times its training length "
    words += f"({min(new)} to {max(new)} where names and values occur nowhere in training); "
    words += f"without its long-term memory, {min(without)} to {max(without)}."
    assert words in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_prose_questions_ask_about_names_that_training_has_not():
    trained = " ".join(prose.document(World(0), number, 176) for number in range(300))
    for plainly in (False, True):
        suite = ProseQuestions(lengths=(128,), samples=24, plainly=plainly)
        examples = suite.examples(None)
        assert len({example.id for example in examples}) == 24
        for example in examples:
            name = " ".join(
                word
                for word in example.prompt.rstrip("?").split()
                if word[0].isupper() and word not in ("So", "What", "For")
            )
            assert name in example.prefix and name not in trained
            assert f" {example.references[0]}." in example.prefix
