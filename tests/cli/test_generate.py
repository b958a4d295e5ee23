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


def test_generate_and_evaluate_take_a_run_that_is_being_trained(mosaics, small_run, tmp_path):
    begun = shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    for words in (
        ["generate", "MODEL", "--prompt", "import ", "--max-new-tokens", 12],
        ["evaluate", "MODEL", "--suite", "recall", "--lengths", 16, "--pairs", 2, "--samples", 1, "--device", "cpu"],
    ):
        found = [mosaics(*(model if word == "MODEL" else word for word in words)) for model in (begun, small_run)]
        assert found[0][0] == 0 and found[0][1].replace(str(begun), str(small_run)) == found[1][1]


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
    assert "there is no folder nosuch" in refused("generate", "nosuch", "--prompt", "x")
    assert "is no model" in refused("generate", tmp_path, "--prompt", "x")
    begun = shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoints"))
    assert "has no checkpoint yet" in refused("generate", begun, "--prompt", "x")
    foreign = shutil.copytree(small_run / "checkpoints" / "step-00000004", tmp_path / "step-00000004")
    assert "has no tokenizer" in refused("generate", foreign, "--prompt", "x")
    assert "is a preset, which has no weights" in refused("generate", "memory-mosaics-v2-tiny", "--prompt", "x")
    damaged = shutil.copytree(small_run / "export", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x00" * 100)
    assert "damaged" in refused("generate", damaged, "--prompt", "x")
    (damaged / "config.json").write_text("{")
    refused("generate", damaged, "--prompt", "x")


def test_generate_from_a_memory_answers_as_after_reading_the_document(mosaics, small_run, tmp_path):
    document, memory = tmp_path / "doc.txt", tmp_path / "doc.memory"
    document.write_text("import os\n\n\ndef path(name):\n    return os.path.join('a', name)\n" * 20, encoding="utf-8")
    more = ["--max-new-tokens", 8, "--temperature", 0]
    questions = ["--prompt", "def ", "--prompt", "import os, sys\nclass ", "--prompt", "x"]
    code, read, error = mosaics("generate", small_run, "--context-file", document, *questions, *more)
    assert code == 0 and "read " in error
    code, output, error = mosaics("generate", small_run, "--context-file", document, "--save-memory", memory)
    assert (code, output) == (0, "") and f"{memory.stat().st_size:,} bytes" in error
    document.unlink()
    code, asked, error = mosaics("generate", small_run, "--memory", memory, *questions, *more)
    assert code == 0 and asked == read and "took up" in error
    alone = [mosaics("generate", small_run, "--memory", memory, *questions[i : i + 2], *more)[1] for i in (0, 2, 4)]
    assert "".join(alone) == asked
    assert asked.startswith("def ") and mosaics("generate", small_run, *questions, *more)[1] != asked


def test_generate_refuses_impossible_memories(refused, small_run, tmp_path):
    document, memory = tmp_path / "doc.txt", tmp_path / "doc.memory"
    document.write_bytes(b"caf\xe9")
    words = ["generate", small_run]
    assert "give a --prompt" in refused(*words)
    assert "no UTF-8 text" in refused(*words, "--context-file", document, "--prompt", "x")
    assert "no folder" in refused(*words, "--context-file", document, "--save-memory", tmp_path / "no" / "doc.memory")
    assert "--context-file" in refused(*words, "--save-memory", memory, "--prompt", "x")
    assert "leave one out" in refused(*words, "--memory", memory, "--context-file", document, "--prompt", "x")
    assert "there is no memory" in refused(*words, "--memory", memory, "--prompt", "x")
    memory.write_bytes(b"x" * 100)
    assert "damaged" in refused(*words, "--memory", memory, "--prompt", "x")
    assert "--context-file again" in refused(*words, "--memory", memory, "--state-dtype", "int8", "--prompt", "x")
    assert "read_tolerance is 1.0" in refused(*words, "--read-tolerance", "1", "--prompt", "x")
    assert "choose bfloat16 or int8" in refused(*words, "--state-dtype", "int4", "--prompt", "x")
    refused(*words, "--context-file", tmp_path / "nothing.txt", "--prompt", "x")
