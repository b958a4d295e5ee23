"""`mosaics library` and `mosaics ask`."""

import io
import json
import shutil

import pytest
import torch

from mosaics.models.loading import load_exported


@pytest.fixture(scope="module")
def asked(small_run, text_folder, tmp_path_factory):
    """A library of three documents."""
    from mosaics.cli import main

    folder = tmp_path_factory.mktemp("libraries") / "library"
    files = [str(text_folder / f"{name}.txt") for name in ("bisect", "heapq", "keyword")]
    assert main(["library", "add", str(folder), *files, "--model", str(small_run)]) == 0
    return folder


@pytest.fixture
def library(asked, tmp_path):
    """A copy to change."""
    return shutil.copytree(asked, tmp_path / "library")


def test_library_adds_lists_shows_and_removes(mosaics, refused, library, text_folder):
    code, output, error = mosaics("library", "add", library, text_folder / "[bk]*.txt")
    assert code == 0 and output == "" and "0 documents read" in error and "2 were there; 3 in" in error
    changed = library.parent / "bisect.txt"
    changed.write_text("import heapq\n")
    code, output, error = mosaics("library", "add", library, changed, text_folder / "string.txt")
    assert code == 0 and output.startswith("changed bisect.txt: ") and "\nread string.txt: " in output
    code, output, _ = mosaics("library", "list", library)
    assert code == 0 and [line.split()[0] for line in output.splitlines()] == [
        "document", "bisect.txt", "heapq.txt", "keyword.txt", "string.txt", "4"
    ]  # fmt: skip
    code, output, _ = mosaics("library", "show", library, "bisect.txt")
    assert code == 0 and output.startswith("bisect.txt: ") and "'import heapq'" in output
    assert mosaics("library", "remove", library, "heapq.txt", "string.txt")[1].endswith("2 documents are left\n")
    assert mosaics("library", "compact", library)[1] == "2 documents are in 1 files\n"
    assert mosaics("library", "verify", library)[1] == "2 documents are as they were written\n"
    (file,) = library.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "has changed since it was written" in refused("library", "verify", library)
    assert "has changed since it was written" in refused("ask", library, "import ")


def test_ask_prints_the_answer_and_what_it_was_read_from(mosaics, asked, small_run):
    words = ["ask", asked, "import ", "--max-new-tokens", 12]
    code, output, error = mosaics(*words)
    answer, _, cited = output.partition("\n\n")
    assert code == 0 and "asked 3 documents" in error
    assert cited.count("% of the weight from ") == 3 and cited.count("without it the forecast of the answer") == 3
    assert cited.count(", characters ") == 3
    code, output, error = mosaics(*words, "--no-cite")
    assert (code, output) == (0, f"{answer}\n")
    code, output, _ = mosaics(*words, "--json", "--documents", "heapq.txt, bisect.txt")
    found = json.loads(output)
    assert code == 0 and sorted(found["read"]) == ["bisect.txt", "heapq.txt"] and found["question"] == "import "
    assert 0 < sum(document["share"] for document in found["documents"]) <= 1 + 1e-6
    assert len(json.loads(mosaics(*words, "--json", "--top", 1)[1])["read"]) == 1
    assert "asked 3 of 3 documents" in mosaics(*words, "--within", 1e-3, "--no-cite")[2]
    assert mosaics(*words, "--model", small_run / "export", "--no-cite")[0] == 0


def test_ask_takes_standard_input_and_a_seed(mosaics, asked, monkeypatch):
    found = []
    for seed in (1, 1, 2):
        monkeypatch.setattr("sys.stdin", io.StringIO("class A"))
        code, output, _ = mosaics("ask", asked, "-", "--temperature", 1, "--seed", seed, "--no-cite")
        found.append(output)
        assert code == 0
    assert found[0] == found[1] != found[2]


def test_library_keeps_its_state_dtype(mosaics, refused, small_run, text_folder, tmp_path):
    file = text_folder / "bisect.txt"
    words = ["library", "add", tmp_path / "narrow", file]
    assert mosaics(*words, "--model", small_run, "--state-dtype", "int8")[0] == 0
    assert mosaics(*words, text_folder / "keyword.txt")[0] == 0  # model and dtype are the library's
    assert "keeps its pairs int8" in refused(*words, "--state-dtype", "bfloat16")
    assert mosaics("ask", tmp_path / "narrow", "import ", "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["library", "add", "LIBRARY", "nothing.txt"], "there is no file nothing.txt"),
        (["library", "add", "LIBRARY", "FOLDER"], "is a folder"),
        (["library", "add", "LIBRARY", "FOLDER/empty.txt"], "is empty"),
        (["library", "add", "LIBRARY", "FOLDER/latin.txt"], "is not utf-8 at byte 1"),
        (["library", "add", "LIBRARY", "FOLDER/a,b.txt"], "is no name for a document"),
        (["library", "add", "LIBRARY", "FOLDER/x.txt", "FOLDER/other/x.txt"], "have the same name"),
        (["library", "add", "LIBRARY", "FOLDER/x.txt", "--processes", "0"], "--processes is 0"),
        (["library", "add", "LIBRARY", "FOLDER/x.txt", "--model", "FOLDER/no"], "there is no model"),
        (["library", "add", "LIBRARY"], "needs files"),
        (["library", "add", "FOLDER", "FOLDER/x.txt", "--model", "RUN"], "not empty"),
        (["library", "add", "FOLDER/new", "FOLDER/x.txt"], "say with --model"),
        (["library", "remove", "LIBRARY"], "needs names"),
        (["library", "remove", "LIBRARY", "../manifest.json"], "there is no document '../manifest.json'"),
        (["library", "show", "LIBRARY", "x"], "there is no document 'x'"),
        (["library", "list", "LIBRARY", "x"], "takes a FOLDER alone"),
        (["library", "list", "LIBRARY", "--model", "x"], "are for add"),
        (["library", "list", "FOLDER"], "there is no library"),
        (["library", "lst", "LIBRARY"], "lst"),
        (["ask", "FOLDER/nothing", "x"], "there is no library"),
        (["ask", "LIBRARY", ""], "question is empty"),
        (["ask", "LIBRARY", "x" * 200, "--max-question", "9"], "may have 9"),
        (["ask", "LIBRARY", "x", "--documents", "a,b"], "there is no document 'a'"),
        (["ask", "LIBRARY", "x", "--top", "0"], "--top is 0"),
        (["ask", "LIBRARY", "x", "--within", "1"], "--within is 1.0"),
        (["ask", "LIBRARY", "x", "--within", "0.1", "--top", "1"], "leave one out"),
        (["ask", "LIBRARY", "x", "--without", "-1"], "--without is -1"),
        (["ask", "LIBRARY", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["ask", "LIBRARY", "x", "--model", "FOLDER/no"], "there is no model"),
    ],
)
def test_library_and_ask_refuse(refused, mosaics, asked, small_run, tmp_path, words, said):
    (tmp_path / "other").mkdir()
    for name in ("x.txt", "other/x.txt", "a,b.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"x\xe9")
    before = {path.name: path.read_bytes() for path in asked.iterdir()}
    places = {"LIBRARY": str(asked), "FOLDER": str(tmp_path), "RUN": str(small_run)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert said in refused(*words)
    assert {path.name: path.read_bytes() for path in asked.iterdir()} == before


def test_ask_names_the_model_that_is_gone(refused, asked, small_run, tmp_path, text_folder, mosaics):
    export = shutil.copytree(small_run / "export", tmp_path / "model")
    words = ["library", "add", tmp_path / "library", text_folder / "keyword.txt"]
    assert mosaics(*words, "--model", export)[0] == 0
    shutil.move(export, tmp_path / "moved")
    assert "name it with --model" in refused("ask", tmp_path / "library", "x")
    assert mosaics("ask", tmp_path / "library", "x", "--max-new-tokens", 2, "--model", tmp_path / "moved")[0] == 0
    model, tokenizer = load_exported(tmp_path / "moved")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other")
    assert "was read by another model" in refused("ask", asked, "x", "--model", tmp_path / "other")
