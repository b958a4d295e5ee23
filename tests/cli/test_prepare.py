import io
import json
import shlex
import subprocess
import sys

import pytest

from mosaics.cli import main
from mosaics.cli.prepare import EXAMPLE
from mosaics.data import PackedDataset


@pytest.fixture
def books(tmp_path):
    (tmp_path / "books").mkdir()
    for number in range(6):
        (tmp_path / "books" / f"{number}.txt").write_text(f"Book {number} of memories.\n" * 30)
    return tmp_path / "books"


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_prepare_command_writes_the_folder_and_prints_the_report(books, tmp_path, capsys):
    words = ["prepare", "--corpus", f"{books}/*.txt", "--out", tmp_path / "p", "--vocab-size", 300]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "bytes/token" in out and "tokens in a document" in out and "validation" in out
    assert len(PackedDataset(tmp_path / "p", "train", 32)) > 5
    code, again, err = run(capsys, *words)
    assert (code, again) == (0, out) and "already holds this corpus" in err


def test_prepare_command_json_report(books, tmp_path, capsys):
    code, out, _ = run(capsys, "prepare", "--corpus", books, "--out", tmp_path / "p", "--vocab-size", 300, "--json")
    report = json.loads(out)
    assert (
        code == 0 and report["splits"]["train"]["documents"] == 5 and report["splits"]["validation"]["documents"] == 1
    )


def test_prepare_command_options_reach_the_corpora(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes('{"body": "é one"}\n{"body": "two"}\n'.encode("latin-1"))
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n')
    words = ["--corpus", tmp_path / "a.jsonl", "--validation-corpus", tmp_path / "b.jsonl", "--field", "body"]
    words += ["--encoding", "latin-1", "--vocab-size", 259, "--seed", 3, "--json"]
    code, out, _ = run(capsys, "prepare", "--out", tmp_path / "p", *words)
    assert code == 0
    assert {name: counts["text_bytes"] for name, counts in json.loads(out)["splits"].items()} == {
        "train": len("é one".encode()) + 3,
        "validation": 5,
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["--corpus", "missing/*.txt"], "no file in 'missing/*.txt'"),
        (["--corpus", "bad.txt"], "bad.txt is not utf-8: byte 3 (0xff)"),
        (["--corpus", "empty.txt"], "'empty.txt' holds no text"),
        (["--corpus", "good.txt", "--vocab-size", "12"], "vocabulary of 12 entries is out of range"),
        (["--corpus", "good.txt", "--validation", "2"], "validation share of 2.0 is out of range"),
        (["--corpus", "good.txt", "--tokenizer", "not here"], "no tokenizer folder 'not here'"),
        (["--corpus", "good.txt", "--out", "good.txt"], "good.txt exists and is not a prepared corpus"),
        (["--corpus", "good.txt", "--out", "good.txt/p"], "good.txt"),
        (["--corpsu", "good.txt"], "--corpsu"),
    ],
)
def test_prepare_command_bad_input_is_one_sentence_and_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"bad\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_text("good " * 100)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run(capsys, "prepare", *(["--out", "p"] if "--out" not in words else []), *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_prepare_command_help_shows_an_example_that_runs(tmp_path, capsys, monkeypatch):
    code, out, _ = run(capsys, "prepare", "--help")
    assert code == 0 and EXAMPLE in out
    words = shlex.split(EXAMPLE)
    assert words.pop(0) == "mosaics"
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "") and "python-stdlib in data/python" in out
    assert (tmp_path / "data" / "python" / "manifest.json").is_file()


def test_prepare_command_takes_several_corpora(books, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "0.txt").write_text("Another book.\n" * 30)
    words = ["--corpus", books, "--corpus", tmp_path / "more", "--vocab-size", 300, "--json"]
    code, out, _ = run(capsys, "prepare", *words, "--out", tmp_path / "p")
    counts = json.loads(out)
    assert code == 0 and sum(part["documents"] for part in counts["splits"].values()) == 7


def test_prepare_command_refuses_text_that_is_named_twice(books, tmp_path, capsys):
    out = ["--out", tmp_path / "p"]
    code, _, err = run(capsys, "prepare", "--corpus", books, "--corpus", books, *out)
    assert code == 2 and "is given twice" in err
    code, _, err = run(capsys, "prepare", "--corpus", books, "--validation-corpus", books, *out)
    assert code == 2 and "which is trained on" in err and not (tmp_path / "p").exists()


@pytest.mark.slow
def test_prepare_command_takes_standard_input(tmp_path, capsys, monkeypatch):
    def words(spec: str, name: str) -> list[str]:
        return ["prepare", "--corpus", spec, "--out", str(tmp_path / name), "--vocab-size", "300", "--json"]

    def piped(spec: str, text: str, name: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return run(capsys, *words(spec, name))

    def documents(code: int, out: str, err: str) -> int:
        assert code == 0, err
        return sum(split["documents"] for split in json.loads(out)["splits"].values())

    command, text = [sys.executable, "-m", "mosaics", *words("-", "one")], "A text that is piped.\n" * 40
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert documents(done.returncode, done.stdout, done.stderr) == 2  # its end is held out
    records = "".join(json.dumps({"text": f"Record {number} of several.\n" * 9}) + "\n" for number in range(5))
    assert documents(*piped("-.jsonl", records, "five")) == 5
    code, _, err = piped("-", "", "nothing")
    assert code == 2 and "holds no text" in err and not (tmp_path / "nothing").exists()
