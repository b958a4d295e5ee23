"""`mosaics generate`."""

import io
import shutil

import pytest


def test_generate_continues_the_prompt_and_repeats_by_seed(mosaics, small_run):
    words = ["generate", small_run, "--prompt", "import ", "--max-new-tokens", 12, "--temperature", 1.0]
    first, again, other = (mosaics(*words, "--seed", seed) for seed in (1, 1, 2))
    assert first[0] == 0 and first[1].startswith("import ") and len(first[1]) > 10
    assert first[2] == ""
    assert first == again and first[1] != other[1]


def test_generate_at_temperature_0_takes_the_likeliest(mosaics, small_run):
    words = ["generate", small_run / "export", "--prompt", "def ", "--max-new-tokens", 5, "--temperature", 0]
    assert mosaics(*words, "--seed", 1) == mosaics(*words, "--seed", 2)


def test_generate_takes_an_empty_prompt_and_standard_input(mosaics, small_run, monkeypatch):
    assert mosaics("generate", small_run, "--prompt", "", "--max-new-tokens", 3)[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("class A"))
    assert mosaics("generate", small_run, "--prompt", "-", "--max-new-tokens", 3)[1].startswith("class A")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", 0),
        ("--temperature", -1),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", 0),
        ("--top-p", 1.5),
        ("--top-p", "nan"),
        ("--seed", -1),
    ],
)
def test_generate_refuses_impossible_options(refused, small_run, option, value):
    assert option in refused("generate", small_run, "--prompt", "x", option, value)


def test_generate_refuses_what_is_no_model(refused, small_run, tmp_path):
    assert "there is no model" in refused("generate", tmp_path / "nothing", "--prompt", "x")
    assert "is no model" in refused("generate", tmp_path, "--prompt", "x")
    unfinished = shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    assert "mosaics export" in refused("generate", unfinished, "--prompt", "x")
    assert "has no tokenizer" in refused("generate", unfinished / "checkpoints" / "step-00000004", "--prompt", "x")
    damaged = shutil.copytree(small_run / "export", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x00" * 100)
    assert "damaged" in refused("generate", damaged, "--prompt", "x")
    (damaged / "config.json").write_text("{")
    refused("generate", damaged, "--prompt", "x")
