"""`mosaics quickstart`, with a run small enough for a test."""

import pytest

from .conftest import OPTIONS


@pytest.mark.slow
def test_quickstart_goes_from_text_to_sample_and_again(mosaics, refused, text_folder, tmp_path):
    command = [
        "quickstart",
        "--corpus",
        text_folder / "*.txt",
        "--run",
        tmp_path / "run",
        "--prompt",
        "import ",
        "--jobs",
        1,
        *OPTIONS,
    ]
    code, output, error = mosaics(*command)
    assert code == 0, error
    assert "bytes/token" in output and "validation bits per byte, steps 0 to 4: " in output
    assert "loaded with AutoModelForCausalLM" in output and "import " in output.split("AutoModelForCausalLM")[1]
    first, *_, last = (float(bits) for bits in output.split("steps 0 to 4: ")[1].split(" (")[0].split(" -> "))
    assert last < first
    assert (tmp_path / "run" / "curves.png").is_file()
    comparison = output.split("AutoModelForCausalLM")[1]
    for question in ("Loss on held-out text at 1, 2, 4, 8 times", "facts of the context at 48, 96, 192, 384 tokens"):
        lines = comparison.split(question)[1].splitlines()[1:3]
        assert [line.split()[0] for line in lines] == ["memory-mosaics-v2", "transformer"]
        assert all(len(line.split()) == 5 for line in lines)
    assert "Text: 4 steps of 4 x 48 tokens, one training each with seed 0." in comparison
    assert all(f"  ({name})" in comparison for name in ("bigram", "trigram", "chance", "last words"))
    questions = comparison.split("three of the questions, and what both said:\n")[1].splitlines()
    assert [line.split(":")[0] for line in questions[::3]] == [f"at {n} tokens" for n in (48, 192, 384)]
    assert all(line.startswith(name) for line, name in zip(questions[1::3], ["  memory-mosaics-v2"] * 3, strict=True))
    assert all(" … " in line and " → " in line for line in questions[::3])
    assert (tmp_path / "run" / "comparison" / "report.html").is_file()
    code, again, _ = mosaics(*command)
    assert code == 0 and "is finished" in again
    assert again.split("AutoModelForCausalLM")[1] == output.split("AutoModelForCausalLM")[1]
    assert "another recipe" in refused(*command, "--training.steps", 5)


def test_quickstart_compares_only_if_wanted(mosaics, small_run, text_folder):
    """The run of the fixture is the quickstart's, so nothing is trained again."""
    command = ["quickstart", "--corpus", text_folder, "--run", small_run, *OPTIONS, "--no-compare"]
    code, output, error = mosaics(*command)
    assert code == 0 and "is finished" in output, error
    assert not (small_run / "comparison").exists()


def test_quickstart_refuses_words(refused):
    assert "options only" in refused("quickstart", "books.txt")
